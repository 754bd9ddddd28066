"""INT8 x INT8 products at DeepSeek-V3.2's sizes; "tile" cases are the candidates for the tables of the two kernels.

    python -m benchmarks.gpu w8a8                 # all
    python -m benchmarks.gpu "w8a8 tile"          # the candidates alone
    python -m benchmarks.gpu "w8a8 tile hopper"   # those of many rows

Few rows are timed as a replayed device graph, as decoding runs them: from Python a launch takes longer than they do.
Random routing with a spread such that the busiest of 256 experts gets about twice the mean at 4,096 tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

from argosy.kernels import device_w8a8, reference_w8a8
from argosy.kernels.triton.hopper_tiles import HopperTile
from argosy.kernels.triton.quantize import quantize_per_token
from argosy.kernels.triton.w8a8 import linear_w8a8, linear_w8a8_quantized
from argosy.kernels.triton.w8a8_few_rows import NARROW_TILES, NarrowTile, SplitTile, w8a8_few_rows
from argosy.kernels.triton.w8a8_gemm import (
    GATED_TILES,
    GATED_WIDE_TILE,
    PLAIN_TILES,
    PLAIN_WIDE_TILE,
    Tile,
    choose_tile,
    w8a8_grouped_gemm,
)
from benchmarks.gpu.measure import Case, relative_error

HIDDEN_SIZE, EXPERT_WIDTH, NUM_EXPERTS, TOP_K = 7168, 2048, 256, 8
ROUTING_SPREAD = 0.33
# (in, out)
LINEARS = (
    *((7168, 2240), (7168, 4096), (7168, 36864), (1536, 8192), (1536, 24576)),
    *((2048, 7168), (16384, 7168), (18432, 7168)),
)
NUMS_FEW_ROWS = (1, 16, 64, 128)
MANY_ROWS, MANY_ROWS_LINEARS = 4096, ((7168, 4096), (1536, 24576), (16384, 7168))
TOKENS = (1, 16, 64, 128, 256, 2048, 4096, 8192)
PREFILLED_EXPERTS, PREFILLED_ROWS = 16, 2048
MAX_ERROR = 4e-3  # of bfloat16 results: norm of the difference over the norm; silu has last bits of its own
NUM_SPECIFIED_ROWS = 2  # compared with the specification itself, which is slow; all are compared with its fast twin

Result = TypeVar("Result")

# The candidates. At most a handful each: they are compared in one run on a card, and the best goes into the tables.
FEW_ROWS_LINEARS = ((7168, 2240), (1536, 8192), (7168, 4096), (2048, 7168), (16384, 7168), (1536, 24576))
WHOLE = 2**20  # no K is longer: a split tile that walks all of it
FEW_ROWS_TILES = {
    1: (
        *NARROW_TILES,
        *(replace(tile, block_rows=8) for tile in NARROW_TILES),
        NarrowTile(16, 1024, 5, 4, 8),
        NarrowTile(32, 512, 4, 4, 8),
        SplitTile(16, 64, 256, 6, 4, 512),
        SplitTile(16, 64, 256, 6, 4, WHOLE),
        SplitTile(16, 64, 512, 5, 4, WHOLE),
    ),
    16: (
        *NARROW_TILES,
        NarrowTile(64, 512, 4, 8),
        NarrowTile(16, 512, 5, 4),
        NarrowTile(16, 512, 8, 8),
        SplitTile(16, 64, 256, 6, 4, 512),
        SplitTile(16, 64, 256, 6, 4, WHOLE),
        SplitTile(16, 64, 512, 5, 4, WHOLE),
        SplitTile(16, 128, 256, 5, 4, 1024),
    ),
    32: (SplitTile(32, 64, 256, 8, 4, 512), SplitTile(32, 128, 256, 5, 4, 1024), NarrowTile(32, 512, 6, 4, 32)),
    64: (
        SplitTile(64, 128, 128, 6, 4, 512),
        SplitTile(64, 128, 128, 6, 4, 2048),
        SplitTile(64, 128, 128, 4, 4, 512, num_resident=2),
        SplitTile(64, 64, 128, 4, 4, 512, num_resident=3),
        SplitTile(64, 256, 128, 5, 8, 512),
        SplitTile(64, 256, 64, 5, 8, 512, num_resident=2),
    ),
    128: (
        SplitTile(128, 128, 128, 6, 8, 1024),
        SplitTile(128, 128, 128, 3, 8, 512, num_resident=2),
        SplitTile(128, 128, 64, 6, 8, 512, num_resident=2),
        SplitTile(128, 256, 128, 4, 8, 1024),
        SplitTile(128, 64, 128, 8, 4, 2048),
        SplitTile(128, 64, 128, 4, 4, 512, num_resident=2),
        SplitTile(128, 64, 128, 3, 4, 512, num_resident=3),
    ),
    256: (SplitTile(256, 128, 128, 4, 8, 2048), SplitTile(256, 64, 128, 4, 8, 2048)),
}
# One program a multiprocessor, or two, that go from tile to tile; flat ones load the next tile's first blocks before
# this one's results are written.
PERSISTENT_ROWS = (1, 16)
PERSISTENT_TILES = (
    Tile(16, 64, 256, 6, 4, True, num_resident=2),
    Tile(16, 64, 256, 6, 4, True, num_resident=2, is_flat=True),
    Tile(16, 64, 512, 5, 4, True, is_flat=True),
    Tile(16, 128, 256, 5, 4, True, is_flat=True),
)
PLAIN_DECODE_TILES = (PLAIN_TILES[0], Tile(16, 128, 256, 6, 4, True), Tile(16, 128, 512, 3, 4, True))
GATED_DECODE_TILES = (GATED_TILES[0], Tile(16, 64, 256, 6, 4, True), Tile(16, 64, 512, 3, 4, True))
# Predictions for an H200, TOP/s of gate and up with down, from a simulation of multiprocessors, memory and its cache
# (20 to 30 MB of it) that gave 693 to 710 and 830 to 912 without a queue where 685 and 800 were measured: with one
# 960 to 985 at 4,096 tokens and 1,360 at 8,192 if the clock held; 900 and 1,150 are expected.
QUEUE_TILES = (HopperTile(), HopperTile(has_queue=False))
# Shares of the chosen tile's speed, from a simulation of the ring: without a lead 0.99 at K 7168 and 0.97 at K 1536
# (both groups write at once); with 2 blocks 0.97 to 1.01 (fewer buffers hide the copies); half blocks of K 0.95 to 1.03
# (a finer lead, twice as many waits).
HOPPER_TILES = (
    HopperTile(),
    HopperTile(lead=0),
    HopperTile(lead=2),
    HopperTile(block_k=64, num_stages=8, lead=3),
    HopperTile(walked_tiles=4),
    HopperTile(walked_tiles=16),
)


def cases() -> Iterator[Case]:
    for sizes in LINEARS:
        for rows in NUMS_FEW_ROWS:
            yield build_few_rows(draw_linear(rows, *sizes), None)
        yield build_quantising(sizes)
    for sizes in MANY_ROWS_LINEARS:
        yield build_experts(draw_experts(torch.tensor([MANY_ROWS]), *sizes), f"linear {sizes[0]} -> {sizes[1]}", None)
    for name, counts in (fill_evenly(), *(route(num_tokens) for num_tokens in TOKENS)):
        yield from build_mlp(name, counts, (None,), (None,))
    for rows in (1, 128, 4096):
        yield build_quantise(rows)
    yield from candidates()


def candidates() -> Iterator[Case]:
    for rows, tiles in FEW_ROWS_TILES.items():
        for sizes in FEW_ROWS_LINEARS:
            problem = draw_linear(rows, *sizes)
            for tile in tiles:
                yield build_few_rows(problem, tile)
            if rows in PERSISTENT_ROWS:
                for persistent in PERSISTENT_TILES:
                    yield build_few_rows(problem, persistent)
    for sizes in MANY_ROWS_LINEARS:
        dense = draw_experts(torch.tensor([MANY_ROWS]), *sizes)
        for tile in (*HOPPER_TILES, PLAIN_WIDE_TILE):
            yield build_experts(dense, f"{sizes[0]} -> {sizes[1]}", tile)
    for name, counts in (fill_evenly(), route(8192)):
        others = HOPPER_TILES[1:]
        gated, plain = (*QUEUE_TILES, *others, GATED_WIDE_TILE), (*QUEUE_TILES, *others, PLAIN_WIDE_TILE)
        yield from build_mlp(name, counts, gated, plain)
    for num_tokens in (2048, 4096):
        mean_rows = num_tokens * TOP_K // NUM_EXPERTS
        portable = (choose_tile(mean_rows, 1, is_gated) for is_gated in (True, False))
        yield from build_mlp(*route(num_tokens), *((*QUEUE_TILES, tile) for tile in portable))
    for num_tokens in (64, 128):
        yield from build_mlp(*route(num_tokens), GATED_DECODE_TILES, PLAIN_DECODE_TILES)


@dataclass(frozen=True)
class Linear:
    """Quantised rows and one weight."""

    x: torch.Tensor
    x_scale: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor


@dataclass(frozen=True)
class Experts:
    """Quantised rows sorted by expert, and a weight for each; one expert is a dense linear."""

    x: torch.Tensor
    x_scale: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    counts: torch.Tensor  # on the host
    device_counts: torch.Tensor | None
    is_gated: bool


class Replayed(Generic[Result]):
    """Runs a function as a device graph, which the first call captures; results are written over by the next call."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self.function = function
        self.captured: tuple[torch.cuda.CUDAGraph, Result] | None = None

    def __call__(self) -> Result:
        if self.captured is None:
            self.function()  # compiles
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self.function()
            self.captured = graph, out
        graph, out = self.captured
        graph.replay()
        return out


def describe_tile(tile: Tile | HopperTile | NarrowTile | SplitTile) -> str:
    if isinstance(tile, HopperTile):
        shape = f"128x{2 * tile.box_n}x{tile.block_k} s{tile.num_stages} l{tile.lead} g{tile.walked_tiles}"
        return f"tile hopper {shape}{'' if tile.has_queue else ' no queue'}"
    kind = {Tile: "", NarrowTile: " narrow", SplitTile: " split"}[type(tile)]
    shape = f"{tile.block_rows}x{tile.block_n}x{tile.block_k} s{tile.num_stages} w{tile.num_warps}"
    if isinstance(tile, SplitTile):
        residents = f" x{tile.num_resident}" if tile.num_resident > 1 else ""
        return f"tile{kind} {shape} {'whole' if tile.min_split == WHOLE else f'k{tile.min_split}'}{residents}"
    if isinstance(tile, NarrowTile):
        return f"tile{kind} {shape}"
    tail, flat = f" tail{tile.tail_rows}" if tile.tail_rows else "", " flat" if tile.is_flat else ""
    return f"tile {shape}{tail}{flat}{' twice' if tile.num_resident == 2 else ''}"


def draw_linear(rows: int, in_features: int, out_features: int) -> Linear:
    experts = draw_experts(torch.tensor([rows]), in_features, out_features)
    return Linear(experts.x, experts.x_scale, experts.weight[0], experts.weight_scale[0])


def draw_experts(counts: torch.Tensor, in_features: int, out_features: int, *, is_gated: bool = False) -> Experts:
    rows, num_experts = int(counts.sum()), len(counts)
    return Experts(
        torch.randint(-127, 128, (rows, in_features), dtype=torch.int8, device="cuda"),
        torch.rand(rows, 1, device="cuda") * 1e-2 + 1e-3,
        torch.randint(-127, 128, (num_experts, out_features, in_features), dtype=torch.int8, device="cuda"),
        torch.rand(num_experts, out_features, 1, device="cuda") * 1e-3 + 1e-5,
        counts,
        None if num_experts == 1 else counts.to("cuda", torch.int32),
        is_gated,
    )


def fill_evenly() -> tuple[str, torch.Tensor]:
    """A name, and how many rows each expert gets."""
    return f"{PREFILLED_EXPERTS} x {PREFILLED_ROWS:,}", torch.full((PREFILLED_EXPERTS,), PREFILLED_ROWS)


def route(num_tokens: int) -> tuple[str, torch.Tensor]:
    """As ``fill_evenly``, by random routing."""
    logits = torch.randn(NUM_EXPERTS) * ROUTING_SPREAD
    noise = -torch.log(-torch.log(torch.rand(num_tokens, NUM_EXPERTS)))
    counts = torch.bincount((logits + noise).topk(TOP_K, dim=1)[1].flatten(), minlength=NUM_EXPERTS)
    return f"{NUM_EXPERTS}, {num_tokens} tokens", counts


def build_few_rows(linear: Linear, tile: NarrowTile | SplitTile | Tile | None) -> Case:
    """``tile``: None takes what the kernels choose; a ``Tile`` is the persistent kernel's, for one expert."""
    inputs = linear.x, linear.x_scale, linear.weight, linear.weight_scale, torch.bfloat16
    (rows, in_features), out_features = linear.x.shape, len(linear.weight)

    def multiply() -> torch.Tensor:
        if tile is None:
            return linear_w8a8_quantized(*inputs)
        if isinstance(tile, Tile):
            stack = linear.weight.unsqueeze(0), linear.weight_scale.unsqueeze(0)
            return w8a8_grouped_gemm(linear.x, linear.x_scale, *stack, None, torch.bfloat16, tile=tile)
        return w8a8_few_rows(*inputs, tile=tile)

    run = Replayed(multiply)

    def check() -> None:
        out = run()
        few = (part[:NUM_SPECIFIED_ROWS] for part in inputs[:2])
        assert torch.equal(out[:NUM_SPECIFIED_ROWS], reference_w8a8.linear_w8a8_quantized(*few, *inputs[2:]))
        assert torch.equal(out, device_w8a8.linear_w8a8_quantized(*inputs))

    shape = f"{in_features} -> {out_features}"
    return Case(
        name=f"{describe_tile(tile)} {shape}" if tile else f"linear {shape}",
        rows=rows,
        run=run,
        check=check,
        num_ops=2 * rows * out_features * in_features,
        num_bytes=count_bytes(rows, in_features, out_features, out_features, 1),
        unit="int8",
        alternatives={} if tile else {"torch": Replayed(lambda: device_w8a8.linear_w8a8_quantized(*inputs))},
    )


def build_quantising(sizes: tuple[int, int]) -> Case:
    """The whole of a linear, from bf16 rows to bf16 rows."""
    rows, (in_features, out_features) = 16, sizes
    linear = draw_linear(rows, *sizes)
    x = torch.randn(rows, in_features, device="cuda", dtype=torch.bfloat16)
    inputs = x, linear.weight, linear.weight_scale
    run = Replayed(lambda: linear_w8a8(*inputs))

    def check() -> None:
        assert torch.equal(run(), device_w8a8.linear_w8a8(*inputs))

    return Case(
        name=f"linear from bf16 {in_features} -> {out_features}",
        rows=rows,
        run=run,
        check=check,
        num_ops=2 * rows * out_features * in_features,
        num_bytes=count_bytes(rows, in_features, out_features, out_features, 1) + rows * in_features,
        unit="int8",
        alternatives={"torch": Replayed(lambda: device_w8a8.linear_w8a8(*inputs))},
    )


def build_mlp(
    name: str,
    counts: torch.Tensor,
    gated_tiles: tuple[Tile | HopperTile | None, ...],
    plain_tiles: tuple[Tile | HopperTile | None, ...],
) -> Iterator[Case]:
    """One case a tile; the inputs of both halves are not held at once."""
    experts = draw_experts(counts, HIDDEN_SIZE, 2 * EXPERT_WIDTH, is_gated=True)
    for tile in gated_tiles:
        yield build_experts(experts, f"gate, up, silu {name}", tile)
    experts = draw_experts(counts, EXPERT_WIDTH, HIDDEN_SIZE)
    for tile in plain_tiles:
        yield build_experts(experts, f"down {name}", tile)


def build_experts(experts: Experts, name: str, tile: Tile | HopperTile | None) -> Case:
    (rows, in_features), out_features = experts.x.shape, experts.weight.shape[1]
    portable_tile = choose_tile(rows, len(experts.weight), experts.is_gated)

    def run(tile: Tile | HopperTile | None = tile) -> torch.Tensor:
        return w8a8_grouped_gemm(
            experts.x,
            experts.x_scale,
            experts.weight,
            experts.weight_scale,
            experts.device_counts,
            torch.bfloat16,
            is_gated=experts.is_gated,
            tile=tile,
        )

    def check() -> None:
        error = relative_error(run(), compute_by_torch(experts))
        assert error <= MAX_ERROR, f"relative error {error:.2e}"

    num_columns = out_features // 2 if experts.is_gated else out_features
    return Case(
        name=f"{describe_tile(tile)} {name}" if tile else name,
        rows=rows,
        run=run,
        check=check,
        num_ops=2 * rows * out_features * in_features,
        num_bytes=count_bytes(rows, in_features, out_features, num_columns, int((experts.counts > 0).sum())),
        unit="int8",
        alternatives={}
        if tile
        else {"Triton's loop": lambda: run(portable_tile), "torch, one by one": lambda: compute_by_torch(experts)},
    )


def build_quantise(rows: int) -> Case:
    x = torch.randn(rows, HIDDEN_SIZE, device="cuda", dtype=torch.bfloat16)
    run = Replayed(lambda: quantize_per_token(x))

    def check() -> None:
        expected = reference_w8a8.quantize_per_token(x)
        assert all(torch.equal(out, part) for out, part in zip(run(), expected, strict=True))

    return Case(
        name=f"quantise bf16 rows of {HIDDEN_SIZE}",
        rows=rows,
        run=run,
        check=check,
        num_ops=0,
        num_bytes=3 * x.numel(),
        alternatives={"torch": Replayed(lambda: reference_w8a8.quantize_per_token(x))},
    )


def count_bytes(rows: int, in_features: int, out_features: int, num_columns: int, num_experts: int) -> int:
    return num_experts * out_features * (in_features + 4) + rows * (in_features + 4 + 2 * num_columns)


def compute_by_torch(experts: Experts) -> torch.Tensor:
    """One ``torch._int_mm`` an expert, bfloat16."""
    parts, counts = [], experts.counts.tolist()
    groups = zip(experts.x.split(counts), experts.x_scale.split(counts), strict=True)
    for expert, (rows, scale) in enumerate(groups):
        if not len(rows):
            continue
        product = device_w8a8.linear_w8a8_quantized(
            rows, scale, experts.weight[expert], experts.weight_scale[expert], torch.float32
        )
        if experts.is_gated:
            gate, up = product.chunk(2, dim=1)
            product = torch.nn.functional.silu(gate) * up
        parts.append(product.bfloat16())
    return torch.cat(parts)
