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
from typing import ClassVar

import torch

from argosy.distributed.communicator import Communicator
from argosy.distributed.ep_message import pack_tokens, unpack
from argosy.distributed.ep_payload import PayloadCodec
from argosy.distributed.ep_types import ExchangePlan, PackedTokens, QuantizedRows, ReceivedRows, RowOps, SumRows
from argosy.distributed.pending import Pending, Then


@dataclass(frozen=True, slots=True)
class HighThroughputReturn:
    """Sums go back the way the rows came: receive counts become send counts."""

    ep: Communicator
    sum_rows: SumRows
    sent_rows: torch.Tensor  # [T, G] int64: row of the sent message that carried the token to the rank, -1 none
    send_counts: Sequence[int]
    recv_counts: Sequence[int]
    reads_empty_lines: ClassVar[bool] = False  # there are none: a row came for an expert

    def start(self, partial_sums: torch.Tensor, addend: torch.Tensor | None = None) -> Pending[torch.Tensor]:
        flight = self.ep.start_all_to_all_v(partial_sums, self.recv_counts, self.send_counts)
        dtype = torch.float32 if addend is None else addend.dtype
        return Then(flight, lambda rows: self.sum_rows(rows, self.sent_rows, None, dtype, addend, is_sparse=True))


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
        self._count_table = _CountTable(ep, expert_owner.device)

    def start(
        self, x: torch.Tensor | QuantizedRows, topk_ids: torch.Tensor, topk_weights: torch.Tensor, plan: ExchangePlan
    ) -> Pending[ReceivedRows]:
        places = self._row_ops.count_routes(topk_ids, self._expert_owner, self._count_table.sent)
        lengths = self._count_table.exchange()
        tokens = pack_tokens(x, topk_ids, topk_weights, self._codec)
        # NOTE(order): the counts are on their way to the host before a card packs, and are read behind that launch.
        message, sent_rows = self._row_ops.pack_routes(
            tokens, self._count_table.sent, places, lambda: sum(lengths.wait().send_counts)
        )
        counts = lengths.wait()
        flight = self._ep.start_all_to_all_v(message, counts.send_counts, counts.recv_counts)
        return_path = HighThroughputReturn(self._ep, self._sum_rows, sent_rows, counts.send_counts, counts.recv_counts)
        return Then(flight, partial(self._receive, tokens, sum(counts.recv_entries), return_path))

    def _receive(
        self, tokens: PackedTokens, num_local_entries: int, return_path: HighThroughputReturn, message: torch.Tensor
    ) -> ReceivedRows:
        return ReceivedRows(*unpack(message, tokens, self._codec), num_local_entries, return_path)


@dataclass(frozen=True, slots=True)
class _Counts:
    """The lengths of an exchange, each by rank."""

    send_counts: list[int]
    recv_counts: list[int]
    recv_entries: list[int]  # ids of this rank's experts in the rows


class _CountTable:
    """Where counts are written, exchanged and copied to: made once, for at a few tokens every allocation shows.

    One exchange at a time: its counts are read before ``HighThroughputExchange.start`` returns.
    """

    def __init__(self, ep: Communicator, device: torch.device) -> None:
        self._ep = ep
        # [sent or received, G, rows and entries]
        self._on_device = torch.empty(2, ep.size, 2, dtype=torch.int32, device=device)
        self.sent, self._received = self._on_device
        # To other devices than CUDA's no event can be asked for here: there the reader waits for all that was launched.
        is_cuda = device.type == "cuda"
        self._on_host = torch.empty_like(self._on_device, device="cpu", pin_memory=True) if is_cuda else self._on_device
        self._arrived = torch.Event(device=device) if is_cuda else None

    def exchange(self) -> "_CountsInFlight":
        """Of what stands in ``sent``. Collective over ep."""
        self._ep.start_all_to_all(self.sent, out=self._received).wait()
        if self._arrived is not None:
            self._on_host.copy_(self._on_device, non_blocking=True)
            self._arrived.record()
        return _CountsInFlight(self._on_host, self._arrived)


class _CountsInFlight:
    """On their way to the host; the first ``wait`` waits, and reads."""

    def __init__(self, on_host: torch.Tensor, arrived: torch.Event | None) -> None:
        self._on_host = on_host
        self._arrived = arrived
        self._counts: _Counts | None = None

    def wait(self) -> _Counts:
        """NOTE(sync)."""
        if self._counts is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            sent, received = self._on_host.tolist()
            self._counts = _Counts(
                [rows for rows, _ in sent], [rows for rows, _ in received], [entries for _, entries in received]
            )
        return self._counts
