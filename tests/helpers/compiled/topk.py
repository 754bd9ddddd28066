from argosy.kernels.triton.topk import CHUNK, MAX_BLOCK
from tests.helpers.compiled import Kernel


def select(block: int, num_warps: int, *, is_last: bool = True, has_positions: bool = False) -> Kernel:
    return Kernel(
        "topk._select_kernel",
        {"scores": "*fp32", "positions": "*i32" if has_positions else "*fp32", "num_visible": "*i32"}
        | {"kept_scores": "*fp32", "kept_positions": "*i64" if is_last else "*i32", "num_kept": "*i32"}
        | {"slots": "*i64", "block_table": "*i32"}
        | {"width": "i32", "row_stride": "i32", "kept_stride": "i32", "table_stride": "i32"},
        {"TOPK": 2048, "BLOCK_SIZE": 64, "HAS_POSITIONS": has_positions, "IS_LAST": is_last}
        | {"BLOCK": block, "WARPS": num_warps, "READ": 16},
        num_warps=num_warps,
        multiples_of_16=("row_stride",),
        label=f"{block} {num_warps}",
    )


def mask(block: int, num_warps: int) -> Kernel:
    return Kernel(
        "topk._mask_kernel",
        {"scores": "*fp32", "num_visible": "*i32", "mask": "*i32"}
        | {"width": "i32", "row_stride": "i32", "mask_stride": "i32"},
        {"TOPK": 2048, "BLOCK": block, "WARPS": num_warps, "READ": 16},
        num_warps=num_warps,
        multiples_of_16=("row_stride",),
        label=f"{block} {num_warps}",
    )


KERNELS = (
    select(4096, 4),
    select(4096, 8),
    select(8192, 16),
    select(16384, 16),
    select(MAX_BLOCK, 32, has_positions=True),
    select(CHUNK, 16, is_last=False),
    mask(4096, 4),
    mask(8192, 8),
    mask(16384, 16),
)
