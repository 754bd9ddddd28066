"""What a rank does alone: rows of the message, payload codecs, and arranging received rows for the experts."""

import pytest
import torch

from argosy.distributed.ep_arrange import arrange, sum_rows_in_torch
from argosy.distributed.ep_message import pack_tokens, pad_rows, unpack
from argosy.distributed.ep_payload import PayloadKind, build_payload
from argosy.distributed.ep_row_ops import TorchRowOps
from argosy.distributed.ep_types import DispatchedTokens, ReceivedRows
from argosy.distributed.pending import Pending, Ready
from tests.helpers.ep_cases import decoded, poison_unowned_rows
from tests.helpers.tolerance import FP32_OP_ATOL

PAYLOADS: tuple[PayloadKind, ...] = ("model", "int8", "fp8")


def random_tokens(num_tokens: int, hidden_size: int, k: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens + hidden_size)
    x = torch.randn(num_tokens, hidden_size, generator=generator)
    x *= torch.logspace(-3, 2, num_tokens).unsqueeze(1)  # a scale that were shared between tokens would show
    ids = torch.randint(-1, 200, (num_tokens, k), generator=generator, dtype=torch.int32)
    return x, ids, torch.rand(num_tokens, k, generator=generator)


@pytest.mark.parametrize(
    ("payload", "row_bytes"),
    [
        ("model", 2 * 7168 + 64),  # bf16, then 8 ids and 8 weights
        ("int8", 7168 + 4 + 64 + 12),  # one scale; whole 16 bytes
        ("fp8", 7168 + 4 * 56 + 64),  # 56 scales
    ],
)
def test_row_bytes_at_the_real_width(payload: PayloadKind, row_bytes: int) -> None:
    x, ids, weights = random_tokens(1, 7168)
    assert pack_tokens(x.bfloat16(), ids, weights, build_payload(payload)).row_bytes == row_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_selected_rows_arrive_as_they_were(num_tokens: int, payload: PayloadKind, dtype: torch.dtype) -> None:
    codec = build_payload(payload)
    x, ids, weights = random_tokens(num_tokens, 136)
    x = x.to(dtype)
    tokens = pack_tokens(x, ids, weights, codec)
    chosen = torch.tensor([i % num_tokens for i in (5, 0, 3)] if num_tokens else [], dtype=torch.int64)
    got_x, got_ids, got_weights = unpack(tokens.rows[chosen], tokens, codec)
    assert got_x.dtype == dtype
    assert torch.equal(got_x, decoded(codec, x)[chosen])
    assert torch.equal(got_ids, ids[chosen])
    assert torch.equal(got_weights, weights[chosen])


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("num_tokens", [0, 3, 5])
def test_empty_rows_of_a_fixed_message_hold_zeros_for_nobody(num_tokens: int, payload: PayloadKind) -> None:
    codec = build_payload(payload)
    x, ids, weights = random_tokens(num_tokens, 136)
    tokens = pack_tokens(x, ids, weights, codec)
    got_x, got_ids, got_weights = unpack(pad_rows(tokens, 5), tokens, codec)
    assert torch.equal(got_x[:num_tokens], decoded(codec, x))
    assert torch.equal(got_ids[:num_tokens], ids)
    assert torch.equal(got_weights[:num_tokens], weights)
    assert torch.equal(got_x[num_tokens:], torch.zeros(5 - num_tokens, 136))
    assert (got_ids[num_tokens:] == -1).all()


def test_int8_rounds_to_half_a_step_of_the_tokens_own_scale() -> None:
    x, _, _ = random_tokens(9, 136)
    x[4] = 0.0
    codec = build_payload("int8")
    step = x.abs().amax(dim=1, keepdim=True) / 127
    assert ((decoded(codec, x) - x).abs() <= step * 0.5001).all()


def test_fp8_keeps_each_blocks_own_scale() -> None:
    x, _, _ = random_tokens(9, 136)
    x[:, :128] *= 1e-4  # the first block lives far below the second
    x[4] = 0.0
    codec = build_payload("fp8")
    error = (decoded(codec, x) - x).abs()
    for block in (slice(0, 128), slice(128, 136)):
        amax = x[:, block].abs().amax(dim=1, keepdim=True)
        # e4m3: 3 bits of mantissa, half a step is 1/16; the smallest numbers are multiples of 2^-9 of amax / 448.
        assert (error[:, block] <= x[:, block].abs() / 16 + amax / 448 * 2**-9).all()


def test_a_width_that_is_not_whole_words_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden_size \(30\).*30 bytes.*--ep 1"):
        build_payload("int8").encode(torch.zeros(2, 30))


def test_an_unknown_payload_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'int4'.*model, int8, fp8.*--ep-payload"):
        build_payload("int4")  # type: ignore[arg-type]


class KeepSums:
    """A return path that ends here."""

    reads_empty_lines = True

    def start(self, partial_sums: torch.Tensor, addend: torch.Tensor | None = None) -> Pending[torch.Tensor]:
        return Ready(partial_sums if addend is None else partial_sums + addend)


def arrange_here(received: ReceivedRows, *, is_padded: bool) -> DispatchedTokens:
    """Experts 0, 1 and 2 are here, 3 is not."""
    expert_map = torch.arange(4, dtype=torch.int32)
    return arrange(received, expert_map, 3, is_padded=is_padded, row_ops=TorchRowOps(), sum_rows=sum_rows_in_torch)


@pytest.mark.parametrize("form", ["exact", "spare rows", "read on the host", "padded"])
@pytest.mark.parametrize("num_rows", [0, 1, 6])
def test_arranged_rows_come_back_as_weighted_sums(num_rows: int, form: str) -> None:
    num_local_experts, none = 3, 3
    x, _, weights = random_tokens(num_rows, 16, k=4)
    local_ids = torch.tensor([[2, none, 0, 1], [none] * 4, [none, 1, none, none]] * 2, dtype=torch.int32)[:num_rows]
    num_entries = int((local_ids != none).sum())
    known = {"exact": num_entries, "spare rows": local_ids.numel(), "read on the host": None, "padded": None}
    received = ReceivedRows(x, local_ids, weights, known[form], KeepSums())
    dispatched = arrange_here(received, is_padded=form == "padded")
    counts = [int((local_ids == expert).sum()) for expert in range(num_local_experts)]
    assert dispatched.num_tokens_per_expert.tolist() == counts
    assert dispatched.num_tokens_per_expert.dtype == torch.int32
    factors = torch.tensor([1.0, 10.0, 100.0])  # expert i multiplies by 10^i
    if form == "padded":
        assert dispatched.hidden_states.shape == (num_local_experts, num_rows, 16)
        expert_out = dispatched.hidden_states * factors.view(3, 1, 1)
    else:
        rows = local_ids.numel() if form == "spare rows" else num_entries
        assert dispatched.hidden_states.shape == (rows, 16)
        by_row = torch.cat((factors.repeat_interleave(torch.tensor(counts)), torch.ones(rows - num_entries)))
        expert_out = dispatched.hidden_states * by_row.unsqueeze(1)
    sums = dispatched.handle.start_combine(poison_unowned_rows(expert_out, dispatched)).wait()
    scale = (torch.cat((factors, torch.zeros(1)))[local_ids] * weights).sum(dim=1, keepdim=True)
    torch.testing.assert_close(sums, x * scale, atol=FP32_OP_ATOL, rtol=1e-5)


def test_padding_rows_hold_finite_values() -> None:
    """So that an expert kernel that computes them raises no flags."""
    x, _, weights = random_tokens(6, 16, k=4)
    local_ids = torch.full((6, 4), 3, dtype=torch.int32)
    received = ReceivedRows(x, local_ids, weights, None, KeepSums())
    assert arrange_here(received, is_padded=True).hidden_states.isfinite().all()
