"""Fixed shapes: every rank gets every token, so nothing is counted, read on the host, or can overflow.

Equal parts for all would carry as many bytes as copies of everything, so nothing is gained by searching for rows, and
an all-gather needs no copy for each rank. The two modes differ in the way home alone. ``AddAtHome`` (low latency) gets
every rank's part in an all-to-all. ``AddInFlight`` (all-gather) is a reduce-scatter, which takes no room for every part
and crosses each link between hosts with one sum instead of one for every rank behind it, but takes a hop a rank.
Invariant: no host sync and no shape that depends on data; a device graph can capture it.

Shape letters: T tokens, C max_tokens_per_rank, G ranks of the ep axis, N = G * C rows, D hidden, W words of a row.
"""

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from argosy.distributed.communicator import Communicator
from argosy.distributed.ep_message import pack_tokens, unpack
from argosy.distributed.ep_payload import PayloadCodec
from argosy.distributed.ep_types import ExchangePlan, PackedTokens, QuantizedRows, ReceivedRows, RowOps
from argosy.distributed.pending import Pending, Then


class WayHome(Protocol):
    """Every rank has a sum for every row: 0 where it has no expert of the token, or, unless ``reads_empty_lines``,
    anything."""

    reads_empty_lines: bool

    def start(
        self, partial_sums: torch.Tensor, topk_ids: torch.Tensor, addend: torch.Tensor | None
    ) -> Pending[torch.Tensor]:
        """``partial_sums: [N, D]``, by source rank, ``topk_ids: [T, K]`` of this rank's tokens -> [T, D] float32: this
        rank's, added; with ``addend`` see ``ReturnPath.start``. Collective."""
        ...


class AddAtHome:
    """Parts travel side by side, and the source adds those of the ranks that own a token's experts, in float32, in rank
    order. ``expert_owner: [E + 1]`` int32, see ``build_expert_tables``."""

    reads_empty_lines = False

    def __init__(self, ep: Communicator, expert_owner: torch.Tensor, row_ops: RowOps) -> None:
        self._ep = ep
        self._expert_owner = expert_owner
        self._row_ops = row_ops

    def start(
        self, partial_sums: torch.Tensor, topk_ids: torch.Tensor, addend: torch.Tensor | None
    ) -> Pending[torch.Tensor]:
        num_rows, hidden_size = partial_sums.shape
        by_source = partial_sums.view(self._ep.size, num_rows // self._ep.size, hidden_size)

        def finish(by_expert_rank: torch.Tensor) -> torch.Tensor:
            return self._row_ops.sum_visited_parts(by_expert_rank, topk_ids, self._expert_owner, addend)

        return Then(self._ep.start_all_to_all(by_source), finish)


class AddInFlight:
    """NOTE(numerics): the backend adds in the model's dtype, in its own order; the other exchanges add in float32."""

    reads_empty_lines = True

    def __init__(self, ep: Communicator) -> None:
        self._ep = ep

    def start(
        self, partial_sums: torch.Tensor, topk_ids: torch.Tensor, addend: torch.Tensor | None
    ) -> Pending[torch.Tensor]:
        def finish(sums: torch.Tensor) -> torch.Tensor:
            own = sums[: topk_ids.shape[0]].float()
            return own if addend is None else (own + addend).to(addend.dtype)

        return Then(self._ep.start_reduce_scatter(partial_sums), finish)


@dataclass(frozen=True, slots=True)
class FixedReturn:
    """The way home of one dispatch."""

    way_home: WayHome
    topk_ids: torch.Tensor  # [T, K] int32, of this rank's tokens

    @property
    def reads_empty_lines(self) -> bool:
        return self.way_home.reads_empty_lines

    def start(self, partial_sums: torch.Tensor, addend: torch.Tensor | None = None) -> Pending[torch.Tensor]:
        return self.way_home.start(partial_sums, self.topk_ids, addend)


class FixedExchange:
    """Sends ``[C, W]`` to all."""

    def __init__(self, ep: Communicator, codec: PayloadCodec, row_ops: RowOps, way_home: WayHome) -> None:
        self._ep = ep
        self._codec = codec
        self._row_ops = row_ops
        self._way_home = way_home

    def start(
        self, x: torch.Tensor | QuantizedRows, topk_ids: torch.Tensor, topk_weights: torch.Tensor, plan: ExchangePlan
    ) -> Pending[ReceivedRows]:
        check_fits(topk_ids.shape[0], plan)
        tokens = pack_tokens(x, topk_ids, topk_weights, self._codec)
        flight = self._ep.start_all_gather(self._row_ops.pack_rows(tokens, plan.max_tokens_per_rank))
        return Then(flight, partial(self._receive, tokens, FixedReturn(self._way_home, topk_ids)))

    def _receive(self, tokens: PackedTokens, return_path: FixedReturn, message: torch.Tensor) -> ReceivedRows:
        return ReceivedRows(*unpack(message, tokens, self._codec), None, return_path)


def check_fits(num_tokens: int, plan: ExchangePlan) -> None:
    """The step agreement bounds every rank's tokens; more would silently be cut off."""
    if num_tokens > plan.max_tokens_per_rank:
        raise RuntimeError(
            f"{num_tokens} tokens on this rank, but the ranks agreed on at most {plan.max_tokens_per_rank}"
            f" (mode {plan.mode}): the step's agreement and its batch do not belong together"
        )
