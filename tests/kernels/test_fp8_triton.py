"""FP8 blocks on the tensor cores against their specification: numbers and scales bit by bit, sums within their order.

On a Hopper card, or without one in Triton's interpreter, at small sizes:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_fp8_triton.py
"""

import os
from types import ModuleType

import pytest
import torch

from argosy.kernels import reference_fp8
from argosy.kernels.reference import silu_mul
from tests.helpers.gluon_interpreter import load_interpreted
from tests.helpers.quantized_twin import quantize_blocks

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
HOPPER_MODULES = tuple(f"argosy.kernels.triton.{name}" for name in ("fp8_hopper", "hopper_tiles", "fp8_hopper_results"))
# The interpreter cuts bfloat16 where a card rounds.
DTYPES = (torch.float32,) if IS_INTERPRETED else (torch.float32, torch.bfloat16)
# (in, out) of linears: DeepSeek's on a card; here such that tiles end inside a row, a column and a block of both.
SIZES = (
    ((304, 144), (1040, 48))
    if IS_INTERPRETED
    else ((7168, 4096), (1536, 24576), (16384, 7168), (7168, 576), (7168, 128))
)
NUMS_ROWS = (0, 1, 40, 70) if IS_INTERPRETED else (0, 1, 7, 33, 64, 128, 200, 4096)
# Of a card's sums within 128 products; see ``docs/numerics.md``.
MAX_ERROR = {torch.float32: 1e-5 if IS_INTERPRETED else 1e-3, torch.bfloat16: 4e-3}

pytestmark = pytest.mark.skipif(
    not IS_INTERPRETED and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)),
    reason="needs a Hopper card, or TRITON_INTERPRET=1",
)


@pytest.fixture
def fused() -> ModuleType:
    pytest.importorskip("triton")
    from argosy.kernels.triton import fp8

    return fp8


@pytest.fixture
def gemm() -> ModuleType:
    pytest.importorskip("triton")
    from argosy.kernels.triton import fp8_gemm

    return fp8_gemm


def draw(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 matrices [..., N, K] and scales that differ between blocks."""
    padded = torch.randn(*shape[:-1], -(-shape[-1] // 128) * 128, device=DEVICE)
    weight, scale = quantize_blocks(padded)
    return weight[..., : shape[-1]].contiguous(), scale * (0.5 + torch.rand(scale.shape, device=DEVICE))


def draw_rows(num_rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Groups of different magnitudes."""
    magnitude = 10 ** torch.randn(num_rows, -(-size // 128), device=DEVICE).clamp(-1, 1)
    return (torch.randn(num_rows, size, device=DEVICE) * magnitude.repeat_interleave(128, dim=1)[:, :size]).to(dtype)


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert out.shape == expected.shape and out.dtype == expected.dtype
    if out.numel():
        error = (out.double() - expected.double()).norm() / expected.double().norm()
        assert error <= MAX_ERROR[out.dtype], error.item()


def assert_quantized(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[0].float(), expected[0].float())


@pytest.mark.parametrize("has_ue8m0_scales", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_are_quantised_as_specified(fused: ModuleType, dtype: torch.dtype, has_ue8m0_scales: bool) -> None:
    """Zeros, tiny numbers, every middle between two steps, subnormal ones too, a ragged group, strided rows."""
    torch.manual_seed(0)
    wide = draw_rows(9, 1500, torch.float32)
    wide[1], wide[2] = 0.0, wide[2] * 1e-30
    wide[3] = torch.arange(1500, device=DEVICE) * 0.25 + 0.125
    wide[4, :128] = torch.arange(128, device=DEVICE) * 2.0**-10
    wide[4, 0], wide[5, 128] = 448.0, float("-inf")
    x = wide.to(dtype)[:, :1420]
    actual = fused.quantize_groups(x, has_ue8m0_scales=has_ue8m0_scales)
    expected = reference_fp8.quantize_groups(x, has_ue8m0_scales=has_ue8m0_scales)
    finite = [0, 1, 2, 3, 4, 6, 7, 8]  # the interpreter has no NaN of e4m3
    assert_quantized((actual[0][finite], actual[1]), (expected[0][finite], expected[1]))
    if not IS_INTERPRETED:
        assert torch.equal(actual[0][5].isnan(), expected[0][5].isnan())


@pytest.mark.parametrize("many_rows", (4, 1024))
@pytest.mark.parametrize("num_rows", (0, 6))
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_quantising_together(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, num_rows: int, many_rows: int
) -> None:
    pytest.importorskip("triton")
    from argosy.kernels.triton import quantize_groups

    monkeypatch.setattr(quantize_groups, "MANY_ROWS", many_rows)
    torch.manual_seed(1)
    gate_up = draw_rows(num_rows, 2 * 200, dtype)
    quantized, scale = quantize_groups.silu_mul_quantize_groups(gate_up, has_ue8m0_scales=True)
    expected, expected_scale = reference_fp8.quantize_groups(silu_mul(gate_up), has_ue8m0_scales=True)
    assert torch.allclose(scale, expected_scale)
    # A last bit of silu now and then moves a number by one step.
    is_equal = quantized.float() == expected.float()
    assert quantized.shape == expected.shape and (not num_rows or is_equal.float().mean() > 0.999)


@pytest.mark.parametrize("num_rows", NUMS_ROWS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(fused: ModuleType, dtype: torch.dtype, size: tuple[int, int], num_rows: int) -> None:
    torch.manual_seed(num_rows)
    x = draw_rows(num_rows, size[0], dtype)
    weight, scale = draw(size[1], size[0])
    has_ue8m0_scales = num_rows % 2 == 0
    out = fused.linear_fp8(x, weight, scale, has_ue8m0_scales=has_ue8m0_scales)
    assert_close(out, reference_fp8.linear_fp8(x, weight, scale, has_ue8m0_scales=has_ue8m0_scales))


def test_every_tile_gives_the_same(gemm: ModuleType, fused: ModuleType) -> None:
    torch.manual_seed(3)
    x = draw_rows(70, 384, torch.float32)
    weight, scale = draw(320, 384)
    expected = reference_fp8.linear_fp8(x, weight, scale, has_ue8m0_scales=False)
    numbers = fused.quantize_groups(x)
    others = (gemm.Tile(64, 64, 2, 4, False, True, 2), gemm.Tile(128, 128, 2, 8, False, False, 1, num_unrolled=2))
    for tile in (*gemm.PLAIN_TILES, gemm.PLAIN_WIDE_TILE, *others):
        out = gemm.fp8_grouped_gemm(*numbers, weight[None], scale[None], None, torch.float32, tile=tile)
        assert_close(out, expected)


def test_few_tiles_split_the_inputs(gemm: ModuleType) -> None:
    tile = gemm.PLAIN_TILES[0]
    assert gemm.choose_num_splits(tile, torch.Size((1, 7168)), 4096, 264) == 8
    assert gemm.choose_num_splits(tile, torch.Size((1, 1536)), 24576, 264) == 1
    assert gemm.choose_num_splits(tile, torch.Size((1, 640)), 128, 264) == 1
    assert gemm.choose_num_splits(tile, torch.Size((1, 2304)), 128, 264) == 4
    assert gemm.choose_num_splits(tile, torch.Size((1, 3840)), 128, 264) == 6  # of 5 blocks: 7 would leave one empty


@pytest.mark.parametrize("many_rows", (1, 1000))
@pytest.mark.parametrize("num_expected_rows", (0, 1, 6, 100))
@pytest.mark.parametrize("counts", ((0, 0, 0), (3, 0, 6), (5, 5, 5)))
def test_spare_rows_are_not_quantised(
    fused: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    counts: tuple[int, ...],
    num_expected_rows: int,
    many_rows: int,
) -> None:
    """However many programs share the real ones, several rows each or one."""
    from argosy.kernels.triton import quantize_groups

    allocate = quantize_groups.empty_groups

    def allocate_filled(num_rows: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        numbers, scale = allocate(num_rows, size, device)
        return numbers.fill_(7.0), scale.fill_(7.0)

    monkeypatch.setattr(quantize_groups, "empty_groups", allocate_filled)
    monkeypatch.setattr(quantize_groups, "MANY_ROWS", many_rows)
    torch.manual_seed(5)
    real, x = sum(counts), draw_rows(15, 1200, torch.float32)
    num_rows = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    quantized, scale = quantize_groups.quantize_real_groups(x, num_rows, num_expected_rows, has_ue8m0_scales=False)
    assert_quantized((quantized[:real], scale[:real]), reference_fp8.quantize_groups(x[:real], has_ue8m0_scales=False))
    assert (quantized[real:].float() == 7.0).all() and (scale[real:] == 7.0).all()


# Rows of each expert: none at all, one, few, a tile and one more; 8 rows behind the last are nobody's.
COUNTS = (
    ((3, 0, 1, 17, 0, 33), (0, 0, 0), (130, 2))
    if IS_INTERPRETED
    else ((3, 0, 1, 129, 300, 0), (30, 20, 40), (0, 0, 0), (3, 1, 0, 0, 9, 16), (700, 0, 650, 0, 0, 1))
)


@pytest.mark.parametrize("num_expected_rows", (None, 3))
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(fused: ModuleType, dtype: torch.dtype, counts: tuple[int, ...], num_expected_rows: int | None) -> None:
    torch.manual_seed(len(counts))
    hidden_size, width = (144, 128) if IS_INTERPRETED else (7168, 2048)
    gate_up, down = draw(len(counts), 2 * width, hidden_size), draw(len(counts), hidden_size, width)
    num_tokens = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    real = sum(counts)
    x = draw_rows(real + 8, hidden_size, dtype)
    x[real:] = float("nan")
    out = fused.grouped_mlp_fp8(
        x, *gate_up, *down, num_tokens, has_ue8m0_scales=True, num_expected_rows=num_expected_rows
    )[:real]
    expected = reference_fp8.grouped_mlp_fp8(x, *gate_up, *down, num_tokens, has_ue8m0_scales=True)[:real]
    assert out.isfinite().all()
    # Another order of sums now and then moves a hidden number by one step of e4m3.
    assert not real or (out.float() - expected.float()).norm() <= 5e-3 * expected.float().norm()


@pytest.mark.parametrize("has_ue8m0_scales", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_rows_are_quantised_where_they_are_made(
    gemm: ModuleType, fused: ModuleType, dtype: torch.dtype, has_ue8m0_scales: bool
) -> None:
    torch.manual_seed(4)
    counts = torch.tensor((5, 0, 21), dtype=torch.int32, device=DEVICE)
    weights = draw(3, 512, 128)
    x = fused.quantize_groups(draw_rows(26, 128, dtype))
    for tile in (gemm.GATED_TILES[0], gemm.GATED_WIDE_TILE):
        hidden = gemm.fp8_grouped_gemm(*x, *weights, counts, dtype, is_gated=True, tile=tile)
        actual = gemm.fp8_grouped_gate_up(*x, *weights, counts, dtype, has_ue8m0_scales=has_ue8m0_scales, tile=tile)
        assert_quantized(actual, reference_fp8.quantize_groups(hidden, has_ue8m0_scales=has_ue8m0_scales))


@pytest.fixture
def hopper_gemm(gemm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """In the interpreter the kernel is put into place."""
    if IS_INTERPRETED:
        module = load_interpreted(*HOPPER_MODULES)
        monkeypatch.setattr(gemm, "multiply_fp8_on_hopper", module.multiply_fp8_on_hopper)
    elif torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper card")
    return gemm


# Rows of each expert: none, few, both of a tile's groups and one alone, several tiles; and none anywhere. ``None``: one
# expert has all of 130 rows.
HOPPER_COUNTS = ((0, 1, 0, 65, 0), (130, 0, 64), (0, 0), None)


@pytest.mark.parametrize(
    ("in_features", "has_queue", "num_unrolled"), ((112, True, 4), (640, True, 4), (640, False, 2))
)
@pytest.mark.parametrize("counts", HOPPER_COUNTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loop_for_hopper(
    hopper_gemm: ModuleType,
    fused: ModuleType,
    dtype: torch.dtype,
    counts: tuple[int, ...] | None,
    in_features: int,
    has_queue: bool,
    num_unrolled: int,
) -> None:
    """Columns and K that end inside a block; fewer blocks of K than the ring and a stretch have, and more, and some
    that are no whole stretch; 3 rows are nobody's.
    """
    torch.manual_seed(in_features)
    num_rows = 130 if counts is None else sum(counts) + 3
    x = fused.quantize_groups(draw_rows(num_rows, in_features, torch.float32))
    weight, scale = draw(len(counts or (0,)), 272, in_features)
    device_counts = None if counts is None else torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    tile = hopper_gemm.Fp8HopperTile(
        num_stages=4 if has_queue else 3,
        walked_tiles=2,
        has_queue=has_queue,
        num_unrolled=num_unrolled,
    )
    out = hopper_gemm.fp8_grouped_gemm(*x, weight, scale, device_counts, dtype, tile=tile)
    row = 0
    for expert, count in enumerate(counts or (num_rows,)):
        rows = slice(row, row + count)
        inputs = x[0][rows], x[1][rows], weight[expert], scale[expert]
        assert_close(out[rows], reference_fp8.linear_fp8_quantized(*inputs, dtype))
        row += count


def test_stretches_of_the_loop_for_hopper_change_no_bit(hopper_gemm: ModuleType, fused: ModuleType) -> None:
    torch.manual_seed(11)
    x, weights = fused.quantize_groups(draw_rows(150, 896, torch.float32)), draw(2, 256, 896)
    counts = torch.tensor((20, 130), dtype=torch.int32, device=DEVICE)
    tiles = (hopper_gemm.Fp8HopperTile(num_unrolled=count) for count in (1, 2, 4))
    first, *others = (hopper_gemm.fp8_grouped_gemm(*x, *weights, counts, torch.float32, tile=tile) for tile in tiles)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("has_ue8m0_scales", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_loop_for_hopper_quantises_hidden_rows(
    hopper_gemm: ModuleType, fused: ModuleType, dtype: torch.dtype, has_ue8m0_scales: bool
) -> None:
    """Zeros, tiny and huge ones among them; rows behind the last expert's are not touched."""
    torch.manual_seed(5)
    counts = torch.tensor((5, 0, 129), dtype=torch.int32, device=DEVICE)
    rows = draw_rows(140, 256, torch.float32)
    rows[1], rows[2], rows[3] = 0.0, rows[2] * 1e-12, rows[3] * 1e6
    x, weights = fused.quantize_groups(rows), draw(3, 512, 256)
    tile = hopper_gemm.HOPPER_GATED_TILE
    hidden = hopper_gemm.fp8_grouped_gemm(*x, *weights, counts, dtype, is_gated=True, tile=tile)[:134]
    plain = hopper_gemm.fp8_grouped_gemm(*x, *weights, counts, torch.float32, tile=hopper_gemm.HOPPER_PLAIN_TILE)[:134]
    assert_close(hidden, silu_mul(plain.to(dtype)))
    actual = hopper_gemm.fp8_grouped_gate_up(*x, *weights, counts, dtype, has_ue8m0_scales=has_ue8m0_scales, tile=tile)
    expected = reference_fp8.quantize_groups(hidden, has_ue8m0_scales=has_ue8m0_scales)
    assert_quantized((actual[0][:134], actual[1][:134]), expected)


def test_loop_for_hopper_is_for_many_rows_on_such_a_card(gemm: ModuleType) -> None:
    for is_gated in (False, True):
        assert isinstance(gemm.choose_tile(51 * 256, 256, is_gated, is_hopper=True), gemm.Fp8HopperTile)
        assert isinstance(gemm.choose_tile(49 * 256, 256, is_gated, is_hopper=True), gemm.Tile)
        assert isinstance(gemm.choose_tile(51 * 256, 256, is_gated, is_hopper=False), gemm.Tile)


def test_dense_products_of_few_tiles_are_split_rather(gemm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(gemm, "_is_on_hopper", lambda x: True)
    monkeypatch.setattr(gemm, "_count_programs", lambda tile, device: 132 * tile.num_programs)
    monkeypatch.setattr(gemm, "_launch", lambda *inputs, **_: launched.append(inputs[6]))
    monkeypatch.setattr(gemm, "_sum_splits", lambda parts, dtype: parts[0])
    x, x_scale = torch.empty(1280, 7168, device="meta"), torch.empty(1280, 56, device="meta")
    weight, scale = torch.empty(1, 4096, 7168, device="meta"), torch.empty(1, 32, 56, device="meta")
    for rows in (128, 1280):
        gemm.fp8_grouped_gemm(x[:rows], x_scale[:rows], weight, scale, None, torch.float32)
    assert launched == [gemm.PLAIN_WIDE_TILE, gemm.HOPPER_DENSE_TILE]
