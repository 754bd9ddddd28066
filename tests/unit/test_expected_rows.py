"""How many of the experts' rows are somebody's: what the host says where it does not know it."""

import torch

from argosy.distributed.ep_arrange import arrange, sum_rows_in_torch
from argosy.distributed.ep_row_ops import TorchRowOps
from argosy.distributed.ep_types import DispatchedTokens, ReceivedRows
from argosy.distributed.pending import Pending, Ready
from argosy.quantization.w8a8_grouped_gemm import W8A8Experts

NUM_EXPERTS, NUM_LOCAL, TOP_K, HIDDEN = 32, 4, 8, 16


class NoReturn:
    """A return path that ends here."""

    reads_empty_lines = True

    def start(self, partial_sums: torch.Tensor, addend: torch.Tensor | None = None) -> Pending[torch.Tensor]:
        return Ready(partial_sums if addend is None else partial_sums + addend)


def dispatch(num_rows: int, num_local_entries: int | None, *, is_padded: bool = False) -> DispatchedTokens:
    generator = torch.Generator().manual_seed(num_rows)
    ids = torch.rand(num_rows, NUM_EXPERTS, generator=generator).topk(TOP_K)[1].to(torch.int32)
    expert_map = torch.full((NUM_EXPERTS + 1,), NUM_LOCAL, dtype=torch.int32)
    expert_map[:NUM_LOCAL] = torch.arange(NUM_LOCAL)
    x, weights = torch.randn(num_rows, HIDDEN, generator=generator), torch.rand(num_rows, TOP_K, generator=generator)
    received = ReceivedRows(x, ids, weights, num_local_entries, NoReturn())
    ops = TorchRowOps()
    return arrange(received, expert_map, NUM_LOCAL, is_padded=is_padded, row_ops=ops, sum_rows=sum_rows_in_torch)


def test_a_rank_expects_its_share_of_the_entries() -> None:
    dispatched = dispatch(1024, None)
    expected = dispatched.num_expected_rows
    assert expected == 1024 * TOP_K * NUM_LOCAL // NUM_EXPERTS
    assert abs(int(dispatched.num_tokens_per_expert.sum()) - expected) < 0.1 * expected
    assert dispatch(1, None).num_expected_rows == 1
    assert dispatch(0, None).num_expected_rows == 0


def test_known_counts_leave_nothing_to_expect() -> None:
    num_local = int(dispatch(64, None).num_tokens_per_expert.sum())
    assert dispatch(64, num_local).num_expected_rows is None


def test_the_hint_changes_nothing_on_a_cpu() -> None:
    experts = W8A8Experts(NUM_LOCAL, HIDDEN, 16)
    for parameter in experts.parameters():
        parameter.fill_(3) if parameter.dtype == torch.int8 else parameter.fill_(0.01)
    sorted_rows, padded = dispatch(40, None), dispatch(40, None, is_padded=True)
    outs = []
    for dispatched in (sorted_rows, padded):
        sums = dispatched.handle.start_combine(experts(dispatched)).wait()
        outs.append(sums)
    assert outs[0].shape == (40, HIDDEN) and outs[0].any()
    assert torch.allclose(*outs)
