"""Bringing tokens to their experts and back: ``dispatch -> experts -> combine`` as a pipeline of values.

This file chooses and composes. ``LocalDispatcher`` serves one rank. For more, an exchange brings each token to the
ranks that own its experts (``ep_high_throughput``, ``ep_fixed`` or ``ep_symmetric``); what was received is then one
rank's own problem (``ep_arrange``). Invariant: combine returns, for every token, the sum of its experts' outputs times
``topk_weights``; ids of -1 contribute nothing.

Shape letters: T tokens, D hidden, E experts, K experts per token, e local experts.
"""

from collections.abc import Mapping
from functools import partial

import torch

from argosy.distributed.communicator import Communicator
from argosy.distributed.ep_arrange import ExpertLayout, arrange, sum_rows_in_torch
from argosy.distributed.ep_fixed import AddAtHome, AddInFlight, FixedExchange
from argosy.distributed.ep_high_throughput import HighThroughputExchange
from argosy.distributed.ep_local import FusedRows, LocalDispatcher, spread_weights_on_host
from argosy.distributed.ep_payload import PayloadKind, build_payload
from argosy.distributed.ep_row_ops import TorchRowOps
from argosy.distributed.ep_symmetric import SymmetricExchange, SymmetricLink, SymmetricTransport
from argosy.distributed.ep_types import (
    DispatchedTokens,
    DispatchHandle,
    ExchangeMode,
    ExchangePlan,
    QuantizedRows,
    RankExchange,
    ReceivedRows,
    RowOps,
    SpreadWeights,
    SumRows,
    TokenDispatcher,
)
from argosy.distributed.pending import Pending, Then

MAX_PADDED_ROWS = 1024  # of each expert: 64 tokens of 16 ranks; padding more would take more memory than it saves time


def build_dispatcher(
    ep: Communicator,
    num_experts: int,
    *,
    payload: PayloadKind = "model",
    low_latency_layout: ExpertLayout = "padded",
    sum_rows: SumRows = sum_rows_in_torch,
    row_ops: RowOps | None = None,
    max_whole_tokens: int = 0,
    spread_weights: SpreadWeights = spread_weights_on_host,
    symmetric: SymmetricTransport | None = None,
) -> TokenDispatcher:
    """One rank's dispatcher. Its tensors are made on the current default device, as a module's are.

    Rows that were quantised for the experts travel so, in half the bytes, where ``payload`` asks for nothing else and
    ``row_ops`` are given: the experts see what they would have made of the model's own rows.
    ``low_latency_layout`` is the form the experts get in low_latency; "sorted" suits a grouped product, "padded" a
    masked one, up to ``MAX_PADDED_ROWS``: above, rows are sorted all the same. ``sum_rows`` and ``row_ops`` (None:
    plain torch) may be fused kernels. ``max_whole_tokens``: how many the experts of a single rank take in the whole
    form, which ``spread_weights`` prepares. ``symmetric``: what low_latency travels by, None for collectives.

    Raises:
        ValueError: experts cannot be divided among the ranks.
    """
    codec = build_payload(payload)
    if ep.size == 1:
        fused = FusedRows(row_ops, sum_rows) if row_ops else None
        return LocalDispatcher(num_experts, max_whole_tokens, fused, spread_weights)
    ops: RowOps = TorchRowOps() if row_ops is None else row_ops
    expert_map, expert_owner = build_expert_tables(num_experts, ep)
    low_latency: RankExchange = FixedExchange(ep, codec, ops, AddAtHome(ep, expert_owner, ops))
    if symmetric is not None:
        low_latency = SymmetricExchange(SymmetricLink(ep, symmetric, expert_owner), codec, low_latency)
    exchanges: dict[ExchangeMode, RankExchange] = {
        "low_latency": low_latency,
        "high_throughput": HighThroughputExchange(ep, expert_owner, codec, ops, sum_rows),
        "all_gather": FixedExchange(ep, codec, ops, AddInFlight(ep)),
    }
    padded_modes: tuple[ExchangeMode, ...] = ("low_latency",) if low_latency_layout == "padded" else ()
    return ExpertParallelDispatcher(
        exchanges,
        expert_map,
        num_experts // ep.size,
        padded_modes,
        ops,
        sum_rows,
        takes_quantized=row_ops is not None and payload == "model" and not padded_modes,
    )


def build_expert_tables(num_experts: int, ep: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
    """``expert_map [E + 1]``: id -> local id, e if it is not here; ``expert_owner [E + 1]``: id -> rank. Both int32.

    The last entry is for -1, which finds it by Python's own rule: e and ``ep.size``, that is nobody.
    """
    if num_experts % ep.size:
        divisors = ", ".join(str(size) for size in range(1, num_experts + 1) if num_experts % size == 0)
        raise ValueError(
            f"n_routed_experts ({num_experts}) must be divisible by ep_size ({ep.size}); set --ep to {divisors}"
        )
    num_local_experts = num_experts // ep.size
    expert_map = torch.full((num_experts + 1,), num_local_experts, dtype=torch.int32)
    first = ep.rank * num_local_experts
    expert_map[first : first + num_local_experts] = torch.arange(num_local_experts, dtype=torch.int32)
    return expert_map, torch.arange(num_experts + 1, dtype=torch.int32) // num_local_experts


class ExpertParallelDispatcher:
    """Exchange by the plan's mode, then arrange. ``expert_map: [E + 1]`` int32, see ``build_expert_tables``."""

    def __init__(
        self,
        exchanges: Mapping[ExchangeMode, RankExchange],
        expert_map: torch.Tensor,
        num_local_experts: int,
        padded_modes: tuple[ExchangeMode, ...],
        row_ops: RowOps,
        sum_rows: SumRows,
        *,
        takes_quantized: bool,
    ) -> None:
        self._exchanges = exchanges
        self._expert_map = expert_map
        self._num_local_experts = num_local_experts
        self._padded_modes = padded_modes
        self._row_ops = row_ops
        self._sum_rows = sum_rows
        self._takes_quantized = takes_quantized

    @property
    def takes_quantized(self) -> bool:
        return self._takes_quantized

    def start_dispatch(
        self, x: torch.Tensor | QuantizedRows, topk_ids: torch.Tensor, topk_weights: torch.Tensor, plan: ExchangePlan
    ) -> Pending[DispatchedTokens]:
        assert self._takes_quantized or isinstance(x, torch.Tensor)
        flight = self._exchanges[plan.mode].start(x, topk_ids, topk_weights, plan)
        return Then(flight, partial(self._arrange, plan.mode))

    def start_combine(self, expert_out: torch.Tensor, handle: DispatchHandle) -> Pending[torch.Tensor]:
        return handle.start_combine(expert_out)

    def combine_onto(self, expert_out: torch.Tensor, handle: DispatchHandle, addend: torch.Tensor) -> torch.Tensor:
        return handle.combine_onto(expert_out, addend)

    def _arrange(self, mode: ExchangeMode, received: ReceivedRows) -> DispatchedTokens:
        is_padded = mode in self._padded_modes and received.topk_ids.shape[0] <= MAX_PADDED_ROWS
        return arrange(
            received,
            self._expert_map,
            self._num_local_experts,
            is_padded=is_padded,
            row_ops=self._row_ops,
            sum_rows=self._sum_rows,
        )
