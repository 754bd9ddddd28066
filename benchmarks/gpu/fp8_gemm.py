"""FP8-block products at DeepSeek-V3.2's sizes: dense linears and experts, with their inputs already quantised.

    python -m benchmarks.gpu fp8_gemm      # all
    python -m benchmarks.gpu "fp8 tile"    # the candidates for the tables of the two kernels

Routing is random with a spread such that the busiest of 256 experts gets about twice the mean at 4,096 tokens. Checked
against the specification's sums, expert by expert. Invariant: counts, where an alternative reads them, lie on the host.
"""

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import ScalingType, scaled_mm

from argosy.kernels.reference import silu_mul
from argosy.kernels.reference_fp8 import BLOCK_SIZE
from argosy.kernels.reference_fp8 import quantize_groups as quantize_groups_plain
from argosy.kernels.triton.fp8_gemm import (
    GATED_TILES,
    PLAIN_TILES,
    PLAIN_WIDE_TILE,
    Tile,
    choose_tile,
    fp8_grouped_gate_up,
    fp8_grouped_gemm,
)
from argosy.kernels.triton.fp8_hopper import Fp8HopperTile
from argosy.kernels.triton.quantize_groups import quantize_groups
from benchmarks.gpu.measure import Case, relative_error

HIDDEN_SIZE, EXPERT_WIDTH, NUM_EXPERTS, TOP_K = 7168, 2048, 256, 8
ROUTING_SPREAD = 0.33
LINEARS = ((7168, 4096), (7168, 576), (1536, 24576), (16384, 7168))  # (in, out)
MAX_ERROR = 4e-3  # of bfloat16 results
MAX_HIDDEN_ERROR = 8e-3  # of e4m3 ones: a last bit of bfloat16 now and then moves one by a step
CHECKED_EXPERTS = 4  # the busiest: all would take longer than the measurement

# The candidates.
MANY_ROWS, MANY_ROWS_LINEARS = 4096, ((7168, 4096), (1536, 24576), (16384, 7168))
DENSE_TILES = (
    *(Fp8HopperTile(walked_tiles=4, num_unrolled=count) for count in (1, 2, 4)),
    *(Fp8HopperTile(walked_tiles=4, lead=lead) for lead in (0, 2)),
    Fp8HopperTile(),
    PLAIN_WIDE_TILE,
)
FEW_ROWS_LINEARS = ((7168, 4096), (1536, 8192), (1536, 24576), (16384, 7168))
FEW_ROWS_TILES = {
    1: (PLAIN_TILES[0], Tile(16, 128, 11, 4, True, False, 1), Tile(16, 64, 7, 4, True, False, 3)),
    16: (PLAIN_TILES[0], Tile(16, 128, 11, 4, True, False, 1), Tile(16, 64, 7, 4, True, False, 3)),
    64: (PLAIN_TILES[2], Tile(64, 128, 4, 4, True, False, 2), Tile(64, 64, 5, 4, True, False, 3)),
    128: (PLAIN_WIDE_TILE, Tile(128, 128, 6, 8, False, False, 1, 4), Tile(128, 128, 4, 8, True, False, 1)),
}
QUEUE_TILES = (
    *(Fp8HopperTile(num_unrolled=count) for count in (1, 2, 4)),
    Fp8HopperTile(walked_tiles=4),
    Fp8HopperTile(has_queue=False),
)
GATED_DECODE_TILES = (
    GATED_TILES[0],
    Tile(16, 128, 3, 4, True, True, 2),
    Tile(16, 128, 6, 8, True, True, 1),
)
PLAIN_DECODE_TILES = (
    PLAIN_TILES[0],
    Tile(16, 128, 11, 4, True, False, 1),
    Tile(16, 128, 3, 4, True, False, 3),
)


def cases() -> Iterator[Case]:
    for in_features, out_features in LINEARS:
        for rows in (1, 16, 64, 128, 4096):
            yield linear(rows, in_features, out_features)
    for name, counts in routings():
        yield gate_up(name, counts)
        yield down(name, counts)
    for rows in (1, 128, 4096, 65536):
        yield quantizing(rows)
    yield from candidates()


def candidates() -> Iterator[Case]:
    for sizes in MANY_ROWS_LINEARS:
        for tile in DENSE_TILES:
            yield linear(MANY_ROWS, *sizes, tile)
    for rows, tiles in FEW_ROWS_TILES.items():
        for sizes in FEW_ROWS_LINEARS:
            for few_rows_tile in tiles:
                yield linear(rows, *sizes, few_rows_tile)
    for name, counts in routings():
        num_rows = int(counts.sum())
        if num_rows > 32 * len(counts):
            portable = (choose_tile(num_rows, len(counts), is_gated) for is_gated in (True, False))
            gated, plain = ((*QUEUE_TILES, tile) for tile in portable)
        elif num_rows > len(counts):
            gated, plain = GATED_DECODE_TILES, PLAIN_DECODE_TILES
        else:
            continue
        for tile in gated:
            yield gate_up(name, counts, tile)
        for tile in plain:
            yield down(name, counts, tile)


def routings() -> Iterator[tuple[str, torch.Tensor]]:
    """How many rows each expert gets."""
    yield "16 x 2,048", torch.full((16,), 2048)
    for tokens in (1, 16, 64, 128, 256, 2048, 4096, 8192):
        yield f"256, {tokens} tokens", draw_routing(tokens)


def describe_tile(tile: Tile | Fp8HopperTile | None) -> str:
    if tile is None:
        return ""
    if isinstance(tile, Fp8HopperTile):
        queue = "" if tile.has_queue else " no queue"
        return f"tile hopper s{tile.num_stages} l{tile.lead} g{tile.walked_tiles} u{tile.num_unrolled}{queue} "
    columns = f"2x{tile.block_n}" if tile.is_halved else f"{tile.block_n}"
    return f"tile {tile.block_rows}x{columns} s{tile.num_stages} w{tile.num_warps} p{tile.num_programs} "


def draw_routing(num_tokens: int) -> torch.Tensor:
    logits = torch.randn(NUM_EXPERTS) * ROUTING_SPREAD
    noise = -torch.log(-torch.log(torch.rand(num_tokens, NUM_EXPERTS)))
    return torch.bincount((logits + noise).topk(TOP_K, dim=1)[1].flatten(), minlength=NUM_EXPERTS)


def linear(rows: int, in_features: int, out_features: int, tile: Tile | Fp8HopperTile | None = None) -> Case:
    x, x_scale = draw_rows(rows, in_features)
    weight, scale = draw_weight(1, out_features, in_features)

    def run() -> torch.Tensor:
        return fp8_grouped_gemm(x, x_scale, weight, scale, None, torch.bfloat16, tile=tile)

    def check() -> None:
        require(relative_error(run(), multiply(x, x_scale, weight[0], scale[0])), MAX_ERROR)

    spare = -rows % 4  # cuBLAS reads the scales of four tokens at once
    padded = torch.nn.functional.pad(x.view(torch.uint8), (0, 0, 0, spare)).view(torch.float8_e4m3fn)
    padded_scale = torch.nn.functional.pad(x_scale, (0, 0, 0, spare)).t().contiguous().t()
    return Case(
        name=f"fp8 {describe_tile(tile) or 'linear '}{in_features} -> {out_features}",
        rows=rows,
        run=run,
        check=check,
        num_ops=2.0 * rows * in_features * out_features,
        num_bytes=weight.numel() + rows * (in_features + 2 * out_features),
        unit="fp8",
        alternatives={}
        if tile
        else {"scaled_mm": lambda: multiply_by_cublas(padded, padded_scale, weight[0], scale[0])},
    )


def gate_up(name: str, counts: torch.Tensor, tile: Tile | Fp8HopperTile | None = None) -> Case:
    x, x_scale = draw_rows(int(counts.sum()), HIDDEN_SIZE)
    weight, scale = draw_weight(len(counts), 2 * EXPERT_WIDTH, HIDDEN_SIZE)
    device_counts = counts.to("cuda", torch.int32)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        inputs = x, x_scale, weight, scale, device_counts, torch.bfloat16
        return fp8_grouped_gate_up(*inputs, has_ue8m0_scales=True, tile=tile)

    def finish(rows: torch.Tensor) -> torch.Tensor:
        return dequantize(*quantize_groups_plain(silu_mul(rows.bfloat16()), has_ue8m0_scales=True))

    def check() -> None:
        out = dequantize(*run())
        for expert, rows in busiest(counts):
            expected = finish(multiply(x[rows], x_scale[rows], weight[expert], scale[expert]))
            require(relative_error(out[rows], expected), MAX_HIDDEN_ERROR)

    return experts_case(
        f"fp8 {describe_tile(tile)}gate, up, silu, e4m3 {name}",
        counts,
        weight,
        (2 * HIDDEN_SIZE + EXPERT_WIDTH),
        run,
        check,
    )


def down(name: str, counts: torch.Tensor, tile: Tile | Fp8HopperTile | None = None) -> Case:
    x, x_scale = draw_rows(int(counts.sum()), EXPERT_WIDTH)
    weight, scale = draw_weight(len(counts), HIDDEN_SIZE, EXPERT_WIDTH)
    device_counts = counts.to("cuda", torch.int32)

    def run() -> torch.Tensor:
        return fp8_grouped_gemm(x, x_scale, weight, scale, device_counts, torch.bfloat16, tile=tile)

    def check() -> None:
        out = run()
        for expert, rows in busiest(counts):
            expected = multiply(x[rows], x_scale[rows], weight[expert], scale[expert])
            require(relative_error(out[rows], expected), MAX_ERROR)

    return experts_case(
        f"fp8 {describe_tile(tile)}down {name}", counts, weight, EXPERT_WIDTH + 2 * HIDDEN_SIZE, run, check
    )


def experts_case(
    name: str,
    counts: torch.Tensor,
    weight: torch.Tensor,
    row_bytes: int,
    run: Callable[[], object],
    check: Callable[[], None],
) -> Case:
    rows, expert_bytes = int(counts.sum()), weight[0].numel()
    return Case(
        name=name,
        rows=rows,
        run=run,
        check=check,
        num_ops=2.0 * rows * expert_bytes,
        num_bytes=int((counts > 0).sum()) * expert_bytes + rows * row_bytes,
        unit="fp8",
    )


def quantizing(rows: int) -> Case:
    x = torch.randn(rows, HIDDEN_SIZE, device="cuda", dtype=torch.bfloat16)

    def check() -> None:
        actual, expected = quantize_groups(x[:256]), quantize_groups_plain(x[:256], has_ue8m0_scales=False)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(actual, expected, strict=True))

    return Case(
        name="fp8 quantise bf16 rows of 7168",
        rows=rows,
        run=lambda: quantize_groups(x),
        check=check,
        num_ops=0,
        num_bytes=3 * x.numel() + x.numel() // 32,
        alternatives={"torch": lambda: quantize_groups_plain(x, has_ue8m0_scales=False)},
    )


def draw_rows(rows: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_groups(torch.randn(rows, size, device="cuda", dtype=torch.bfloat16))


def draw_weight(num_experts: int, out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal numbers in e4m3, from one expert's for all; a float32 copy of all would not fit."""
    one = (torch.randn(out_features, in_features, device="cuda") * 100).clamp_(-448, 448).to(torch.float8_e4m3fn)
    blocks = -(-out_features // BLOCK_SIZE), in_features // BLOCK_SIZE
    scale = torch.rand(num_experts, *blocks, device="cuda") * 1e-4 + 1e-5
    return one.unsqueeze(0).repeat(num_experts, 1, 1), scale


def multiply(x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``reference_fp8.linear_fp8`` of numbers that are quantised already."""
    row_scale = scale.repeat_interleave(BLOCK_SIZE, dim=0)[: weight.shape[0]]
    out = torch.zeros(x.shape[0], weight.shape[0], device="cuda")
    for block, (part, weights) in enumerate(
        zip(x.split(BLOCK_SIZE, dim=1), weight.split(BLOCK_SIZE, dim=1), strict=True)
    ):
        out += (part.float() @ weights.float().t()) * x_scale[:, block : block + 1] * row_scale[:, block]
    return out


def multiply_by_cublas(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    return scaled_mm(
        x,
        weight.t(),
        x_scale,
        ScalingType.BlockWise1x128,
        scale.t(),
        ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


def dequantize(quantized: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return quantized.float() * scale.repeat_interleave(BLOCK_SIZE, dim=1)


def busiest(counts: torch.Tensor) -> list[tuple[int, slice]]:
    ends = counts.cumsum(0).tolist()
    experts = counts.topk(CHECKED_EXPERTS)[1].tolist()
    return [(expert, slice(ends[expert] - int(counts[expert]), ends[expert])) for expert in experts]


def require(error: float, bound: float) -> None:
    if not error <= bound:
        raise RuntimeError(f"relative error {error:.2e} is above {bound:.0e}, no time is printed")
