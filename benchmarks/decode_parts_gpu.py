"""Kernels of a decode step of one of 16 ranks, each kind by itself in a device graph, and other tiles in place of the
chosen ones.

    PYTHONPATH=. python benchmarks/decode_parts_gpu.py [--tokens 64,128] [WORD ...]
    TRITON_INTERPRET=1 PYTHONPATH=. python benchmarks/decode_parts_gpu.py --device cpu --tokens 2    # tries the script

``benchmarks.gpu`` times calls alone, with an empty cache. In a step a kernel's programs start while the kernel before
ends, and weights have not been read for a whole step: so here calls follow one another in a graph, each with inputs of
its own, and the time is the graph's, by its calls. A candidate must give what the chosen one gives, bit by bit. WORD:
of a part's name. Microseconds; median of 20 replays.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from unittest.mock import patch

import torch

from argosy.cli.code_version import read_version
from argosy.kernels.triton import arrange_rows, quantize, sum_parts, sum_rows, topk, w8a8_few_rows, w8a8_gemm
from argosy.kernels.triton.hopper_tiles import HopperTile
from argosy.kernels.triton.linear_fp32 import multiply_parts
from argosy.kernels.triton.route import route_parts

REPLAYS, WARM_UP = 20, 3
WEIGHT_BYTES = 400e6  # of all inputs of a graph together, so that none is in the cache when it is read again
NUM_RANKS, NUM_EXPERTS, TOP_K, CONTEXT, ROOM, BLOCK_SIZE = 16, 256, 8, 4120, 8192, 64


@dataclass(frozen=True, slots=True)
class Sizes:
    hidden: int = 7168
    width: int = 2048
    index_topk: int = 2048
    linears: tuple[tuple[int, int], ...] = (
        *((16384, 7168), (1536, 24576), (1536, 8192)),
        *((7168, 2240), (7168, 4096), (2048, 7168)),
    )


TRIAL_SIZES = Sizes(hidden=256, width=128, index_topk=64, linears=((256, 384),))


@dataclass(frozen=True, slots=True)
class Part:
    """``calls``: by label, the chosen one first; each is called with the number of its inputs."""

    name: str
    num_inputs: int
    calls: dict[str, Callable[[int], object]]
    settings: dict[str, AbstractContextManager[object]] = field(default_factory=dict)  # under which a label is called


def main() -> int:
    options = parse_options()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("needs an NVIDIA card; --device cpu tries the script", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    torch.set_default_device(options.device)
    if options.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {read_version()}; {sys.argv[1:]}")
    for num_tokens in options.tokens:
        for part in parts(num_tokens, Sizes() if options.device == "cuda" else TRIAL_SIZES):
            if not options.words or any(word in part.name for word in options.words):
                report(num_tokens, part, is_timed=options.device == "cuda")
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tokens", type=lambda text: [int(number) for number in text.split(",")], default="64,128")
    parser.add_argument("words", nargs="*")
    return parser.parse_args()


def report(num_tokens: int, part: Part, *, is_timed: bool) -> None:
    """Raises AssertionError where a candidate gives something else."""
    expected, cells = None, []
    for label, call in part.calls.items():
        with part.settings.get(label, nullcontext()):
            found = call(0)
            expected = found if expected is None else expected
            assert equal(found, expected), f"{part.name}: {label} gives something else"
            cells.append(f"{label} {time_in_graph(call, part.num_inputs):.2f}" if is_timed else label)
    print(f"{num_tokens:4d} tokens, {part.name}: {', '.join(cells)}", flush=True)


def equal(found: object, expected: object) -> bool:
    """NaN, of rows that nobody owns, is equal to anything."""
    if isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor):
        both = (
            ~(found.isnan() | expected.isnan())
            if found.is_floating_point()
            else torch.ones_like(found, dtype=torch.bool)
        )
        return bool((found[both] == expected[both]).all())
    assert isinstance(found, tuple) and isinstance(expected, tuple)
    return all(equal(one, other) for one, other in zip(found, expected, strict=True))


def time_in_graph(call: Callable[[int], object], num_inputs: int) -> float:
    """Microseconds a call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(num_inputs):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(num_inputs):
            call(i)
    times = []
    for _ in range(WARM_UP + REPLAYS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1e3 * start.elapsed_time(stop) / num_inputs)
    return statistics.median(times[WARM_UP:])


def parts(num_tokens: int, sizes: Sizes) -> Iterator[Part]:
    for shape in sizes.linears:
        yield linear(num_tokens, *shape)
    yield from experts(num_tokens, sizes)
    yield from router(num_tokens, sizes)
    yield from exchange(num_tokens, sizes)
    yield choice(num_tokens, sizes)


def draw_int8(*shape: int) -> torch.Tensor:
    return torch.randint(-100, 100, shape, dtype=torch.int8)


def count_inputs(num_bytes: int) -> int:
    return max(6, int(WEIGHT_BYTES / num_bytes)) if torch.get_default_device().type == "cuda" else 1


def linear(num_tokens: int, in_features: int, out_features: int) -> Part:
    weights = [draw_int8(out_features, in_features) for _ in range(count_inputs(in_features * out_features))]
    rows, row_scale, scale = draw_int8(num_tokens, in_features), torch.rand(num_tokens, 1), torch.rand(out_features, 1)
    block = 64 if num_tokens <= 64 else 128
    tiles: dict[str, w8a8_few_rows.SplitTile | None] = {"chosen": None}
    for tile in (
        w8a8_few_rows.SplitTile(block, 64, 256, 4, 4, 2048),
        w8a8_few_rows.SplitTile(block, 64, 128, 8, 4, 2048),
        w8a8_few_rows.SplitTile(block, 128, 128, 6, 4, 2048),
        w8a8_few_rows.SplitTile(block, 64, 128, 192 // (block + 64) + 2, 4, 512, num_resident=3),
    ):
        label = f"{tile.block_n} x {tile.block_k}, {tile.num_stages} stages"
        tiles[label + (f", {tile.num_resident} programs" if tile.num_resident > 1 else "")] = tile

    def call_with(tile: w8a8_few_rows.SplitTile | None) -> Callable[[int], object]:
        return lambda i: w8a8_few_rows.w8a8_few_rows(rows, row_scale, weights[i], scale, torch.bfloat16, tile=tile)

    calls = {label: call_with(tile) for label, tile in tiles.items()}
    return Part(f"linear {in_features} -> {out_features}", len(weights), calls)


def share(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's ids [T, K] and those of the rows that it receives [G * T, K]: its own, shifted by a rank's."""
    ids = torch.rand(num_tokens, NUM_EXPERTS).topk(TOP_K, dim=1)[1].int()
    local = NUM_EXPERTS // NUM_RANKS
    return ids, torch.cat([(ids - local * rank) % NUM_EXPERTS for rank in range(NUM_RANKS)])


def experts(num_tokens: int, sizes: Sizes) -> Iterator[Part]:
    num_local = NUM_EXPERTS // NUM_RANKS
    received = share(num_tokens)[1]
    counts = torch.bincount(received.flatten(), minlength=NUM_EXPERTS)[:num_local].int()
    num_rows = int(counts.sum())
    narrow = [HopperTile(box_n=64, num_stages=6, box_rows=box_rows, walked_tiles=4) for box_rows in (64, 32, 16)]
    tiles: Sequence[HopperTile | None] = (None, HopperTile(walked_tiles=4), *narrow)
    for name, in_features, out_features, is_gated in (
        ("experts, gate and up", sizes.hidden, 2 * sizes.width, True),
        ("experts, down", sizes.width, sizes.hidden, False),
    ):
        num_inputs = count_inputs(num_local * in_features * out_features)
        weights = [draw_int8(num_local, out_features, in_features) for _ in range(num_inputs)]
        inputs = draw_int8(num_rows, in_features), torch.rand(num_rows, 1)
        scale = torch.rand(num_local, out_features, 1) * 1e-4

        def call_with(
            tile: HopperTile | None, inputs=inputs, weights=weights, scale=scale, is_gated=is_gated
        ) -> Callable[[int], object]:
            return lambda i: w8a8_gemm.w8a8_grouped_gemm(
                *inputs, weights[i], scale, counts, torch.float32, is_gated=is_gated, tile=tile
            )

        if torch.get_default_device().type == "cpu":  # a loop for Hopper cards
            tiles = (None,)
        labels = ["chosen" if tile is None else f"{2 * tile.box_n} columns, boxes of {tile.box_rows}" for tile in tiles]
        yield Part(name, num_inputs, {label: call_with(tile) for label, tile in zip(labels, tiles, strict=True)})
    hidden = [torch.randn(num_rows, sizes.width) for _ in range(4)]
    yield Part(
        "quantise hidden rows", 4, {"chosen": lambda i: quantize.quantize_real_rows(hidden[i], counts, num_rows)}
    )


def router(num_tokens: int, sizes: Sizes) -> Iterator[Part]:
    rows = torch.randn(num_tokens, sizes.hidden).bfloat16()
    weights = [
        torch.randn(NUM_EXPERTS, sizes.hidden) * 0.01 for _ in range(count_inputs(4 * NUM_EXPERTS * sizes.hidden))
    ]
    bias = torch.randn(NUM_EXPERTS) * 0.01
    products = [multiply_parts(rows, weight) for weight in weights]
    yield Part("router, product", len(weights), {"chosen": lambda i: multiply_parts(rows, weights[i])})

    def choose(i: int) -> object:
        return route_parts(
            products[i],
            bias,
            n_group=8,
            topk_group=4,
            num_experts_per_tok=TOP_K,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        )

    yield Part("router, choice", len(weights), {"chosen": choose})


def exchange(num_tokens: int, sizes: Sizes) -> Iterator[Part]:
    """What lies between the wire and the experts, there and back."""
    num_local, num_inputs = NUM_EXPERTS // NUM_RANKS, 6
    own, received = share(num_tokens)
    expert_map = torch.full((NUM_EXPERTS + 1,), num_local, dtype=torch.int32)
    expert_map[:num_local] = torch.arange(num_local, dtype=torch.int32)
    owner = torch.arange(NUM_EXPERTS + 1, dtype=torch.int32) // num_local
    messages = [draw_int8(len(received), sizes.hidden) for _ in range(num_inputs)]
    scale = torch.rand(len(received), 1)

    def arrange(i: int) -> tuple[torch.Tensor, ...]:
        return arrange_rows.arrange_scaled(messages[i], scale, received, expert_map, num_local, None)

    yield Part("arrange rows", num_inputs, {"chosen": lambda i: arrange(i)[2:]})
    counts, row_ids = arrange(0)[2:]
    outputs = [torch.randn(int(counts.sum()), sizes.hidden).bfloat16() for _ in range(num_inputs)]
    weights, is_full = torch.rand(received.shape), (row_ids >= 0).any(dim=1)

    def sum_lines(i: int) -> torch.Tensor:
        lines = sum_rows.sum_rows(outputs[i], row_ids, weights, torch.bfloat16, is_sparse=True, skips_empty=True)
        return lines if is_captured() else lines[is_full]

    blocks = {f"{block} numbers, {warps} warps": (block, warps) for block, warps in ((8192, 8), (2048, 4))}
    settings = {
        label: patch.multiple(sum_rows, SPARSE_BLOCK=block, SPARSE_WARPS=warps)
        for label, (block, warps) in blocks.items()
    }
    yield Part("sums of received rows", num_inputs, dict.fromkeys(("chosen", *blocks), sum_lines), settings)
    returned = [torch.randn(NUM_RANKS, num_tokens, sizes.hidden).bfloat16() for _ in range(num_inputs)]
    addend = torch.randn(num_tokens, sizes.hidden).bfloat16()
    yield Part(
        "sums at home",
        num_inputs,
        dict.fromkeys(
            ("chosen", "1024 numbers"), lambda i: sum_parts.sum_visited_parts(returned[i], own, owner, addend)
        ),
        {"1024 numbers": patch.object(sum_parts, "VISITED_BLOCK", 1024)},
    )


def is_captured() -> bool:
    return torch.get_default_device().type == "cuda" and torch.cuda.is_current_stream_capturing()


def choice(num_tokens: int, sizes: Sizes) -> Part:
    """Of a sequence's positions."""
    num_inputs = 6
    scores = [torch.randn(num_tokens, ROOM) for _ in range(num_inputs)]
    visible = torch.full((num_tokens,), CONTEXT, dtype=torch.int32)
    table = torch.randperm(num_tokens * (ROOM // BLOCK_SIZE)).int().view(num_tokens, -1)
    tiles = {"chosen": None} | {f"{warps} warps": topk.Tile(warps) for warps in (4, 8, 16)}

    def call_with(tile: topk.Tile | None) -> Callable[[int], object]:
        return lambda i: topk.select_topk_slots(scores[i], visible, sizes.index_topk, table, BLOCK_SIZE, tile=tile)

    calls = {label: call_with(tile) for label, tile in tiles.items()}
    return Part(f"best {sizes.index_topk} of {CONTEXT}", num_inputs, calls)


if __name__ == "__main__":
    sys.exit(main())
