"""The indexer's fused kernels against their specification: scores to rounding, the chosen sets exactly.

On an NVIDIA card, or without one in Triton's interpreter, at small sizes:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_indexer_triton.py
"""

import os
from types import ModuleType

import pytest
import torch

from argosy.kernels import reference, reference_cache_rows
from argosy.kernels.reference_cache_rows import FP8, INT8, NumberFormat

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
# The interpreter cuts bfloat16 where a card rounds.
DTYPES = (torch.float32,) if IS_INTERPRETED else (torch.float32, torch.bfloat16)
FORMATS = (INT8, FP8)
HEADS, DIM = (32, 32) if IS_INTERPRETED else (64, 128)
TOPK = 64 if IS_INTERPRETED else 2048

pytestmark = pytest.mark.skipif(
    not IS_INTERPRETED and not torch.cuda.is_available(), reason="needs an NVIDIA card, or TRITON_INTERPRET=1"
)


@pytest.fixture
def scorer() -> ModuleType:
    pytest.importorskip("triton")
    from argosy.kernels.triton import index_scores

    return index_scores


@pytest.fixture
def chooser() -> ModuleType:
    pytest.importorskip("triton")
    from argosy.kernels.triton import topk

    return topk


# --- scores -----------------------------------------------------------------------------------------------------------

# Visible keys of every token: one, a block's and one more, a tile's end and one more, none at all; requests of a few
# tokens share tiles, requests of many stream past one.
VISIBLE = (
    (((1,), (17,), (128,), (129,), (0,), (150,)), ((148, 149), (3, 4)), (tuple(range(61, 91)),))
    if IS_INTERPRETED
    else (
        ((1,), (65,), (128,), (129,), (0,), (9300,)),
        ((4095, 4096), (3, 4)),
        (tuple(range(1, 301)), tuple(range(4000, 4300))),
        (tuple(range(70000, 70064)),),
    )
)
BLOCK_SIZE = 16 if IS_INTERPRETED else 64


def draw(
    visible: tuple[tuple[int, ...], ...], dtype: torch.dtype, dim: int = DIM, block_size: int = BLOCK_SIZE
) -> tuple[torch.Tensor, ...]:
    """index_q, index_k [blocks, block_size, I], weights, a table wider than needed, num_visible, the longest length.

    Block 0 is what padded rows name; what is behind the visible keys is NaN.
    """
    torch.manual_seed(0)
    batch, num_tokens, longest = len(visible), len(visible[0]), max(map(max, visible))
    num_blocks = -(-longest // block_size)
    table = torch.zeros(batch, num_blocks + 3, dtype=torch.int32)
    table[:, :num_blocks] = torch.randperm(batch * num_blocks).view(batch, num_blocks) + 1
    cache = torch.randn(batch * num_blocks + 1, block_size, dim)
    for request, counts in enumerate(visible):
        if (last := max(counts)) < num_blocks * block_size:
            cache[table[request, last // block_size], last % block_size :] = float("nan")
    index_q = torch.randn(batch, num_tokens, HEADS, dim)
    weights = torch.randn(batch, num_tokens, HEADS) * (HEADS * dim) ** -0.5
    num_visible = torch.tensor(visible, dtype=torch.int32)
    return tuple(x.to(DEVICE) for x in (index_q.to(dtype), cache.to(dtype), weights, table, num_visible))


def assert_same(scores: torch.Tensor, expected: torch.Tensor, num_visible: torch.Tensor, tolerance: float) -> None:
    """All that is visible, and nothing else."""
    assert scores.shape == expected.shape
    is_visible = torch.arange(scores.shape[2], device=DEVICE) < num_visible.unsqueeze(2)
    out, expected = scores[is_visible], expected[is_visible]
    assert expected.isfinite().all()
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("visible", VISIBLE, ids=lambda visible: f"{len(visible)}x{len(visible[0])}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores(scorer: ModuleType, dtype: torch.dtype, visible: tuple[tuple[int, ...], ...]) -> None:
    index_q, cache, weights, table, num_visible = draw(visible, dtype)
    longest = max(map(max, visible))
    keys = reference.gather_cache(cache, table, longest)
    expected = reference.index_scores(index_q, keys, weights)
    for max_seq_len in (longest, longest + 2 * BLOCK_SIZE):  # a table's width, as in a device graph
        scores = scorer.index_scores_paged(index_q, cache, weights, table, num_visible, max_seq_len)
        assert_same(scores[..., :longest], expected, num_visible, 3e-5)


@pytest.mark.parametrize("visible", VISIBLE, ids=lambda visible: f"{len(visible)}x{len(visible[0])}")
@pytest.mark.parametrize("numbers", FORMATS, ids=lambda numbers: str(numbers.dtype))
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_encoded_keys(
    scorer: ModuleType, dtype: torch.dtype, numbers: NumberFormat, visible: tuple[tuple[int, ...], ...]
) -> None:
    index_q, keys, weights, table, num_visible = draw(visible, dtype)
    longest = max(map(max, visible))
    hadamard = reference_cache_rows.hadamard_matrix(DIM, torch.device(DEVICE))
    cache = reference_cache_rows.encode_index_k(keys.nan_to_num().view(-1, DIM), hadamard, numbers)
    cache = cache.view(*keys.shape[:2], DIM + 4)
    key_rows = reference.gather_cache(cache, table, longest)
    expected = reference_cache_rows.index_scores_encoded(index_q, key_rows, weights, hadamard, numbers)
    scores = scorer.index_scores_paged_encoded(index_q, cache, weights, table, num_visible, longest, hadamard, numbers)
    # Rotated in another order, a query's number now and then moves by one step.
    assert_same(scores, expected, num_visible, 3e-3 if numbers is INT8 else 1e-2)


@pytest.mark.parametrize("numbers", FORMATS, ids=lambda numbers: str(numbers.dtype))
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_are_quantised_as_specified(scorer: ModuleType, dtype: torch.dtype, numbers: NumberFormat) -> None:
    """Rows of zeros and of the smallest numbers too; 150 rows end inside a tile."""
    torch.manual_seed(3)
    index_q = torch.randn(1, 5, 30, DIM, device=DEVICE)
    index_q[0, 1], index_q[0, 2] = 0.0, index_q[0, 2] * 1e-6
    index_q, weights = index_q.to(dtype), torch.randn(1, 5, 30, device=DEVICE)
    hadamard = reference_cache_rows.hadamard_matrix(DIM, torch.device(DEVICE))
    quantized, scaled = scorer.quantize_queries(index_q, weights, hadamard, numbers)
    expected, scale = reference_cache_rows.quantize_rotated(index_q, hadamard, numbers)
    torch.testing.assert_close(scaled, weights * scale.squeeze(-1), rtol=1e-6, atol=0)
    numbers_out, numbers_expected = quantized.float(), expected.float()
    step = (numbers_expected.abs() / 8).clamp(min=1)  # or more than one, of either format
    assert ((numbers_out - numbers_expected).abs() <= step).all()
    assert (numbers_out != numbers_expected).float().mean() <= 1e-3


def test_only_sizes_of_tensor_instructions_are_taken(scorer: ModuleType) -> None:
    """``choice_attention.py`` gives others to the reference."""
    taken = {
        (heads, dim) for heads in (8, 16, 40, 64) for dim in (24, 128) if scorer.takes(torch.empty(1, 2, heads, dim))
    }
    assert taken == {(16, 128), (64, 128)}


def test_no_tokens_and_no_keys(scorer: ModuleType) -> None:
    index_q, cache, weights, table, num_visible = draw(((5,), (7,)), torch.float32)
    assert scorer.index_scores_paged(index_q, cache, weights, table, num_visible, 0).shape == (2, 1, 0)
    parts = (index_q[:0], cache, weights[:0], table[:0], num_visible[:0])
    assert scorer.index_scores_paged(*parts, 7).shape == (0, 1, 7)
    hadamard = reference_cache_rows.hadamard_matrix(DIM, torch.device(DEVICE))
    rows = cache.new_zeros(*cache.shape[:2], DIM + 4, dtype=torch.uint8)
    parts = (index_q[:0], rows, weights[:0], table[:0], num_visible[:0])
    assert scorer.index_scores_paged_encoded(*parts, 7, hadamard, INT8).shape == (0, 1, 7)


# --- choice -----------------------------------------------------------------------------------------------------------


def assert_chosen(chooser: ModuleType, scores: torch.Tensor, num_visible: list[int], *, block_size: int = 64) -> None:
    """The specification's set, in order of position, whatever is behind ``num_visible``."""
    num_rows, width = scores.shape
    num_blocks = -(-width // block_size)
    counts = torch.tensor(num_visible, device=DEVICE)
    garbage = torch.where(torch.arange(width, device=DEVICE) < counts.unsqueeze(1), scores, float("nan"))
    garbage[:, 1::2] = torch.where(garbage[:, 1::2].isnan(), float("inf"), garbage[:, 1::2])
    for num_tables in {1, num_rows}:  # in order, so that slots are in order of position
        table = torch.arange(num_tables * num_blocks, dtype=torch.int32, device=DEVICE).view(num_tables, num_blocks)
        expected = reference.select_topk_slots(scores, counts, TOPK, table, block_size)
        chosen = torch.where(expected < 0, 2**60, expected).sort(dim=1).values
        chosen = torch.where(chosen == 2**60, -1, chosen)
        given = counts.int() if num_tables == 1 else counts
        slots = chooser.select_topk_slots(garbage, given, TOPK, table, block_size)
        assert slots.dtype == torch.int64 and torch.equal(slots, chosen)


def draw_scores(kind: str, num_rows: int, width: int) -> torch.Tensor:
    torch.manual_seed(width)
    normal = torch.randn(num_rows, width, device=DEVICE)
    match kind:
        case "normal":
            return normal
        case "ties":
            return (normal * 2).round() / 2  # zeros of both signs among them
        case "equal":
            return torch.full_like(normal, -1.5)
        case "zeros":
            return normal.sign() * 0.0
        case "wide":
            return (normal * 30).exp() * normal.sign()
        case "infinities":
            return torch.where(normal > 1, float("inf"), torch.where(normal < -1, -float("inf"), normal))
        case "extremes":
            return normal.sign() * torch.finfo(torch.float32).max
        case _:
            return (normal * 3).round() * 1e-45  # the smallest numbers there are


KINDS = ("normal", "ties", "equal", "zeros", "wide", "infinities", "extremes", "smallest")


@pytest.mark.parametrize("kind", KINDS)
def test_choice(chooser: ModuleType, kind: str) -> None:
    """One score, as many as are chosen, one more, few more, and all; a row's length is no multiple of anything."""
    width = TOPK * 4 + 5
    num_visible = [1, TOPK - 1, TOPK, TOPK + 1, TOPK + 9, width - 3, width]
    assert_chosen(chooser, draw_scores(kind, len(num_visible), width), num_visible)


@pytest.mark.parametrize("kind", ("normal", "ties"))
@pytest.mark.parametrize("width", (1, 3, TOPK, TOPK + 1))
def test_choice_from_short_rows(chooser: ModuleType, width: int, kind: str) -> None:
    assert_chosen(chooser, draw_scores(kind, 3, width), [width, 1, max(1, width - 1)], block_size=16)


@pytest.mark.parametrize("kind", ("normal", "ties", "equal"))
def test_choice_from_long_rows(chooser: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Rows that are thinned once or twice, beside rows that need it less or not at all."""
    width = 160_000
    if IS_INTERPRETED:
        width = 530
        monkeypatch.setattr(chooser, "MAX_BLOCK", 256)
        monkeypatch.setattr(chooser, "CHUNK", 128)
    chunk = chooser.CHUNK
    num_visible = [width, chunk + 1, 2 * chunk + TOPK - 1]
    assert_chosen(chooser, draw_scores(kind, len(num_visible), width), num_visible, block_size=48)


def test_choice_from_rows_of_a_wider_tensor(chooser: ModuleType) -> None:
    wide = draw_scores("normal", 3, 32 * (TOPK // 8))
    assert_chosen(chooser, wide[:, : TOPK * 3 + 1], [TOPK * 3 + 1, TOPK * 2, 7])


def test_scores_that_are_no_numbers_come_first(chooser: ModuleType) -> None:
    """So that a broken model's slots are cache slots all the same."""
    scores = draw_scores("normal", 2, TOPK * 3)
    scores[0, 7::100], scores[1, TOPK // 2 :] = float("nan"), float("nan")
    counts = torch.full((2,), TOPK * 3, dtype=torch.int32, device=DEVICE)
    table = torch.arange(TOPK, dtype=torch.int32, device=DEVICE).unsqueeze(0)
    slots = chooser.select_topk_slots(scores, counts, TOPK, table, 16)
    assert torch.equal(slots, reference.select_topk_slots(scores, counts, TOPK, table, 16).sort(dim=1).values)


def test_choice_from_no_rows(chooser: ModuleType) -> None:
    scores = torch.empty(0, 100, device=DEVICE)
    table = torch.zeros(1, 8, dtype=torch.int32, device=DEVICE)
    slots = chooser.select_topk_slots(scores, torch.empty(0, dtype=torch.int32, device=DEVICE), TOPK, table, 16)
    assert slots.shape == (0, TOPK)


# --- the choice as bits -----------------------------------------------------------------------------------------------


def assert_masked(chooser: ModuleType, scores: torch.Tensor, num_visible: list[int]) -> None:
    """The specification's bits, whatever is behind ``num_visible``; whole vectors hold nothing else."""
    num_rows, width = scores.shape
    counts = torch.tensor(num_visible, device=DEVICE)
    garbage = torch.where(torch.arange(width, device=DEVICE) < counts.unsqueeze(1), scores, float("nan"))
    garbage[:, 1::2] = torch.where(garbage[:, 1::2].isnan(), float("inf"), garbage[:, 1::2])
    mask = chooser.select_topk_mask(garbage, counts.int(), TOPK)
    expected = reference.select_topk_mask(scores, counts, TOPK)
    assert mask.dtype == torch.int32 and mask.stride(0) % 4 == 0 and torch.equal(mask, expected)
    spare = mask.as_strided((num_rows, mask.stride(0)), mask.stride())[:, mask.shape[1] :]
    assert not spare.any()


@pytest.mark.parametrize("kind", KINDS)
def test_mask(chooser: ModuleType, kind: str) -> None:
    width = TOPK * 4 + 5
    num_visible = [0, 1, TOPK - 1, TOPK, TOPK + 1, TOPK + 9, width - 3, width]
    assert_masked(chooser, draw_scores(kind, len(num_visible), width), num_visible)


@pytest.mark.parametrize("kind", ("normal", "ties"))
@pytest.mark.parametrize("width", (1, 32, 33, TOPK, TOPK + 1, 5 * TOPK, 12 * TOPK))
def test_mask_of_rows_of_any_length(chooser: ModuleType, width: int, kind: str) -> None:
    """Words that no block reaches too."""
    assert_masked(chooser, draw_scores(kind, 4, width), [width, 1, max(1, width - 1), width // 2])


def test_mask_of_rows_of_a_wider_tensor(chooser: ModuleType) -> None:
    wide = draw_scores("ties", 3, 32 * (TOPK // 8))
    assert_masked(chooser, wide[:, : TOPK * 3 + 1], [TOPK * 3 + 1, TOPK * 2, 7])


def test_mask_of_nothing(chooser: ModuleType) -> None:
    counts = torch.empty(0, dtype=torch.int32, device=DEVICE)
    assert chooser.select_topk_mask(torch.empty(0, 100, device=DEVICE), counts, TOPK).shape == (0, 4)
    counts = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    assert chooser.select_topk_mask(torch.empty(3, 0, device=DEVICE), counts, TOPK).shape == (3, 0)


def test_slots_and_mask_are_the_same_choice(chooser: ModuleType) -> None:
    scores, width = draw_scores("ties", 3, TOPK * 3), TOPK * 3
    counts = torch.tensor([width, TOPK + 3, 5], dtype=torch.int32, device=DEVICE)
    table = torch.arange(-(-width // 16), dtype=torch.int32, device=DEVICE).unsqueeze(0)
    slots = chooser.select_topk_slots(scores, counts, TOPK, table, 16)
    is_chosen = reference.unpack_mask(chooser.select_topk_mask(scores, counts, TOPK), width)
    for row in range(3):
        assert torch.equal(is_chosen[row].nonzero().squeeze(1), slots[row][slots[row] >= 0])
