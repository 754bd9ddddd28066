from argosy.kernels.triton.arrange_chunks import (
    CHUNK,
    COPY_BLOCK,
    COPY_WARPS,
    COUNT_WARPS,
    MAX_TABLE,
    MAX_WORDS,
    MIN_TABLE,
)
from tests.helpers.compiled import Kernel


def count_chunks(num_words: int, num_warps: int) -> Kernel:
    return Kernel(
        "arrange_chunks._count_chunks_kernel",
        {"topk_ids": "*i32", "expert_map": "*i32", "places": "*i32", "table": "*i32", "num_entries": "i32"}
        | {"num_experts": "i32", "num_local_experts": "i32", "id_stride": "i32", "id_column_stride": "i32"},
        {"NUM_IDS": 8, "NUM_LINES": 16, "NUM_WORDS": num_words, "BLOCK": CHUNK},
        num_warps=num_warps,
        is_vectorised=False,
        label=f"{4 * num_words} experts",
    )


def copy_rows(kind: str, num_scales: int, table: int) -> Kernel:
    return Kernel(
        "arrange_chunks._copy_chunk_rows_kernel",
        {"x": kind, "places": "*i32", "table": "*u8", "rows": kind, "counts": "*i32", "row_ids": "*i64"}
        | {"scale": "*fp32", "row_scale": "*fp32", "num_chunks": "i32", "hidden_size": "i32"}
        | {"num_local_experts": "i32", "x_stride": "i32", "scale_stride": "i32", "scale_column_stride": "i32"}
        | {"row_scale_stride": "i32", "row_scale_column_stride": "i32"},
        {"NUM_IDS": 8, "BLOCK_IDS": 8, "NUM_SCALES": num_scales}
        | {"BLOCK_SCALES": 1 << max(0, num_scales - 1).bit_length(), "NUM_BLOCKS": 1, "BLOCK": COPY_BLOCK}
        | {"CHUNK_ENTRIES": CHUNK, "EXPERTS": 16, "TABLE": table},
        num_warps=COPY_WARPS,
        multiples_of_16=("hidden_size", "x_stride"),
        label=f"{num_scales} scales, table of {table}",
    )


KERNELS = (
    count_chunks(4, COUNT_WARPS),
    count_chunks(MAX_WORDS, COUNT_WARPS),
    copy_rows("*bf16", 0, MIN_TABLE),
    copy_rows("*i8", 1, MIN_TABLE),
    copy_rows("*i8", 1, MAX_TABLE),
    copy_rows("*i8", 56, MIN_TABLE),
)
