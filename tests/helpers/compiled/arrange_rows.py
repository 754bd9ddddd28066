from argosy.kernels.triton.arrange_chunks import CHUNK
from argosy.kernels.triton.arrange_rows import SUM_BLOCK, SUM_CHUNKS, SUM_WARPS
from tests.helpers.compiled import Kernel


def sum_chunks(num_columns: int, *, is_padded: bool = False) -> Kernel:
    return Kernel(
        "arrange_rows._sum_chunks_kernel",
        {"table": "*u8", "counts": "*i32", "starts": "*i32", "num_chunks": "i32", "capacity": "i32"},
        {"EXPERTS": num_columns, "IS_PADDED": is_padded, "BLOCK": SUM_BLOCK, "CHUNKS": SUM_CHUNKS},
        num_warps=SUM_WARPS,
        is_vectorised=not is_padded,
        label=f"{num_columns} experts{', padded' if is_padded else ''}",
    )


def copy_rows(kind: str, num_scales: int, *, is_share: bool = False) -> Kernel:
    return Kernel(
        "arrange_rows._copy_rows_kernel",
        {"x": kind, "places": "*i32", "starts": "*i32", "rows": kind, "row_ids": "*i64", "scale": "*fp32"}
        | {"row_scale": "*fp32", "hidden_size": "i32", "x_stride": "i32", "scale_stride": "i32"}
        | {"scale_column_stride": "i32", "row_scale_stride": "i32", "row_scale_column_stride": "i32"},
        {"NUM_IDS": 8, "BLOCK_IDS": 8, "NUM_SCALES": num_scales}
        | {"BLOCK_SCALES": 1 << max(0, num_scales - 1).bit_length(), "NUM_BLOCKS": 1 if is_share else 4}
        | {"BLOCK": 8192 if is_share else 2048, "CHUNK_ENTRIES": CHUNK, "EXPERTS": 16 if is_share else 256}
        | {"IS_SHARE": is_share},
        multiples_of_16=("hidden_size", "x_stride"),
        label=f"{num_scales} scales{' of a share' if is_share else ''}",
    )


KERNELS = (
    sum_chunks(16),
    sum_chunks(256),
    sum_chunks(16, is_padded=True),
    copy_rows("*bf16", 0),
    copy_rows("*bf16", 0, is_share=True),
    copy_rows("*i8", 1),
    copy_rows("*i8", 1, is_share=True),
    copy_rows("*i8", 56),
)
