"""INT8 products of one of 16 ranks in a decode step of 64 and of 128 tokens each: candidates for the tables.

    python -m benchmarks.gpu w8a8_share

Invariant: experts get what even routing gives a rank's sixteen.
"""

from collections.abc import Iterator

import torch

from argosy.kernels.triton.hopper_tiles import HopperTile
from argosy.kernels.triton.w8a8_gemm import Tile
from benchmarks.gpu.measure import Case
from benchmarks.gpu.w8a8 import (
    FEW_ROWS_LINEARS,
    FEW_ROWS_TILES,
    NUM_EXPERTS,
    TOP_K,
    build_few_rows,
    build_mlp,
    draw_linear,
)

# By tokens of each rank, of gate and up, and of down. Beside weights a program reads its rows again for each of its
# tiles, from the card's cache: tiles wide in weights, and short ones for experts of few rows, spare that.
SHARED_EXPERTS, NUM_SHARES = 16, 16
SHARE_TILES: dict[int, tuple[tuple[Tile | HopperTile, ...], tuple[Tile | HopperTile, ...]]] = {
    64: (
        (
            Tile(64, 64, 128, 5, 4, True),
            Tile(64, 64, 128, 5, 4, True, tail_rows=32),
            Tile(64, 64, 128, 4, 4, True, num_resident=2),
            Tile(64, 128, 128, 5, 8, True),
            Tile(64, 128, 128, 5, 8, True, tail_rows=32),
            HopperTile(),
            HopperTile(has_queue=False),
        ),
        (
            Tile(64, 128, 128, 6, 4, True),
            Tile(64, 128, 128, 6, 4, True, tail_rows=32),
            Tile(64, 128, 128, 4, 4, True, num_resident=2),
            Tile(64, 256, 128, 5, 8, True),
            Tile(64, 256, 128, 5, 8, True, tail_rows=32),
            HopperTile(walked_tiles=4),
            HopperTile(has_queue=False),
        ),
    ),
    128: (
        (
            Tile(128, 64, 128, 6, 8, True, tail_rows=64),
            Tile(64, 128, 128, 5, 8, True),
            HopperTile(),
            HopperTile(has_queue=False),
        ),
        (
            Tile(128, 128, 128, 6, 8, True, tail_rows=64),
            Tile(64, 256, 128, 5, 8, True),
            HopperTile(walked_tiles=4),
            HopperTile(has_queue=False),
        ),
    ),
}


def cases() -> Iterator[Case]:
    for num_tokens, tiles in SHARE_TILES.items():
        yield from build_mlp(*route_to_a_share(num_tokens), *tiles)
    for num_tokens in SHARE_TILES:
        for sizes in FEW_ROWS_LINEARS:
            problem = draw_linear(num_tokens, *sizes)
            for tile in (None, *FEW_ROWS_TILES[num_tokens]):
                yield build_few_rows(problem, tile)


def route_to_a_share(num_tokens: int) -> tuple[str, torch.Tensor]:
    """A name, and what one rank's experts get when each of all ranks brings so many tokens."""
    chosen = torch.rand(NUM_SHARES * num_tokens, NUM_EXPERTS).topk(TOP_K, dim=1)[1].flatten()
    counts = torch.bincount(chosen, minlength=NUM_EXPERTS)[:SHARED_EXPERTS]
    return f"of a share, {num_tokens} tokens", counts
