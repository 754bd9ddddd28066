from tests.helpers.compiled import Kernel


def copy_rows(kind: str, num_scales: int, *, is_share: bool = False) -> Kernel:
    return Kernel(
        "arrange_rows._copy_rows_kernel",
        {"x": kind, "topk_ids": "*i32", "expert_map": "*i32", "starts": "*i32", "places": "*i32", "rows": kind}
        | {"row_ids": "*i64", "scale": "*fp32", "row_scale": "*fp32", "hidden_size": "i32", "num_experts": "i32"}
        | {"num_local_experts": "i32", "x_stride": "i32", "id_stride": "i32", "id_column_stride": "i32"}
        | {"scale_stride": "i32", "scale_column_stride": "i32", "row_scale_stride": "i32"}
        | {"row_scale_column_stride": "i32"},
        {"NUM_IDS": 8, "BLOCK_IDS": 8, "NUM_SCALES": num_scales}
        | {"BLOCK_SCALES": 1 << max(0, num_scales - 1).bit_length(), "NUM_BLOCKS": 1 if is_share else 4}
        | {"BLOCK": 8192 if is_share else 2048, "IS_SHARE": is_share},
        multiples_of_16=("hidden_size", "x_stride"),
        label=f"{num_scales} scales{' of a share' if is_share else ''}",
    )


KERNELS = (
    Kernel(
        "arrange_rows._count_entries_kernel",
        {"topk_ids": "*i32", "expert_map": "*i32", "counts": "*i32", "starts": "*i32", "places": "*i32"}
        | {"num_entries": "i32", "num_experts": "i32", "id_stride": "i32", "id_column_stride": "i32"},
        {"NUM_IDS": 8, "BLOCK": 8192},
        num_warps=32,
        is_vectorised=False,
    ),
    copy_rows("*bf16", 0),
    copy_rows("*bf16", 0, is_share=True),
    copy_rows("*i8", 1),
    copy_rows("*i8", 1, is_share=True),
    copy_rows("*i8", 56),
)
