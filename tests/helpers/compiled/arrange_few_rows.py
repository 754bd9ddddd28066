from argosy.kernels.triton.arrange_few_rows import (
    COUNTED_EXPERTS,
    FEW_BLOCK,
    FEW_ENTRIES,
    FEW_WARPS,
    MAX_BLOCK,
    MAX_ENTRIES,
    MAX_WARPS,
)
from tests.helpers.compiled import Kernel


def arrange_few(kind: str, num_scales: int, num_entries: int) -> Kernel:
    is_few = num_entries <= FEW_ENTRIES
    return Kernel(
        "arrange_few_rows._arrange_few_kernel",
        {"x": kind, "topk_ids": "*i32", "expert_map": "*i32", "rows": kind, "counts": "*i32", "row_ids": "*i64"}
        | {"scale": "*fp32", "row_scale": "*fp32", "num_entries": "i32", "num_copies": "i32", "hidden_size": "i32"}
        | {"num_experts": "i32", "num_local_experts": "i32", "x_stride": "i32", "id_stride": "i32"}
        | {"id_column_stride": "i32", "scale_stride": "i32", "scale_column_stride": "i32"}
        | {"row_scale_stride": "i32", "row_scale_column_stride": "i32"},
        {"NUM_IDS": 8, "PADDED_IDS": 8, "NUM_SCALES": num_scales}
        | {"BLOCK_SCALES": 1 << max(0, num_scales - 1).bit_length(), "NUM_BLOCKS": 4 if is_few else 2}
        | {"BLOCK": FEW_BLOCK if is_few else MAX_BLOCK, "ENTRIES": num_entries, "EXPERTS": COUNTED_EXPERTS},
        num_warps=FEW_WARPS if is_few else MAX_WARPS,
        multiples_of_16=("hidden_size", "x_stride"),
        label=f"{num_scales} scales, {num_entries} entries",
    )


KERNELS = (
    arrange_few("*bf16", 0, MAX_ENTRIES),
    arrange_few("*i8", 1, FEW_ENTRIES),
    arrange_few("*i8", 1, MAX_ENTRIES),
    arrange_few("*i8", 56, MAX_ENTRIES),
)
