"""Fused kernels on rows between the wire and the experts against their plain twins: bit by bit where nothing is added.

On an NVIDIA card, or without one in Triton's interpreter:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_row_ops.py
"""

import os
from unittest.mock import patch

import pytest
import torch

from argosy.distributed.ep_arrange import sum_rows_in_torch
from argosy.distributed.ep_message import pack_tokens, unpack
from argosy.distributed.ep_payload import PayloadKind, build_payload
from argosy.distributed.ep_row_ops import TorchRowOps
from argosy.distributed.ep_types import PackedTokens, QuantizedRows, ReceivedRows, RowOps
from argosy.distributed.pending import Pending, Ready
from argosy.kernels.select import select_row_ops, select_sum_rows
from tests.helpers.tolerance import FP32_OP_ATOL

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
TWIN = TorchRowOps()
NUM_EXPERTS, NUM_RANKS = 20, 5
# Below, at, and above what one program of a count reads at once for a few tokens.
NUMS_TOKENS = (0, 1, 7, 128, 300)

pytestmark = pytest.mark.skipif(
    not IS_INTERPRETED and not torch.cuda.is_available(), reason="needs an NVIDIA card, or TRITON_INTERPRET=1"
)


@pytest.fixture
def fused() -> RowOps:
    pytest.importorskip("triton")
    chosen = select_row_ops("cuda")
    assert chosen is not None
    return chosen


class NoReturn:
    """A return path that ends here."""

    reads_empty_lines = True

    def start(self, partial_sums: torch.Tensor, addend: torch.Tensor | None = None) -> Pending[torch.Tensor]:
        return Ready(partial_sums if addend is None else partial_sums + addend)


def draw_tokens(
    num_tokens: int, hidden_size: int = 72, k: int = 3, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some ids are -1, some tokens have none; an expert occurs at most once in a token."""
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
    ids = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).topk(k)[1].to(torch.int32)
    ids[torch.rand(num_tokens, k, generator=generator) < 0.2] = -1
    ids[2:4] = -1
    return x.to(DEVICE), ids.to(DEVICE), torch.rand(num_tokens, k, generator=generator).to(DEVICE)


def pack(num_tokens: int, payload: PayloadKind = "model", hidden_size: int = 72, k: int = 3) -> PackedTokens:
    return pack_tokens(*draw_tokens(num_tokens, hidden_size, k), build_payload(payload))


def pack_quantized(num_tokens: int, k: int, num_scales: int) -> PackedTokens:
    _, ids, weights = draw_tokens(num_tokens, k=k)
    dtype = torch.int8 if num_scales == 1 else torch.float8_e4m3fn
    numbers = torch.randint(0, 100, (num_tokens, 144), dtype=torch.int8).to(DEVICE).view(dtype)
    scale = torch.rand(num_scales, num_tokens).to(DEVICE).t()  # columns contiguous
    return pack_tokens(QuantizedRows(numbers, scale, torch.bfloat16), ids, weights, build_payload("model"))


def owners() -> torch.Tensor:
    return torch.arange(NUM_EXPERTS + 1, dtype=torch.int32, device=DEVICE) // (NUM_EXPERTS // NUM_RANKS)


def count_routes(ops: RowOps, topk_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """counts, places."""
    table = torch.full((2, NUM_RANKS, 2), -1, dtype=torch.int32, device=DEVICE)
    places = ops.count_routes(topk_ids, owners(), table[0])
    assert (table[1] == -1).all()
    return table[0], places


@pytest.mark.parametrize("payload", ["model", "int8", "fp8"])
@pytest.mark.parametrize("num_tokens", NUMS_TOKENS)
def test_rows_are_packed_and_filled_up(fused: RowOps, num_tokens: int, payload: PayloadKind) -> None:
    tokens = pack(num_tokens, payload)
    assert tokens.num_spare_words > 0
    for num_rows in (num_tokens, num_tokens + 3):
        assert torch.equal(fused.pack_rows(tokens, num_rows), TWIN.pack_rows(tokens, num_rows))


def test_rows_of_the_real_width_are_packed(fused: RowOps) -> None:
    tokens = pack(3, hidden_size=7168, k=8)
    assert tokens.num_spare_words == 0
    assert torch.equal(fused.pack_rows(tokens, 4), TWIN.pack_rows(tokens, 4))


def test_columns_may_be_strided(fused: RowOps) -> None:
    x, ids, weights = draw_tokens(7)
    strided_ids, strided_weights = ids.t().contiguous().t(), torch.cat((weights, weights), dim=1)[:, 3:]
    strided = pack_tokens(x, strided_ids, strided_weights, build_payload("model"))
    assert torch.equal(fused.pack_rows(strided, 9), TWIN.pack_rows(pack(7), 9))
    for got, expected in zip(count_routes(fused, strided_ids), count_routes(TWIN, ids), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("num_tokens", [*NUMS_TOKENS, 4200])
def test_routes_are_counted(fused: RowOps, num_tokens: int) -> None:
    _, ids, _ = draw_tokens(num_tokens)
    counts, places = count_routes(TWIN, ids)
    fused_counts, fused_places = count_routes(fused, ids)
    assert (fused_counts.dtype, fused_places.dtype) == (counts.dtype, places.dtype) == (torch.int32, torch.int32)
    assert torch.equal(fused_counts, counts)
    assert torch.equal(fused_places, places)


@pytest.mark.parametrize("payload", ["model", "int8", "quantised"])
@pytest.mark.parametrize("num_tokens", NUMS_TOKENS)
def test_tokens_are_packed_for_each_rank_that_needs_them(fused: RowOps, num_tokens: int, payload: str) -> None:
    tokens = pack_quantized(num_tokens, 3, 5) if payload == "quantised" else pack(num_tokens, payload)  # type: ignore[arg-type]
    counts, places = count_routes(TWIN, tokens.topk_ids)

    def num_rows() -> int:
        return int(counts[:, 0].sum())

    message, sent_rows = TWIN.pack_routes(tokens, counts, places, num_rows)
    fused_message, fused_sent_rows = fused.pack_routes(tokens, counts, places.contiguous(), num_rows)
    assert fused_sent_rows.dtype == sent_rows.dtype == torch.int64
    assert torch.equal(fused_message, message)
    assert torch.equal(fused_sent_rows, sent_rows)


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize(("num_rows", "k"), [(0, 3), (1, 3), (7, 3), (128, 8), (420, 20)])
def test_rows_stand_by_expert(fused: RowOps, num_rows: int, k: int, is_padded: bool) -> None:
    codec = build_payload("model")
    tokens = pack(num_rows, k=k)
    expert_map = torch.full((NUM_EXPERTS + 1,), 4, dtype=torch.int32, device=DEVICE)
    expert_map[8:12] = torch.arange(4, device=DEVICE)  # the third of five ranks
    num_local = int((expert_map[tokens.topk_ids] < 4).sum())
    x, ids, weights = unpack(TWIN.pack_rows(tokens, num_rows + 2), tokens, codec)  # strided, with two empty rows
    for known in (None, num_local):
        received = ReceivedRows(x, ids, weights, known, NoReturn())
        arguments = (received.x, received.topk_ids, received.num_local_entries, expert_map, 4)
        rows, counts, row_ids = TWIN.arrange_rows(*arguments, is_padded=is_padded)
        fused_rows, fused_counts, fused_ids = fused.arrange_rows(*arguments, is_padded=is_padded)
        assert (fused_counts.dtype, fused_ids.dtype) == (torch.int32, torch.int64)
        assert torch.equal(fused_counts, counts)
        assert torch.equal(fused_ids, row_ids)
        if is_padded:
            is_owned = torch.arange(num_rows + 2, device=DEVICE) < counts.unsqueeze(1)
            assert torch.equal(fused_rows[is_owned], rows[is_owned])
            assert fused_rows.isfinite().all()
        else:
            assert fused_rows.shape[0] == (ids.numel() if known is None else num_local)
            assert torch.equal(fused_rows[:num_local], rows[:num_local])


@pytest.mark.parametrize("num_scales", [1, 5])
@pytest.mark.parametrize("num_rows", [0, 1, 7, 128])
def test_quantised_rows_stand_by_expert_with_their_scales(fused: RowOps, num_rows: int, num_scales: int) -> None:
    _, ids, _ = draw_tokens(num_rows)
    dtype = torch.int8 if num_scales == 1 else torch.float8_e4m3fn
    numbers = torch.randint(0, 100, (num_rows, 144), dtype=torch.int8).to(DEVICE).view(dtype)
    scale = torch.rand(num_scales, num_rows).to(DEVICE).t()  # columns contiguous
    expert_map = torch.arange(NUM_EXPERTS + 1, dtype=torch.int32, device=DEVICE)
    arguments = QuantizedRows(numbers, scale, torch.bfloat16), ids, None, expert_map, NUM_EXPERTS
    rows, counts, row_ids = TWIN.arrange_quantized(*arguments)
    fused_rows, fused_counts, fused_ids = fused.arrange_quantized(*arguments)
    num_owned = int((ids >= 0).sum())
    assert torch.equal(fused_counts, counts) and torch.equal(fused_ids, row_ids)
    assert fused_rows.numbers.dtype == dtype and fused_rows.dtype == torch.bfloat16
    assert fused_rows.numbers.shape == (ids.numel(), 144) and fused_rows.scale.shape == (ids.numel(), num_scales)
    found, expected = (part.numbers[:num_owned].view(torch.uint8) for part in (fused_rows, rows))
    assert torch.equal(found, expected)
    assert torch.equal(fused_rows.scale[:num_owned], rows.scale[:num_owned])


@pytest.mark.parametrize("num_scales", [1, 5])
@pytest.mark.parametrize(("num_rows", "k"), [(7, 3), (128, 8), (420, 20)])
def test_received_rows_in_eight_bits_stand_by_expert(fused: RowOps, num_rows: int, k: int, num_scales: int) -> None:
    tokens = pack_quantized(num_rows, k, num_scales)
    message = TWIN.pack_rows(tokens, num_rows + 2)
    assert torch.equal(fused.pack_rows(tokens, num_rows + 2), message)
    x, ids, _ = unpack(message, tokens, build_payload("model"))  # strided, with two empty rows
    assert isinstance(x, QuantizedRows)
    expert_map = torch.full((NUM_EXPERTS + 1,), 4, dtype=torch.int32, device=DEVICE)
    expert_map[8:12] = torch.arange(4, device=DEVICE)
    num_local = int((expert_map[tokens.topk_ids] < 4).sum())
    for known in (None, num_local):
        rows, counts, row_ids = TWIN.arrange_quantized(x, ids, known, expert_map, 4)
        fused_rows, fused_counts, fused_ids = fused.arrange_quantized(x, ids, known, expert_map, 4)
        assert torch.equal(fused_counts, counts) and torch.equal(fused_ids, row_ids)
        assert len(fused_rows.numbers) == len(fused_rows.scale) == (ids.numel() if known is None else known)
        found, expected = (part.numbers[:num_local].view(torch.uint8) for part in (fused_rows, rows))
        assert torch.equal(found, expected)
        assert torch.equal(fused_rows.scale[:num_local], rows.scale[:num_local])


@pytest.mark.parametrize("num_local_experts", [1, 5, 16])
@pytest.mark.parametrize(("num_rows", "k"), [(129, 8), (343, 3), (1100, 1)])
def test_a_share_of_many_rows_stands_by_expert(fused: RowOps, num_rows: int, k: int, num_local_experts: int) -> None:
    """Chunks end inside rows, one is not full, and experts have none or more of one chunk than half of it."""
    generator = torch.Generator().manual_seed(num_rows)
    ids = torch.rand(num_rows, NUM_EXPERTS, generator=generator).topk(k)[1].to(torch.int32)
    ids[torch.rand(num_rows, k, generator=generator) < 0.2] = -1
    if k == 1:
        ids[100:400] = 2  # whole chunks
    message = torch.randint(-100, 100, (num_rows, 72), dtype=torch.int8, generator=generator).to(DEVICE)
    words = torch.full((num_rows, 5 + k), -7, dtype=torch.int32)
    words[:, 3 : 3 + k] = ids
    ids = words.to(DEVICE)[:, 3 : 3 + k]  # strided, behind no whole 16 bytes
    scale = torch.rand(num_rows, 3, generator=generator).to(DEVICE)[:, 1:2]
    expert_map = torch.full((NUM_EXPERTS + 1,), num_local_experts, dtype=torch.int32, device=DEVICE)
    order = torch.randperm(NUM_EXPERTS, generator=generator)
    expert_map[order[:num_local_experts].to(DEVICE)] = torch.arange(num_local_experts, dtype=torch.int32, device=DEVICE)
    expert_map[2] = 0
    arguments = QuantizedRows(message, scale, torch.bfloat16), ids, None, expert_map, num_local_experts
    rows, counts, row_ids = TWIN.arrange_quantized(*arguments)
    fused_rows, fused_counts, fused_ids = fused.arrange_quantized(*arguments)
    assert torch.equal(fused_counts, counts) and torch.equal(fused_ids, row_ids)
    num_owned = int(counts.sum())
    assert torch.equal(fused_rows.numbers[:num_owned], rows.numbers[:num_owned])
    assert torch.equal(fused_rows.scale[:num_owned], rows.scale[:num_owned])


@pytest.mark.parametrize("capacity", [None, 4000])
@pytest.mark.parametrize(("num_chunks", "num_local_experts"), [(0, 3), (1, 1), (700, 13), (2500, 5)])
def test_chunks_of_many_entries_are_added_up(num_chunks: int, num_local_experts: int, capacity: int | None) -> None:
    """Also those that a program reads in several blocks."""
    arrange_rows = pytest.importorskip("argosy.kernels.triton.arrange_rows")
    generator = torch.Generator().manual_seed(num_chunks)
    table = torch.randint(0, 129, (num_chunks, 16), dtype=torch.uint8, generator=generator).to(DEVICE)
    counts, starts = arrange_rows._sum_chunks(table, num_local_experts, capacity)
    numbers = table[:, :num_local_experts].long()
    expected = numbers.sum(dim=0)
    assert torch.equal(counts.long(), expected)
    first = torch.arange(num_local_experts, device=DEVICE) * capacity if capacity else expected.cumsum(0) - expected
    assert torch.equal(starts[:, :num_local_experts].long(), first + numbers.cumsum(0) - numbers)


@pytest.mark.parametrize("num_local_experts", [4, 16])
def test_rows_behind_the_last_expert_s_are_not_written(num_local_experts: int) -> None:
    arrange_chunks = pytest.importorskip("argosy.kernels.triton.arrange_chunks")
    x, ids, _ = draw_tokens(140, k=8)
    expert_map = torch.arange(NUM_EXPERTS + 1, dtype=torch.int32, device=DEVICE).clamp(max=num_local_experts)
    rows = torch.full((ids.numel(), x.shape[1]), float("nan"), dtype=x.dtype, device=DEVICE)
    table_size = arrange_chunks.choose_table(ids.numel(), num_local_experts, NUM_EXPERTS)
    assert table_size is not None
    counts, row_ids = arrange_chunks.arrange_chunks(x, ids, expert_map, rows, num_local_experts, table_size)
    num_owned = int(counts.sum())
    assert num_owned == int(((ids >= 0) & (ids < num_local_experts)).sum())
    assert rows[:num_owned].isfinite().all() and rows[num_owned:].isnan().all()
    is_owned = row_ids >= 0
    assert torch.equal(row_ids[is_owned].sort()[0], torch.arange(num_owned, device=DEVICE))
    assert torch.equal(rows[row_ids[is_owned]], x.repeat_interleave(is_owned.sum(dim=1), dim=0))


@pytest.mark.parametrize("hidden_size", [72, 7168])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_visited_parts_are_summed(fused: RowOps, num_tokens: int, dtype: torch.dtype, hidden_size: int) -> None:
    """More parts than ids and fewer; a part that no id of the token names holds NaN."""
    for num_parts in (1, 2, 5):
        generator = torch.Generator().manual_seed(num_parts)
        expert_owner = (torch.arange(3 * num_parts + 1, dtype=torch.int32) // 3).to(DEVICE)
        ids = torch.rand(num_tokens, 3 * num_parts, generator=generator).argsort(dim=1)[:, :3].int().to(DEVICE)
        if num_tokens > 1:
            ids[0], ids[1, 0] = -1, -1
        parts = torch.randn(num_parts, 7, hidden_size, generator=generator).to(DEVICE, dtype)
        expected = torch.zeros(num_tokens, hidden_size, device=DEVICE)
        for part in range(num_parts):
            is_visited = (expert_owner[ids] == part).any(dim=1)
            expected[is_visited] += parts[part, :num_tokens][is_visited].float()
            parts[part, :num_tokens][~is_visited] = float("nan")
        parts[:, num_tokens:] = float("nan")
        out = fused.sum_visited_parts(parts, ids, expert_owner)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, expected, atol=FP32_OP_ATOL, rtol=1e-5)
        twin = TWIN.sum_visited_parts(parts, ids, expert_owner)
        torch.testing.assert_close(twin, expected, atol=FP32_OP_ATOL, rtol=1e-5)
        addend = torch.randn(num_tokens, hidden_size, generator=generator).to(DEVICE, dtype)
        onto = fused.sum_visited_parts(parts, ids, expert_owner, addend)
        # The interpreter cuts bfloat16 off instead of rounding.
        tolerance = 2**-7 if IS_INTERPRETED and dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(onto, (out + addend).to(dtype), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("hidden_size", [72, 1536, 8320])
@pytest.mark.parametrize("num_lines", [0, 1, 7, 40])
def test_rows_are_summed(num_lines: int, hidden_size: int, is_sparse: bool) -> None:
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(num_lines)
    around = torch.randn(31, hidden_size, generator=generator).to(DEVICE, torch.bfloat16)
    around[0] = around[30] = float("nan")  # nobody's; the first is where an id of -1 would read
    rows = around[1:]
    row_ids = torch.randint(-1, 29, (num_lines, 5), generator=generator).to(DEVICE)
    if is_sparse:
        row_ids[torch.rand(num_lines, 5, generator=generator).to(DEVICE) < 0.8] = -1
        row_ids[:3] = -1
    weights = torch.rand(num_lines, 5, generator=generator).to(DEVICE)
    sum_rows = select_sum_rows("cuda", sum_rows_in_torch)
    for factors in (weights, None):
        out = sum_rows(rows, row_ids, factors, torch.float32, is_sparse=is_sparse)
        expected = sum_rows_in_torch(rows, row_ids, factors, torch.float32)
        torch.testing.assert_close(out, expected, atol=FP32_OP_ATOL, rtol=1e-5)
        addend = torch.randn(num_lines, hidden_size, generator=generator).to(DEVICE, torch.bfloat16)
        out = sum_rows(rows, row_ids, factors, torch.float32, addend, is_sparse=is_sparse)
        expected = sum_rows_in_torch(rows, row_ids, factors, torch.float32, addend)
        torch.testing.assert_close(out, expected, atol=FP32_OP_ATOL, rtol=1e-5)


@pytest.mark.parametrize("num_lines", [1, 40])
def test_empty_lines_may_be_skipped(num_lines: int) -> None:
    pytest.importorskip("triton")
    from argosy.kernels.triton import sum_rows as module

    generator = torch.Generator().manual_seed(num_lines)
    rows = torch.randn(30, 72, generator=generator).to(DEVICE, torch.bfloat16)
    row_ids = torch.randint(-30, 30, (num_lines, 2), generator=generator).clamp(min=-1).to(DEVICE)
    row_ids[0] = -1
    is_empty = (row_ids < 0).all(dim=1)
    new_empty = torch.Tensor.new_empty

    def new_sevens(x: torch.Tensor, *shape: int, **options: torch.dtype) -> torch.Tensor:
        return new_empty(x, *shape, **options).fill_(7)

    with patch.object(torch.Tensor, "new_empty", new_sevens):
        out = module.sum_rows(rows, row_ids, None, torch.float32, is_sparse=True, skips_empty=True)
    expected = sum_rows_in_torch(rows, row_ids, None, torch.float32)
    assert (out[is_empty] == 7.0).all()
    torch.testing.assert_close(out[~is_empty], expected[~is_empty], atol=FP32_OP_ATOL, rtol=1e-5)
