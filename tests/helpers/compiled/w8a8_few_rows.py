from argosy.kernels.triton.w8a8_few_rows import (
    NARROW_TILES,
    SPLIT_TILES,
    SUM_BLOCK,
    WIDE_SPLIT_TILES,
    NarrowTile,
    SplitTile,
)
from tests.helpers.compiled import Kernel

SCALES = {"x_scale": "*fp32", "weight_scale": "*fp32"}
SIZES = {"num_rows": "i32", "out_features": "i32", "in_features": "i32"}


def narrow(tile: NarrowTile) -> Kernel:
    return Kernel(
        "w8a8_few_rows._narrow_kernel",
        {"x": "*i8", "weight": "*i8"} | SCALES | {"out": "*bf16"} | SIZES,
        {"BLOCK_ROWS": tile.block_rows, "BLOCK_N": tile.block_n}
        | {"SLICE": tile.block_k // tile.num_warps, "NUM_SLICES": tile.num_warps, "FETCHED_LINES": 8},
        num_warps=tile.num_warps,
        multiples_of_16=("out_features", "in_features"),
        instructions=("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32", "ldmatrix"),
        num_stages=tile.num_stages,
        label=f"{tile.block_n}",
    )


def split(tile: SplitTile, *, is_whole: bool) -> Kernel:
    """Weights on the instruction's long side; what it loads comes through the tile loader, not in vectors."""
    return Kernel(
        "w8a8_few_rows._split_kernel",
        {
            "x_tiles": f"tensordesc<i8[{tile.block_rows},{tile.block_k}]>",
            "weight_tiles": f"tensordesc<i8[{tile.block_n},{tile.block_k}]>",
        }
        | SCALES
        | {"parts": "*bf16" if is_whole else "*i32"}
        | SIZES
        | {"split": "i32"},
        {"BLOCK_ROWS": tile.block_rows, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "IS_WHOLE": is_whole},
        num_warps=tile.num_warps,
        multiples_of_16=("out_features", "in_features", "split"),
        is_vectorised=False,
        instructions=("wgmma.mma_async.sync.aligned.m64n", ".s32.s8.s8", "cp.async.bulk.tensor"),
        num_stages=tile.num_stages,
        label=f"{tile.block_rows}x{tile.block_n} {'whole' if is_whole else 'part'}",
    )


KERNELS = (
    *(narrow(tile) for tile in NARROW_TILES),
    *(
        split(tile, is_whole=is_whole)
        for tile in (*SPLIT_TILES, *WIDE_SPLIT_TILES.values())
        for is_whole in (True, False)
    ),
    Kernel(
        "w8a8_few_rows._sum_scaled_kernel",
        {"parts": "*i32"} | SCALES | {"out": "*bf16", "num_rows": "i32", "out_features": "i32"},
        {"NUM_SPLITS": 4, "BLOCK": SUM_BLOCK},
        multiples_of_16=("out_features",),
    ),
)
