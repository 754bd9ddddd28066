from argosy.kernels.triton.hopper_tiles import HopperTile
from argosy.kernels.triton.w8a8_gemm import (
    GATED_TILES,
    GATED_WIDE_TILE,
    HOPPER_GATED_TILE,
    HOPPER_PLAIN_TILE,
    PLAIN_TILES,
    PLAIN_WIDE_TILE,
    Tile,
)
from tests.helpers.compiled import Kernel


def w8a8_gemm(tile: Tile, *, is_gated: bool, is_dense: bool = False) -> Kernel:
    """The kernel with a tile of ``w8a8_gemm.py``; what it loads comes through the tile loader, not in vectors."""
    rows = tile.block_n if tile.is_swapped else tile.block_rows
    assert rows % 64 == 0, "shorter sides do not fill the instruction"
    return Kernel(
        "w8a8_gemm._w8a8_kernel",
        {
            "x_tiles": f"tensordesc<i8[{tile.block_rows},{tile.block_k}]>",
            "tail_tiles": f"tensordesc<i8[{tile.tail_rows or tile.block_rows},{tile.block_k}]>",
            "weight_tiles": f"tensordesc<i8[{tile.block_n},{tile.block_k}]>",
        }
        | {"x_scale": "*fp32", "weight_scale": "*fp32", "counts": "*i32", "out": "*bf16", "num_rows": "i32"}
        | {"num_experts": "i32", "num_columns": "i32", "out_features": "i32", "in_features": "i32"},
        {"NUM_EXPERTS": 1 if is_dense else 256, "BLOCK_ROWS": tile.block_rows, "BLOCK_N": tile.block_n}
        | {"BLOCK_K": tile.block_k, "GROUP_ROWS": tile.group_rows, "IS_SWAPPED": tile.is_swapped}
        | {"TAIL_ROWS": tile.tail_rows, "IS_FLAT": tile.is_flat}
        | {"IS_GATED": is_gated, "IS_DENSE": is_dense},
        num_warps=tile.num_warps,
        multiples_of_16=("num_columns", "out_features", "in_features"),
        is_vectorised=False,
        instructions=("wgmma.mma_async.sync.aligned.m64n", ".s32.s8.s8", "cp.async.bulk.tensor"),
        num_stages=tile.num_stages,
        label=f"{tile.block_rows}x{tile.block_n}",
    )


KERNELS = (
    *(w8a8_gemm(tile, is_gated=False) for tile in PLAIN_TILES),
    w8a8_gemm(PLAIN_WIDE_TILE, is_gated=False, is_dense=True),
    *(w8a8_gemm(tile, is_gated=True) for tile in GATED_TILES),
    w8a8_gemm(GATED_WIDE_TILE, is_gated=True),
)


def multiply_on_hopper(tile: HopperTile, *, is_gated: bool, is_dense: bool = False, out: str = "bf16") -> Kernel:
    """Compiled by ``compile_gluon``."""
    return Kernel(
        "w8a8_hopper.multiply_on_hopper",
        {"x_tiles": f"i8[{tile.box_rows},{tile.block_k}]", "weight_tiles": f"i8[{tile.box_n},{tile.block_k}]"}
        | {"x_scale": "*fp32", "weight_scale": "*fp32", "counts": "*fp32" if is_dense else "*i32"}
        | {"num_taken": "*fp32" if is_dense else "*i32", "out": f"*{out}", "num_rows": "i32"}
        | ({} if is_dense else {"num_experts": "i32"})
        | {"num_columns": "i32", "out_features": "i32", "in_features": "i32"},
        {"WALKED_TILES": tile.walked_tiles, "NUM_STAGES": tile.num_stages, "LEAD": tile.lead}
        | {"HAS_QUEUE": tile.has_queue and not is_dense, "PADDED_EXPERTS": 32 if is_dense else 256}
        | {"IS_GATED": is_gated, "IS_DENSE": is_dense}
        | ({"num_experts": 1} if is_dense else {}),
        multiples_of_16=("num_columns", "out_features", "in_features"),
        instructions=("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8", "cp.async.bulk.tensor", "setmaxnreg"),
        label=f"{tile.box_n} {tile.block_k} {'gated' if is_gated else 'plain'} {out}",
    )


# Not Triton's but Gluon's: compiled by a test of their own.
HOPPER_KERNELS = (
    multiply_on_hopper(HOPPER_PLAIN_TILE, is_gated=False, is_dense=True),
    multiply_on_hopper(HOPPER_PLAIN_TILE, is_gated=False),
    multiply_on_hopper(HOPPER_GATED_TILE, is_gated=True),
    multiply_on_hopper(HOPPER_GATED_TILE, is_gated=True, out="fp32"),
)
