import triton.language as tl

from argosy.kernels.triton.fp8_gemm import (
    GATED_TILES,
    GATED_WIDE_TILE,
    HOPPER_DENSE_TILE,
    HOPPER_GATED_TILE,
    HOPPER_PLAIN_TILE,
    PLAIN_TILES,
    PLAIN_WIDE_TILE,
    Tile,
)
from tests.helpers.compiled import Kernel


def fp8_gemm(tile: Tile, *, is_gated: bool, is_dense: bool = False, is_split: bool = False) -> Kernel:
    """The kernel with a tile of ``fp8_gemm.py``; what it loads comes through the tile loader, not in vectors."""
    rows = tile.block_n if tile.is_swapped else tile.block_rows
    assert rows % 64 == 0, "shorter sides do not fill the instruction"
    columns = tile.block_rows if tile.is_swapped else tile.block_n
    constants = {
        **{"NUM_EXPERTS": 1 if is_dense else 256, "BLOCK_ROWS": tile.block_rows, "BLOCK_N": tile.block_n},
        **{"GROUP_ROWS": tile.group_rows, "NUM_UNROLLED": tile.num_unrolled, "IS_SWAPPED": tile.is_swapped},
        **{"IS_HALVED": tile.is_halved, "IS_GATED": is_gated, "IS_DENSE": is_dense, "IS_QUANTIZED": is_gated},
        **{"HAS_UE8M0_SCALES": True, "HIDDEN_DTYPE": tl.bfloat16, "x_scale_row_stride": 1},
        **({} if is_split else {"num_splits": 1}),
    }
    return Kernel(
        "fp8_gemm._fp8_kernel",
        {
            "x_tiles": f"tensordesc<fp8e4nv[{tile.block_rows},128]>",
            "weight_tiles": f"tensordesc<fp8e4nv[{tile.block_n},128]>",
        }
        | {"x_scale": "*fp32", "weight_scale_inv": "*fp32", "counts": "*i32"}
        | {"out": "*fp8e4nv" if is_gated else "*fp32" if is_split else "*bf16", "out_scale": "*fp32"}
        | {"num_rows": "i32", "num_experts": "i32", "num_columns": "i32", "out_features": "i32"}
        | {"in_features": "i32", "x_scale_group_stride": "i32"}
        | ({"num_splits": "i32"} if is_split else {}),
        constants,
        num_warps=tile.num_warps,
        multiples_of_16=("num_columns", "out_features", "in_features"),
        is_vectorised=None,
        instructions=(f"wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3", "cp.async.bulk.tensor"),
        num_stages=tile.num_stages,
        label=f"{tile.block_rows}x{tile.block_n}{' gated' if is_gated else ''}{' split' if is_split else ''}",
    )


KERNELS = (
    *(fp8_gemm(tile, is_gated=False) for tile in PLAIN_TILES),
    *(fp8_gemm(tile, is_gated=False, is_dense=True, is_split=True) for tile in PLAIN_TILES),
    fp8_gemm(PLAIN_WIDE_TILE, is_gated=False, is_dense=True),
    *(fp8_gemm(tile, is_gated=True) for tile in GATED_TILES),
    fp8_gemm(GATED_WIDE_TILE, is_gated=True),
    Kernel(
        "fp8_gemm._sum_splits_kernel",
        {"parts": "*fp32", "out": "*bf16", "size": "i32", "num_splits": "i32"},
        {"BLOCK": 1024},
        multiples_of_16=("size",),
    ),
)


def multiply_fp8_on_hopper(*, is_gated: bool, is_dense: bool = False) -> Kernel:
    """Compiled by ``compile_gluon``. Gated, the result is quantised."""
    tile = HOPPER_GATED_TILE if is_gated else HOPPER_DENSE_TILE if is_dense else HOPPER_PLAIN_TILE
    return Kernel(
        "fp8_hopper.multiply_fp8_on_hopper",
        {"x_tiles": f"fp8e4nv[{tile.box_rows},128]", "weight_tiles": "fp8e4nv[128,128]"}
        | {"x_scale": "*fp32", "weight_scale_inv": "*fp32", "counts": "*fp32" if is_dense else "*i32"}
        | {"num_taken": "*fp32" if is_dense else "*i32", "out": "*fp8e4nv" if is_gated else "*bf16"}
        | {"out_scale": "*fp32", "num_rows": "i32", "num_columns": "i32", "out_features": "i32"}
        | {"in_features": "i32", "x_scale_group_stride": "i32"}
        | ({} if is_dense else {"num_experts": "i32"}),
        {"WALKED_TILES": tile.walked_tiles, "NUM_STAGES": tile.num_stages, "LEAD": tile.lead}
        | {"NUM_UNROLLED": tile.num_unrolled}
        | {
            "HAS_QUEUE": not is_dense,
            "PADDED_EXPERTS": 32 if is_dense else 256,
            "IS_GATED": is_gated,
            "IS_DENSE": is_dense,
            "IS_QUANTIZED": is_gated,
        }
        | {"HAS_UE8M0_SCALES": True, "HIDDEN_DTYPE": tl.bfloat16, "x_scale_row_stride": 1}
        | ({"num_experts": 1} if is_dense else {}),
        multiples_of_16=("num_columns", "out_features", "in_features"),
        instructions=("wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3", "cp.async.bulk.tensor", "setmaxnreg"),
        label="gated" if is_gated else "dense" if is_dense else "plain",
    )


# Not Triton's but Gluon's: compiled by a test of their own.
HOPPER_KERNELS = (
    multiply_fp8_on_hopper(is_gated=False, is_dense=True),
    multiply_fp8_on_hopper(is_gated=False),
    multiply_fp8_on_hopper(is_gated=True),
)
