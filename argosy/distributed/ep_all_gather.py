"""All-gather: every rank gets every token, computes its own experts' share, and a reduce-scatter adds the shares.

The simplest exchange, good where most tokens visit most ranks anyway (few ranks, or K near their number). It differs
from low latency in the way home: a ring adds in flight, which takes no room for every rank's part and crosses each link
between hosts with one sum instead of one for every rank behind it, but takes a hop a rank. Invariant: every shape
follows from the plan; no host sync.

Shape letters: T tokens, C max_tokens_per_rank, G ranks of the ep axis, N = G * C rows, D hidden, W words of a row.
"""

from dataclasses import dataclass
from functools import partial

import torch

from argosy.distributed.communicator import Communicator
from argosy.distributed.ep_low_latency import check_fits
from argosy.distributed.ep_message import pack_tokens, unpack
from argosy.distributed.ep_payload import PayloadCodec
from argosy.distributed.ep_types import ExchangePlan, PackedTokens, ReceivedRows, RowOps
from argosy.distributed.pending import Pending, Then


@dataclass(frozen=True, slots=True)
class AllGatherReturn:
    """NOTE(numerics): the backend adds in the model's dtype, in its own order; the other exchanges add in float32."""

    ep: Communicator
    num_tokens: int

    def start(self, partial_sums: torch.Tensor) -> Pending[torch.Tensor]:
        return Then(self.ep.start_reduce_scatter(partial_sums), lambda sums: sums[: self.num_tokens].float())


class AllGatherExchange:
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
        return Then(flight, partial(self._receive, tokens, AllGatherReturn(self._ep, x.shape[0])))

    def _receive(self, tokens: PackedTokens, return_path: AllGatherReturn, message: torch.Tensor) -> ReceivedRows:
        return ReceivedRows(*unpack(message, tokens, self._codec), None, return_path)
