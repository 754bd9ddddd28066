"""8-bit cache rows against twins that parse their bytes one by one, and their errors against the formats' steps."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from argosy.kernels import (
    FP8,
    INT8,
    LatentRowLayout,
    NumberFormat,
    attend_absorbed,
    attend_sparse,
    attend_sparse_encoded,
    decode_latent,
    encode_index_k,
    encode_latent,
    hadamard_matrix,
    index_scores,
    index_scores_encoded,
    reference_cache_rows,
    write_cache,
)
from argosy.kernels.reference_cache_rows import MIN_AMAX, numbers_to_float, quantize, quantize_rotated
from tests.helpers.tolerance import FP32_OP_ATOL

CPU = torch.device("cpu")
FORMATS = [pytest.param(INT8, id="int8"), pytest.param(FP8, id="fp8")]
# The published model's, whole groups, one group, and a last group that is shorter.
LAYOUTS = [(512, 64), (256, 16), (128, 16), (32, 8), (192, 64), (200, 2)]


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- twins ------------------------------------------------------------------------------------------------------------


def fp8_value(bits: int) -> float:
    """float8_e4m3fn by its definition: sign, 4 bits of exponent with bias 7, 3 of fraction."""
    sign, exponent, fraction = -1.0 if bits & 0x80 else 1.0, (bits >> 3) & 15, bits & 7
    if exponent == 15 and fraction == 7:
        return float("nan")
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


def parse_number(bits: int, numbers: NumberFormat) -> float:
    if numbers is FP8:
        return fp8_value(bits)
    return float(bits - 256 if bits > 127 else bits)


def parse_latent(row: bytes, rank: int, rope_dim: int, numbers: NumberFormat) -> list[float]:
    """One row as FlashMLA's documentation describes it."""
    num_groups = -(-rank // min(128, rank))
    scales = np.frombuffer(row[rank : rank + 4 * num_groups], dtype="<f4")
    latent = [float(np.float32(parse_number(row[i], numbers)) * scales[i // 128]) for i in range(rank)]
    halves = np.frombuffer(row[rank + 4 * num_groups :], dtype="<u2").astype("<u4") << 16
    rope = halves.view("<f4").tolist()
    assert len(rope) == rope_dim
    return latent + rope


def assert_within_half_a_step(found: torch.Tensor, given: torch.Tensor, group_size: int, numbers: NumberFormat) -> None:
    """|error| is at most half the distance of neighbouring numbers: 1 scale in int8; in e4m3 2^-3 of the number's power
    of two, and 2^-9 scales below the smallest normal number."""
    for start in range(0, given.shape[-1], group_size):
        part, decoded = given[..., start : start + group_size].double(), found[..., start : start + group_size].double()
        scale = part.abs().amax(-1, keepdim=True).clamp(min=MIN_AMAX) / numbers.max_value
        step = scale if numbers is INT8 else torch.maximum(part.abs() * 2.0**-3, scale * 2.0**-9)
        assert ((decoded - part).abs() <= 0.5 * step * (1 + 1e-5)).all()


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "given_numbers", "expected"),
    [
        (INT8, [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5], [127, 0, 2, 2, 0, -2, 126]),
        (FP8, [448.0, 17.0, 19.0, -17.0, 1.0625, 2.0**-10, 3 * 2.0**-10], [448, 16, 20, -16, 1, 0, 2.0**-8]),
    ],
)
def test_halves_are_rounded_to_even(numbers: NumberFormat, given_numbers: list[float], expected: list[float]) -> None:
    """The first is the maximum, so the scale is 1."""
    quantized, scale = quantize(torch.tensor([given_numbers]), numbers)
    assert scale.item() == 1.0
    assert numbers_to_float(quantized)[0].tolist() == expected


@pytest.mark.parametrize("numbers", FORMATS)
def test_numbers_beyond_the_maximum_are_clamped(numbers: NumberFormat) -> None:
    beyond = torch.tensor([1e6, -1e6, float("inf"), numbers.max_value + 0.01])
    expected = [numbers.max_value, -numbers.max_value, numbers.max_value, numbers.max_value]
    assert numbers_to_float(numbers.round(beyond)).tolist() == expected


@pytest.mark.parametrize("numbers", FORMATS)
@pytest.mark.parametrize("size", [0.0, MIN_AMAX / 1000, MIN_AMAX, 1.0, 1e30])
def test_tiny_rows_count_as_the_floor_and_large_ones_fit(numbers: NumberFormat, size: float) -> None:
    x = torch.linspace(-1.0, 1.0, 128).mul_(size).unsqueeze(0)
    quantized, scale = quantize(x, numbers)
    assert scale.item() == pytest.approx(max(size, MIN_AMAX) / numbers.max_value, rel=1e-6)
    assert_within_half_a_step(numbers_to_float(quantized) * scale, x, 128, numbers)


def test_every_number_of_8_bits_is_read_exactly() -> None:
    every = torch.arange(256).to(torch.uint8)
    expected = torch.tensor([fp8_value(bits) for bits in range(256)])
    assert torch.equal(numbers_to_float(every.view(torch.float8_e4m3fn)).nan_to_num(999), expected.nan_to_num(999))
    assert numbers_to_float(every.view(torch.int8)).tolist() == [parse_number(bits, INT8) for bits in range(256)]


# --- latent rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", FORMATS)
def test_a_row_of_the_published_model_is_flash_mlas(numbers: NumberFormat) -> None:
    layout = LatentRowLayout(512, 64, numbers)
    assert (layout.num_bytes, layout.num_groups, layout.rope_start) == (656, 4, 528)
    assert encode_index_k(_random(3, 128), hadamard_matrix(128, CPU), numbers).shape == (3, 132)


@pytest.mark.parametrize("numbers", FORMATS)
@pytest.mark.parametrize(("rank", "rope_dim"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_equals_parsing_the_bytes(rank: int, rope_dim: int, dtype: torch.dtype, numbers: NumberFormat) -> None:
    layout = LatentRowLayout(rank, rope_dim, numbers)
    latent = (_random(5, rank + rope_dim) * 3).to(dtype)
    rows = encode_latent(latent, layout)
    assert rows.dtype == torch.uint8 and rows.shape == (5, layout.num_bytes)
    parsed = [parse_latent(bytes(row.tolist()), rank, rope_dim, numbers) for row in rows]
    assert torch.equal(decode_latent(rows, layout, dtype), torch.tensor(parsed).to(dtype))
    nested = decode_latent(rows[:4].view(2, 2, layout.num_bytes), layout, dtype)
    assert torch.equal(nested.flatten(0, 1), torch.tensor(parsed[:4]).to(dtype))


@pytest.mark.parametrize("numbers", FORMATS)
@given(data=st.data())
def test_errors_are_at_most_half_a_step(numbers: NumberFormat, data: st.DataObject) -> None:
    rank, rope_dim = data.draw(st.sampled_from(LAYOUTS))
    magnitudes = data.draw(st.lists(st.floats(-12, 6), min_size=3, max_size=3))
    seed = data.draw(st.integers(0, 1000))
    latent = _random(3, rank + rope_dim, seed=seed) * 10.0 ** torch.tensor(magnitudes).float().unsqueeze(1)
    latent[:, data.draw(st.integers(0, rank - 1))] *= data.draw(st.sampled_from([0.0, 1.0, 100.0]))  # an outlier
    layout = LatentRowLayout(rank, rope_dim, numbers)
    decoded = decode_latent(encode_latent(latent, layout), layout, torch.float32)
    assert_within_half_a_step(decoded[:, :rank], latent[:, :rank], layout.group_size, numbers)
    assert torch.equal(decoded[:, rank:], latent[:, rank:].bfloat16().float())


@pytest.mark.parametrize("numbers", FORMATS)
def test_a_row_is_its_own_tokens_alone(numbers: NumberFormat) -> None:
    layout, latent = LatentRowLayout(192, 16, numbers), _random(64, 208)
    rows = encode_latent(latent, layout)
    assert all(torch.equal(rows[i : i + 1], encode_latent(latent[i : i + 1], layout)) for i in range(64))


@pytest.mark.parametrize("numbers", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_never_becomes_one(numbers: NumberFormat, bad: float) -> None:
    """A diverged token must show: were its row finite, nobody would see what happened."""
    layout, latent = LatentRowLayout(256, 4, numbers), _random(2, 260)
    latent[1, 130] = bad
    decoded = decode_latent(encode_latent(latent, layout), layout, torch.float32)
    assert not decoded[1, 128:256].isfinite().any()
    assert decoded[0].isfinite().all() and decoded[1, :128].isfinite().all()


def test_bytes_that_were_never_written_are_zeros() -> None:
    for numbers in (INT8, FP8):
        layout = LatentRowLayout(32, 8, numbers)
        assert not decode_latent(torch.zeros(2, 3, layout.num_bytes, dtype=torch.uint8), layout, torch.float32).any()


@pytest.mark.parametrize("numbers", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_attention_equals_the_plain_one_on_decoded_rows(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, numbers: NumberFormat
) -> None:
    layout = LatentRowLayout(192, 8, numbers)
    cache = torch.zeros(5, 4, layout.num_bytes, dtype=torch.uint8)
    write_cache(cache, torch.arange(4, 20), encode_latent(_random(16, 200).to(dtype), layout))
    query = _random(7, 2, 200, seed=3).to(dtype)
    slots = torch.randint(-1, 20, (7, 6), generator=torch.Generator().manual_seed(5))
    slots[:, 0] = 7
    decoded = decode_latent(cache, layout, dtype)
    for is_full in (False, True):
        chosen = slots.clamp(min=4) if is_full else slots
        expected = attend_sparse(query, decoded, chosen, 192, 0.2, is_full=is_full)
        assert torch.equal(attend_sparse_encoded(query, cache, chosen, layout, 0.2, is_full=is_full), expected)
    expected = attend_sparse(query, decoded, slots, 192, 0.2)
    monkeypatch.setattr(reference_cache_rows, "_SCRATCH_BYTES", 3 * 6 * (layout.num_bytes + 8 * 200))
    in_pieces = attend_sparse_encoded(query, cache, slots, layout, 0.2)
    torch.testing.assert_close(in_pieces, expected, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=FP32_OP_ATOL)


# --- index rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 16, 32, 128, 256])
def test_hadamard_matrix_is_sylvesters_and_orthogonal(size: int) -> None:
    expected = np.ones((1, 1))
    while expected.shape[0] < size:
        expected = np.kron(np.array([[1, 1], [1, -1]]), expected)
    matrix = hadamard_matrix(size, CPU)
    assert torch.equal(matrix, torch.from_numpy(expected).float().mul_(size**-0.5))
    assert torch.allclose(matrix @ matrix.T, torch.eye(size), atol=1e-6)
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("numbers", FORMATS)
def test_rotation_serves_an_outlier(numbers: NumberFormat) -> None:
    """One number a thousand times the others: unrotated int8 loses the others, rotated it does not lose everything."""
    key = _random(20, 128)
    key[:, 7] = 1000.0
    quantized, scale = quantize_rotated(key, hadamard_matrix(128, CPU), numbers)
    back = (numbers_to_float(quantized) * scale) @ hadamard_matrix(128, CPU)
    assert_within_half_a_step(numbers_to_float(quantized) * scale, key @ hadamard_matrix(128, CPU), 128, numbers)
    assert torch.cosine_similarity(back, key, dim=-1).min() > 0.999
    assert scale.max() < 1000.0 / numbers.max_value / 5


@pytest.mark.parametrize("numbers", FORMATS)
def test_scores_are_the_formula_of_parsed_bytes(numbers: NumberFormat) -> None:
    """score = sk[s] * sum over heads of w * sq * relu(q8 . k8), in float64 from the bytes."""
    hadamard = hadamard_matrix(32, CPU)
    query, key, weights = _random(2, 3, 4, 32), _random(10, 32, seed=1), _random(2, 3, 4, seed=2)
    rows = encode_index_k(key, hadamard, numbers)
    scores = index_scores_encoded(query, rows.view(2, 5, 36), weights, hadamard, numbers)
    assert scores.shape == (2, 3, 5) and scores.dtype == torch.float32
    q8, sq = quantize_rotated(query, hadamard, numbers)
    for b, t, s in ((0, 0, 0), (1, 2, 4), (1, 0, 3)):
        row = bytes(rows.view(2, 5, 36)[b, s].tolist())
        k8 = torch.tensor([parse_number(bits, numbers) for bits in row[:32]]).double()
        sk = float(np.frombuffer(row[32:], dtype="<f4")[0])
        products = (numbers_to_float(q8[b, t]).double() @ k8).relu()
        expected = sk * (weights[b, t].double() * sq[b, t, :, 0].double() * products).sum()
        assert scores[b, t, s].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("numbers", "cosine"), [(INT8, 0.9998), (FP8, 0.998)])
def test_scores_are_near_the_unquantised_ones(numbers: NumberFormat, cosine: float) -> None:
    hadamard = hadamard_matrix(128, CPU)
    query, key, weights = _random(1, 8, 64, 128), _random(300, 128, seed=1), _random(1, 8, 64, seed=2)
    rows = encode_index_k(key, hadamard, numbers).unsqueeze(0)
    scores = index_scores_encoded(query, rows, weights, hadamard, numbers)
    plain = index_scores(query, key.unsqueeze(0), weights)
    assert torch.cosine_similarity(scores.flatten(), plain.flatten(), dim=0) > cosine


def test_products_of_int8_numbers_are_exact() -> None:
    """Also the largest, 127 * 127 * 1024: so a score cannot depend on the order in which a batch is summed."""
    hadamard = hadamard_matrix(1024, CPU)
    extreme = torch.full((1, 1024), 127.0) @ hadamard  # rotated, it is 127 everywhere
    for key in (extreme, _random(40, 1024)):
        rows = encode_index_k(key, hadamard, INT8).unsqueeze(0)
        scores = index_scores_encoded(extreme.view(1, 1, 1, 1024), rows, torch.ones(1, 1, 1), hadamard, INT8)
        q8, sq = quantize_rotated(extreme, hadamard, INT8)
        k8, sk = quantize_rotated(key, hadamard, INT8)
        exact = (q8.long() @ k8.long().T).relu()  # [1, S]
        assert exact.max() < 2**24 and (key is not extreme or exact.item() > 0.99 * 127 * 127 * 1024)
        assert torch.equal(scores[0], (exact.float() * sq) * sk.T)


@pytest.mark.parametrize("numbers", FORMATS)
def test_zero_tokens_and_zero_rows_are_accepted(numbers: NumberFormat) -> None:
    layout, hadamard = LatentRowLayout(192, 8, numbers), hadamard_matrix(16, CPU)
    rows = encode_latent(torch.empty(0, 200), layout)
    assert rows.shape == (0, layout.num_bytes) and decode_latent(rows, layout, torch.float32).shape == (0, 200)
    assert encode_index_k(torch.empty(0, 16), hadamard, numbers).shape == (0, 20)
    keys = torch.zeros(1, 5, 20, dtype=torch.uint8)
    none = index_scores_encoded(torch.empty(1, 0, 4, 16), keys, torch.empty(1, 0, 4), hadamard, numbers)
    assert none.shape == (1, 0, 5)
    cache = torch.zeros(2, 4, layout.num_bytes, dtype=torch.uint8)
    slots = torch.empty(0, 6, dtype=torch.int64)
    assert attend_sparse_encoded(torch.empty(0, 2, 200), cache, slots, layout, 0.1).shape == (0, 2, 192)
    write_cache(cache, torch.empty(0, dtype=torch.int64), rows)
    assert not cache.any()


@pytest.mark.parametrize("numbers", FORMATS)
def test_padding_of_the_null_block_is_finite(numbers: NumberFormat) -> None:
    """What a table's padding points at is multiplied by 0 in attention, so it must not be NaN."""
    layout = LatentRowLayout(32, 8, numbers)
    cache = torch.zeros(3, 2, layout.num_bytes, dtype=torch.uint8)
    write_cache(cache, torch.tensor([-1, 2]), encode_latent(_random(2, 40) * 1e3, layout))
    gathered = decode_latent(cache[[1, 0]].flatten(0, 1).unsqueeze(0), layout, torch.float32)  # [1, 4, 40]
    hidden = torch.tensor([[False, True, True, True]])
    out = attend_absorbed(_random(1, 2, 40), gathered, hidden, 32, 0.1)
    assert torch.allclose(out, gathered[:, :1, :32].expand(1, 2, 32), atol=1e-6)
