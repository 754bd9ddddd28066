"""Norms, the gated activation, rotary embeddings and cache writes in Triton against their specifications.

On an NVIDIA card, or without one in Triton's interpreter, at small sizes:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_elementwise_triton.py

What is quantised is held bit by bit to the numbers that the same kernel gave out unquantised.
"""

import os
from types import SimpleNamespace

import pytest
import torch

from argosy.kernels import reference, reference_cache_rows, reference_fp8, reference_paged, reference_w8a8
from argosy.kernels.reference import RotaryRows, RotaryTable
from argosy.kernels.reference_cache_rows import FP8, INT8, LatentRowLayout, NumberFormat

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
# The interpreter cuts bfloat16 and e4m3 where a card rounds.
DTYPES = (torch.float32,) if IS_INTERPRETED else (torch.float32, torch.bfloat16)
NUMBER_FORMATS = (INT8,) if IS_INTERPRETED else (INT8, FP8)
NUMS_TOKENS = (0, 1, 5) if IS_INTERPRETED else (0, 1, 7, 128, 4096)
WIDTHS = (32, 150) if IS_INTERPRETED else (128, 512, 1536, 2048, 7168, 18432)
# R, P, I, P of index keys: a last group that is shorter, one group that fills no power of two, and DeepSeek's.
LATENT_DIMS = ((160, 16), (48, 12)) if IS_INTERPRETED else ((160, 16), (48, 12), (512, 64))
INDEX_DIMS = ((32, 16), (64, 12)) if IS_INTERPRETED else ((32, 16), (64, 12), (128, 64))
BLOCK_SIZE = 16
EPS = 1e-6
# Sums in another order, and products that a card fuses into sums or not: a few last bits of float32, of numbers up to
# 10. In bfloat16 they now and then turn a rounding: one step, which is 1 / 128 of a number at most.
ATOL = 1e-5
STEP = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-7}
# A number whose rounding turns is another multiple of its scale, or another e4m3 number: 1 / 8 of itself apart at most.
MAX_TURNED_SHARE = 0.02
# In bfloat16 the largest of a row moves by a step now and then, and the row's scale with it.
SCALE_RTOL = 2.0**-7

pytestmark = pytest.mark.skipif(
    not IS_INTERPRETED and not torch.cuda.is_available(), reason="needs an NVIDIA card, or TRITON_INTERPRET=1"
)


@pytest.fixture
def fused() -> SimpleNamespace:
    pytest.importorskip("triton")
    from argosy.kernels.triton import cache_write, decode_inputs, norms, quantize, rotary

    return SimpleNamespace(
        cache_write=cache_write, decode_inputs=decode_inputs, norms=norms, quantize=quantize, rotary=rotary
    )


def draw_rows(num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Columns of a wider tensor, with rows of very different sizes."""
    wide = torch.randn(num_rows, width + 16, device=DEVICE)
    return (wide * torch.logspace(-2, 0, num_rows, device=DEVICE).unsqueeze(1)).to(dtype)[:, :width]


def draw_weight(width: int) -> torch.Tensor:
    return torch.rand(width, device=DEVICE) + 0.5


def draw_rotary(num_tokens: int, rope_dim: int) -> RotaryRows:
    angles = torch.rand(64, rope_dim // 2, device=DEVICE) * 6.28
    return RotaryTable(angles.cos(), angles.sin()).at(torch.randint(64, (num_tokens,), device=DEVICE))


def draw_slots(num_tokens: int) -> tuple[torch.Tensor, int]:
    """Slots in any order, every third token without one; and how many blocks they are in. Slot 0 is never written."""
    num_blocks = num_tokens // BLOCK_SIZE + 2
    slots = torch.randperm(num_blocks * BLOCK_SIZE - 1, device=DEVICE)[:num_tokens] + 1
    slots[2::3] = -1
    return slots, num_blocks


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert out.dtype == expected.dtype and out.shape == expected.shape
    difference = (out.float() - expected.float()).abs()
    assert (difference <= STEP[out.dtype] * expected.float().abs() + ATOL).all(), difference.max()


def assert_quantised(quantized: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> None:
    expected, expected_scale = reference_w8a8.quantize_per_token(x)
    assert torch.equal(quantized, expected) and torch.equal(scale, expected_scale)


# --- norms and the activation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", NUMS_TOKENS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(fused: SimpleNamespace, dtype: torch.dtype, width: int, num_tokens: int) -> None:
    torch.manual_seed(num_tokens)
    x, weight = draw_rows(num_tokens, width, dtype), draw_weight(width)
    normed, quantized, scale = fused.norms.rms_norm_quantize(x, weight, EPS)
    expected = reference.rms_norm(x, weight, EPS)
    assert_close(fused.norms.rms_norm(x, weight, EPS), expected)
    assert_close(normed, expected)
    assert_quantised(quantized, scale, normed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_in_place_leaves_other_columns(fused: SimpleNamespace, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    wide, weight = torch.randn(5, 48, device=DEVICE).to(dtype), draw_weight(32)
    before = wide.clone()
    columns = wide[:, :32]
    assert fused.norms.rms_norm(columns, weight, EPS, out=columns) is columns
    assert_close(wide[:, :32], reference.rms_norm(before[:, :32], weight, EPS))
    assert torch.equal(wide[:, 32:], before[:, 32:])


@pytest.mark.parametrize("num_tokens", NUMS_TOKENS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("delta_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(
    fused: SimpleNamespace, dtype: torch.dtype, delta_dtype: torch.dtype, width: int, num_tokens: int
) -> None:
    torch.manual_seed(num_tokens)
    x, delta, weight = (
        draw_rows(num_tokens, width, dtype),
        draw_rows(num_tokens, width, delta_dtype),
        draw_weight(width),
    )
    expected_total = (x + delta).to(dtype)
    expected = reference.rms_norm(expected_total, weight, EPS)
    normed, total = fused.norms.add_rms_norm(x, delta, weight, EPS)
    assert torch.equal(total, expected_total)
    assert_close(normed, expected)
    normed, total, quantized, scale = fused.norms.add_rms_norm_quantize(x, delta, weight, EPS)
    assert torch.equal(total, expected_total)
    assert_close(normed, expected)
    assert_quantised(quantized, scale, normed)


@pytest.mark.parametrize("num_tokens", NUMS_TOKENS)
@pytest.mark.parametrize("width", (128, 300) if IS_INTERPRETED else (128, 300, 1536, 7168))
@pytest.mark.parametrize("has_delta", (False, True))
@pytest.mark.parametrize("has_ue8m0_scales", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_into_groups(
    fused: SimpleNamespace, dtype: torch.dtype, has_ue8m0_scales: bool, has_delta: bool, width: int, num_tokens: int
) -> None:
    torch.manual_seed(num_tokens)
    x, weight = draw_rows(num_tokens, width, dtype), draw_weight(width)
    delta = draw_rows(num_tokens, width, dtype) if has_delta else None
    normed, total, quantized, scale = fused.norms.rms_norm_quantize_groups(
        x, delta, weight, EPS, has_ue8m0_scales=has_ue8m0_scales
    )
    assert torch.equal(total, x if delta is None else x + delta)
    assert_close(normed, reference.rms_norm(total, weight, EPS))
    expected, expected_scale = reference_fp8.quantize_groups(normed, has_ue8m0_scales=has_ue8m0_scales)
    assert torch.equal(quantized.float(), expected.float()) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("num_tokens", NUMS_TOKENS)
@pytest.mark.parametrize("width", (*WIDTHS, 1100))
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(fused: SimpleNamespace, dtype: torch.dtype, width: int, num_tokens: int) -> None:
    torch.manual_seed(num_tokens)
    gate_up = draw_rows(num_tokens, 2 * width, dtype).mul_(3)
    if num_tokens:
        gate_up[-1, :3] = torch.tensor([200.0, -200.0, 0.0])  # where the exponential ends
    out = fused.norms.silu_mul(gate_up)
    assert_close(out, reference.silu_mul(gate_up))
    assert_quantised(*fused.norms.silu_mul_quantize(gate_up), out)


@pytest.mark.parametrize("num_expected_rows", (0, 1, 3, 100))
def test_silu_mul_of_real_rows_alone(fused: SimpleNamespace, num_expected_rows: int) -> None:
    torch.manual_seed(0)
    gate_up = draw_rows(20, 2 * 1100, torch.float32)
    counts = torch.tensor((4, 0, 7), dtype=torch.int32, device=DEVICE)
    gate_up[11:] = float("nan")
    out = fused.norms.silu_mul_real_rows(gate_up, counts, num_expected_rows)
    assert out.shape == (20, 1100)
    assert_close(out[:11], reference.silu_mul(gate_up[:11]))


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_scale_shows_what_is_not_finite(fused: SimpleNamespace, value: float) -> None:
    x = torch.ones(3, 40, device=DEVICE)
    x[1, 17] = value
    for scale in (fused.quantize.quantize_per_token(x)[1], fused.norms.silu_mul_quantize(torch.cat((x, x), dim=1))[1]):
        assert scale.flatten().isfinite().tolist() == [True, False, True]


# --- rotary embeddings ------------------------------------------------------------------------------------------------

# Heads and P: one head, and so many that a token takes several programs, the last one not full.
ROPE_SHAPES = ((1, 16), (200, 12)) if IS_INTERPRETED else ((1, 64), (128, 64), (200, 12))


@pytest.mark.parametrize("num_tokens", NUMS_TOKENS)
@pytest.mark.parametrize(("num_heads", "rope_dim"), ROPE_SHAPES)
@pytest.mark.parametrize("layout", ("interleaved", "half_split"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope(
    fused: SimpleNamespace, dtype: torch.dtype, layout: str, num_heads: int, rope_dim: int, num_tokens: int
) -> None:
    torch.manual_seed(num_tokens)
    x = torch.randn(num_tokens, num_heads, rope_dim + 20, device=DEVICE).to(dtype)
    expected, rotary = x.clone(), draw_rotary(num_tokens, rope_dim)
    getattr(reference, f"rope_{layout}_")(expected[..., 20:], rotary)
    getattr(fused.rotary, f"rope_{layout}_")(x[..., 20:], rotary)
    assert_close(x, expected)
    assert torch.equal(x[..., :20], expected[..., :20])


@pytest.mark.parametrize("num_tokens", NUMS_TOKENS)
@pytest.mark.parametrize(("num_heads", "rope_dim"), ROPE_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_into_another_tensor(
    fused: SimpleNamespace, dtype: torch.dtype, num_heads: int, rope_dim: int, num_tokens: int
) -> None:
    torch.manual_seed(num_tokens)
    x = torch.randn(num_tokens, num_heads, rope_dim + 20, device=DEVICE).to(dtype)
    out = torch.randn(num_tokens, num_heads, rope_dim + 8, device=DEVICE).to(dtype)
    rotary = draw_rotary(num_tokens, rope_dim)
    expected = out.clone()
    fused.rotary.rope_interleaved_into(x[..., 20:], rotary, out[..., 8:])
    reference.rope_interleaved_into(x[..., 20:], rotary, expected[..., 8:])
    assert_close(out, expected)
    assert torch.equal(out[..., :8], expected[..., :8])


@pytest.mark.parametrize("num_tokens", NUMS_TOKENS)
@pytest.mark.parametrize("rope_dim", (12, 64))
def test_rotary_rows_are_looked_up(fused: SimpleNamespace, rope_dim: int, num_tokens: int) -> None:
    angles = torch.rand(64, rope_dim // 2, device=DEVICE) * 6.28
    table, positions = RotaryTable(angles.cos(), angles.sin()), torch.randint(64, (num_tokens,), device=DEVICE)
    found, expected = fused.rotary.rotary_rows(table, positions), table.at(positions)
    assert torch.equal(torch.view_as_real(found.turns), torch.view_as_real(expected.turns))
    assert torch.equal(found.half_cos, expected.half_cos) and torch.equal(found.half_sin, expected.half_sin)


@pytest.mark.parametrize(("num_rows", "num_blocks"), [(1, 1), (3, 5), (4, 9)])
def test_decode_inputs_are_filled(fused: SimpleNamespace, num_rows: int, num_blocks: int) -> None:
    def draw(rows: int, blocks: int) -> reference_paged.DecodeInputs:
        ids, positions, slots = torch.randint(99, (3, rows), device=DEVICE).unbind(0)
        lens, table = (torch.randint(99, size, dtype=torch.int32, device=DEVICE) for size in ((rows,), (rows, blocks)))
        return ids, positions, slots, lens, table

    torch.manual_seed(num_rows)
    source, found = draw(num_rows, num_blocks), draw(4, 9)
    expected = tuple(part.clone() for part in found)
    fused.decode_inputs.fill_decode_inputs(found, source)
    reference_paged.fill_decode_inputs(expected, source)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


# --- cache rows -------------------------------------------------------------------------------------------------------


def make_latent(latent: torch.Tensor, weight: torch.Tensor, rotary: RotaryRows) -> torch.Tensor:
    """As ``MLAAttention`` does."""
    latent, rank = latent.clone(), weight.shape[0]
    latent[:, :rank] = reference.rms_norm(latent[:, :rank], weight, EPS)
    reference.rope_interleaved_(latent[:, rank:].unsqueeze(1), rotary)
    return latent


def make_index_k(
    key: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rotary: RotaryRows, rope_dim: int
) -> torch.Tensor:
    """As ``Indexer`` does."""
    key = reference.layer_norm(key, weight, bias, EPS)
    reference.rope_half_split_(key[:, :rope_dim].unsqueeze(1), rotary)
    return key


def assert_written(
    cache: torch.Tensor, before: torch.Tensor, slots: torch.Tensor, expected: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nothing was written but rows with a slot. Returns those, and what they should hold."""
    rows, is_written = cache.flatten(0, 1), slots >= 0
    is_old = torch.ones(rows.shape[0], dtype=torch.bool, device=DEVICE)
    is_old[slots[is_written]] = False
    assert torch.equal(rows[is_old], before.flatten(0, 1)[is_old])
    return rows[slots[is_written]], expected[is_written]


def assert_same_numbers(out: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor, numbers: NumberFormat) -> None:
    """Decoded numbers: equal, but for a few that are one step apart."""
    difference = (out - expected).abs()
    step = torch.maximum(expected.abs() / 8, scale / 512) if numbers is FP8 else scale
    assert (difference <= 1.01 * step).all()
    assert (difference > 0.25 * step).sum() <= MAX_TURNED_SHARE * out.numel() + 2


@pytest.mark.parametrize("num_tokens", NUMS_TOKENS)
@pytest.mark.parametrize(("rank", "rope_dim"), LATENT_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_write_latent(fused: SimpleNamespace, dtype: torch.dtype, rank: int, rope_dim: int, num_tokens: int) -> None:
    torch.manual_seed(num_tokens)
    latent, weight = draw_rows(num_tokens, rank + rope_dim, dtype), draw_weight(rank)
    rotary, (slots, num_blocks) = draw_rotary(num_tokens, rope_dim), draw_slots(num_tokens)
    before = torch.randn(num_blocks, BLOCK_SIZE, rank + rope_dim, device=DEVICE).to(dtype)
    cache, raw = before.clone(), latent.clone()
    fused.cache_write.write_latent(latent, weight, EPS, rotary, cache, slots)
    assert_close(*assert_written(cache, before, slots, make_latent(latent, weight, rotary)))
    assert torch.equal(latent, raw)


@pytest.mark.parametrize("num_tokens", NUMS_TOKENS)
@pytest.mark.parametrize(("rank", "rope_dim"), LATENT_DIMS)
@pytest.mark.parametrize("numbers", NUMBER_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_write_latent_encoded(
    fused: SimpleNamespace, dtype: torch.dtype, numbers: NumberFormat, rank: int, rope_dim: int, num_tokens: int
) -> None:
    torch.manual_seed(num_tokens)
    latent, weight = draw_rows(num_tokens, rank + rope_dim, dtype), draw_weight(rank)
    latent[:1] = 0.0
    layout = LatentRowLayout(rank, rope_dim, numbers)
    rotary, (slots, num_blocks) = draw_rotary(num_tokens, rope_dim), draw_slots(num_tokens)
    before = torch.randint(256, (num_blocks, BLOCK_SIZE, layout.num_bytes), device=DEVICE).to(torch.uint8)
    cache = before.clone()
    fused.cache_write.write_latent_encoded(latent, weight, EPS, rotary, cache, slots, layout)
    expected_latent = make_latent(latent, weight, rotary)
    rows, expected_rows = assert_written(
        cache, before, slots, reference_cache_rows.encode_latent(expected_latent, layout)
    )
    scales, expected_scales = (
        r[:, rank : layout.rope_start].contiguous().view(torch.float32) for r in (rows, expected_rows)
    )
    assert torch.allclose(scales, expected_scales, rtol=SCALE_RTOL, atol=0.0)
    scale = expected_scales.repeat_interleave(layout.group_size, dim=1)[:, :rank]
    decoded, expected = (reference_cache_rows.decode_latent(r, layout, torch.float32) for r in (rows, expected_rows))
    assert_same_numbers(decoded[:, :rank], expected[:, :rank], scale, numbers)
    # The interpreter cuts where the specification rounds.
    assert ((decoded - expected)[:, rank:].abs() <= 2.0**-7 * expected[:, rank:].abs() + ATOL).all()


@pytest.mark.parametrize("num_tokens", NUMS_TOKENS)
@pytest.mark.parametrize(("width", "rope_dim"), (*INDEX_DIMS, (24, 16)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_write_index_k(fused: SimpleNamespace, dtype: torch.dtype, width: int, rope_dim: int, num_tokens: int) -> None:
    torch.manual_seed(num_tokens)
    key, weight, bias = draw_rows(num_tokens, width, dtype), draw_weight(width), torch.randn(width, device=DEVICE)
    rotary, (slots, num_blocks) = draw_rotary(num_tokens, rope_dim), draw_slots(num_tokens)
    before = torch.randn(num_blocks, BLOCK_SIZE, width, device=DEVICE).to(dtype)
    cache, raw = before.clone(), key.clone()
    fused.cache_write.write_index_k(key, weight, bias, EPS, rotary, rope_dim, cache, slots)
    assert_close(*assert_written(cache, before, slots, make_index_k(key, weight, bias, rotary, rope_dim)))
    assert torch.equal(key, raw)


@pytest.mark.parametrize("num_tokens", NUMS_TOKENS)
@pytest.mark.parametrize(("width", "rope_dim"), INDEX_DIMS)
@pytest.mark.parametrize("numbers", NUMBER_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_write_index_k_encoded(
    fused: SimpleNamespace, dtype: torch.dtype, numbers: NumberFormat, width: int, rope_dim: int, num_tokens: int
) -> None:
    torch.manual_seed(num_tokens)
    key, weight, bias = draw_rows(num_tokens, width, dtype), draw_weight(width), torch.randn(width, device=DEVICE)
    hadamard = reference_cache_rows.hadamard_matrix(width, torch.device(DEVICE))
    rotary, (slots, num_blocks) = draw_rotary(num_tokens, rope_dim), draw_slots(num_tokens)
    before = torch.randint(256, (num_blocks, BLOCK_SIZE, width + 4), device=DEVICE).to(torch.uint8)
    cache = before.clone()
    fused.cache_write.write_index_k_encoded(key, weight, bias, EPS, rotary, rope_dim, cache, slots, hadamard, numbers)
    index_k = make_index_k(key, weight, bias, rotary, rope_dim)
    encoded = reference_cache_rows.encode_index_k(index_k, hadamard, numbers)
    parts = assert_written(cache, before, slots, encoded)
    scale, expected_scale = (rows[:, width:].contiguous().view(torch.float32) for rows in parts)
    assert torch.allclose(scale, expected_scale, rtol=SCALE_RTOL, atol=0.0)
    codes, expected_codes = (
        reference_cache_rows.numbers_to_float(rows[:, :width].contiguous().view(numbers.dtype)) for rows in parts
    )
    assert_same_numbers(codes * scale, expected_codes * expected_scale, expected_scale, numbers)
