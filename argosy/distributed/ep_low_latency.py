"""Low latency: every shape follows from the plan, so nothing is counted, read on the host, or can overflow.

Every rank gets every row, needed there or not: equal parts for all would carry as many bytes, so nothing is gained by
searching for rows, and an all-gather needs no copy for each rank. Sums come back in an all-to-all and are added here in
float32. Invariant: no host sync and no shape that depends on data; a device graph can capture it.

Shape letters: T tokens, C max_tokens_per_rank, G ranks of the ep axis, N = G * C rows, D hidden, W words of a row.
"""

from dataclasses import dataclass
from functools import partial

import torch

from argosy.distributed.communicator import Communicator
from argosy.distributed.ep_message import pack_tokens, unpack
from argosy.distributed.ep_payload import PayloadCodec
from argosy.distributed.ep_types import ExchangePlan, PackedTokens, ReceivedRows, RowOps
from argosy.distributed.pending import Pending, Then


@dataclass(frozen=True, slots=True)
class LowLatencyReturn:
    """Every rank sends a sum for every row, 0 where it has no expert of the token."""

    ep: Communicator
    row_ops: RowOps
    num_tokens: int
    max_tokens_per_rank: int

    def start(self, partial_sums: torch.Tensor) -> Pending[torch.Tensor]:
        by_source = partial_sums.view(self.ep.size, self.max_tokens_per_rank, partial_sums.shape[1])
        flight = self.ep.start_all_to_all(by_source)
        return Then(flight, lambda by_expert_rank: self.row_ops.sum_parts(by_expert_rank, self.num_tokens))


class LowLatencyExchange:
    """Sends ``[C, W]`` to all."""

    def __init__(self, ep: Communicator, codec: PayloadCodec, row_ops: RowOps) -> None:
        self._ep = ep
        self._codec = codec
        self._row_ops = row_ops

    def start(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, plan: ExchangePlan
    ) -> Pending[ReceivedRows]:
        check_fits(x, plan)
        tokens = pack_tokens(x, topk_ids, topk_weights, self._codec)
        flight = self._ep.start_all_gather(self._row_ops.pack_rows(tokens, plan.max_tokens_per_rank))
        return_path = LowLatencyReturn(self._ep, self._row_ops, x.shape[0], plan.max_tokens_per_rank)
        return Then(flight, partial(self._receive, tokens, return_path))

    def _receive(self, tokens: PackedTokens, return_path: LowLatencyReturn, message: torch.Tensor) -> ReceivedRows:
        return ReceivedRows(*unpack(message, tokens, self._codec), None, return_path)


def check_fits(x: torch.Tensor, plan: ExchangePlan) -> None:
    """The step agreement bounds every rank's tokens; more would silently be cut off."""
    if x.shape[0] > plan.max_tokens_per_rank:
        raise RuntimeError(
            f"{x.shape[0]} tokens on this rank, but the ranks agreed on at most {plan.max_tokens_per_rank}"
            f" (mode {plan.mode}): the step's agreement and its batch do not belong together"
        )
