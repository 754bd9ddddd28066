from dataclasses import replace

from argosy.kernels.triton.linear_fp32 import FEW_TOKENS_TILES, HEAD_TILES, NARROW_TILES, ROUTER_TILES, Tile
from tests.helpers.compiled import Kernel


def linear_fp32(tile: Tile, *, is_split: bool) -> Kernel:
    """The kernel with a tile of ``linear_fp32.py``; what it loads comes through the tile loader, not in vectors."""
    weight_dtype = "fp32" if is_split else "bf16"
    return Kernel(
        "linear_fp32._linear_kernel",
        {
            "x_tiles": f"tensordesc<bf16[{tile.block_tokens},{tile.block_k}]>",
            "weight_tiles": f"tensordesc<{weight_dtype}[{tile.block_out},{tile.block_k}]>",
        }
        | {"weight": f"*{weight_dtype}", "parts": "*fp32", "num_tokens": "i32", "out_features": "i32"}
        | {"in_features": "i32", "split_k": "i32", "weight_stride": "i32"},
        {"FETCHED_LINES": 8, "BLOCK_OUT": tile.block_out, "BLOCK_TOKENS": tile.block_tokens, "BLOCK_K": tile.block_k}
        | {"IS_SPLIT": is_split},
        num_warps=tile.num_warps,
        multiples_of_16=("out_features", "in_features", "split_k", "weight_stride"),
        is_vectorised=False,
        instructions=("wgmma.mma_async.sync.aligned.m64n", ".f32.bf16.bf16", "cp.async.bulk.tensor"),
        num_stages=tile.num_stages,
        label=f"{weight_dtype} {tile.block_out}x{tile.block_tokens}",
    )


def few_tokens(tile: Tile) -> Kernel:
    return Kernel(
        "linear_fp32._few_tokens_kernel",
        {"x": "*bf16", "weight": "*fp32", "parts": "*fp32", "num_tokens": "i32", "out_features": "i32"}
        | {"in_features": "i32", "x_stride": "i32", "weight_stride": "i32"},
        {"BLOCK_OUT": tile.block_out, "BLOCK_TOKENS": tile.block_tokens, "BLOCK_K": tile.block_k},
        num_warps=tile.num_warps,
        multiples_of_16=("out_features", "in_features", "x_stride", "weight_stride"),
        instructions=("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", "griddepcontrol.wait"),
        num_stages=tile.num_stages,
        label=f"{tile.block_out}x{tile.block_tokens}",
    )


# Each once: how K is split is no matter of compiling.
FP32_TILES = dict.fromkeys(
    replace(tile, split_k=None) for _, tile in (*ROUTER_TILES, *NARROW_TILES) if tile.block_k != tile.split_k
)

KERNELS = (
    *(few_tokens(tile) for _, tile in FEW_TOKENS_TILES),
    *(linear_fp32(tile, is_split=True) for tile in FP32_TILES),
    *(linear_fp32(tile, is_split=False) for _, tile in HEAD_TILES),
)
