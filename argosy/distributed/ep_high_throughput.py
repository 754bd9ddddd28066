"""High throughput: a token travels once to every rank that owns one of its experts, in an uneven all-to-all.

Counts go first, because the receiver must know how much will come: one small all-to-all between the devices, then one
copy to the host, the only sync; a card packs its rows while the host waits for it and launches the exchange.
Invariant: rows stand by destination rank, then by token; what comes back stands the same way, and is added in rank
order.

Shape letters: T tokens, N rows, D hidden, K experts per token, G ranks of the ep axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from argosy.distributed.communicator import Communicator
from argosy.distributed.ep_message import pack_tokens, unpack
from argosy.distributed.ep_payload import PayloadCodec
from argosy.distributed.ep_types import ExchangePlan, PackedTokens, ReceivedRows, RowOps, SumRows
from argosy.distributed.pending import Pending, Then


@dataclass(frozen=True, slots=True)
class HighThroughputReturn:
    """Sums go back the way the rows came: receive counts become send counts."""

    ep: Communicator
    sum_rows: SumRows
    sent_rows: torch.Tensor  # [T, G] int64: row of the sent message that carried the token to the rank, -1 none
    send_counts: Sequence[int]
    recv_counts: Sequence[int]

    def start(self, partial_sums: torch.Tensor) -> Pending[torch.Tensor]:
        flight = self.ep.start_all_to_all_v(partial_sums, self.recv_counts, self.send_counts)
        return Then(flight, lambda rows: self.sum_rows(rows, self.sent_rows, None, torch.float32))


class HighThroughputExchange:
    """``expert_owner: [E + 1]`` int32 gives each expert's rank; its last entry, which -1 finds, is no rank."""

    def __init__(
        self, ep: Communicator, expert_owner: torch.Tensor, codec: PayloadCodec, row_ops: RowOps, sum_rows: SumRows
    ) -> None:
        self._ep = ep
        self._expert_owner = expert_owner
        self._codec = codec
        self._row_ops = row_ops
        self._sum_rows = sum_rows

    def start(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, plan: ExchangePlan
    ) -> Pending[ReceivedRows]:
        counts, places = self._row_ops.count_routes(topk_ids, self._expert_owner, self._ep.size)
        host_counts = _HostCounts(counts, self._ep.start_all_to_all(counts).wait())
        tokens = pack_tokens(x, topk_ids, topk_weights, self._codec)
        # NOTE(order): the counts are on their way to the host before a card packs, and are read behind that launch.
        message, sent_rows = self._row_ops.pack_routes(tokens, counts, places, host_counts.num_sent)
        send_counts, _, recv_counts, recv_entries = host_counts.read()
        flight = self._ep.start_all_to_all_v(message, send_counts, recv_counts)
        return_path = HighThroughputReturn(self._ep, self._sum_rows, sent_rows, send_counts, recv_counts)
        return Then(flight, partial(self._receive, tokens, sum(recv_entries), return_path))

    def _receive(
        self, tokens: PackedTokens, num_local_entries: int, return_path: HighThroughputReturn, message: torch.Tensor
    ) -> ReceivedRows:
        return ReceivedRows(*unpack(message, tokens, self._codec), num_local_entries, return_path)


class _HostCounts:
    """The lengths of the exchange to come, both ways, on their way to the host in one copy."""

    def __init__(self, sent: torch.Tensor, received: torch.Tensor) -> None:
        table = torch.cat((sent, received), dim=1)  # [G, 4]: rows and entries sent, rows and entries received
        # To other devices than CUDA's no event can be asked for here: there the reader waits for all that was launched.
        self._table = table.to("cpu", non_blocking=True) if table.is_cuda else table
        self._arrived = torch.Event(device=table.device) if table.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> list[list[int]]:
        """-> rows sent, entries sent, rows received, entries received, each by rank. NOTE(sync)."""
        if self._arrived is not None:
            self._arrived.synchronize()
        columns: list[list[int]] = self._table.t().tolist()
        return columns

    def num_sent(self) -> int:
        """NOTE(sync)."""
        return sum(self.read()[0])
