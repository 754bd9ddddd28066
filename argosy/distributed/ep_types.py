"""The words of expert parallelism: what is dispatched, what was received, and the protocols between the ``ep_`` files.

Nothing is computed or sent here. Invariant: what combine needs travels in the handle that dispatch returns, and how
sums travel home in the ``ReturnPath`` that came with the rows; a dispatcher keeps no state of a step.

Shape letters: T this rank's tokens, N received rows, M sorted rows, D hidden, K experts per token, e local experts,
G ranks of the ep axis, C max_tokens_per_rank, W words of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from argosy.distributed.pending import Pending

ExchangeMode = Literal["low_latency", "high_throughput", "all_gather"]
EXCHANGE_MODES: tuple[ExchangeMode, ...] = ("low_latency", "high_throughput", "all_gather")


# Ids [T, K], their weights, and how many experts -> each expert's weight for each token [T, E], its tokens [E] int32.
SpreadWeights = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


class SumRows(Protocol):
    """The weighted sum of each line's rows; plain torch or a fused kernel."""

    def __call__(
        self,
        rows: torch.Tensor,
        row_ids: torch.Tensor,
        weights: torch.Tensor | None,
        dtype: torch.dtype,
        addend: torch.Tensor | None = None,
        *,
        is_sparse: bool = False,
        skips_empty: bool = False,
    ) -> torch.Tensor:
        """``rows: [R, D]``, ``row_ids: [N, S]`` int64 or -1, ``weights: [N, S]`` f32 or None for ones, ``addend:
        [N, D]`` -> [N, D] in ``dtype``, added in float32; without an addend exactly 0 for a line of -1. Rows that no id
        names may hold anything, NaN too. ``is_sparse``: most ids are -1; it changes no number. ``skips_empty``: lines
        of -1 may be left unwritten, for nobody reads them; only without an addend."""
        ...


# Rows for the experts [M, D] or [e, capacity, D]; counts [e] int32; row_ids [N, K] int64: where each entry's row lies,
# flat over expert and capacity, -1 for what is elsewhere.
ArrangedRows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
WORD_BYTES = 4
ROW_ALIGNMENT_WORDS = 4


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows in 8 bits, quantised once for all that multiply them: linears, and experts on the same rank."""

    numbers: torch.Tensor  # [T, D] int8 or e4m3
    scale: torch.Tensor  # [T, 1] or [T, ceil(D / 128)] float32, of any strides
    dtype: torch.dtype  # what the rows were, and what products make of them


@dataclass(frozen=True, slots=True)
class ExchangePlan:
    """What all ranks of the ep axis agreed on for a step; a rank alone must never choose it."""

    mode: ExchangeMode
    max_tokens_per_rank: int  # no rank brings more; low_latency and all_gather derive every shape from it


# For one rank: nothing is exchanged, whatever the mode.
SINGLE_RANK_PLAN = ExchangePlan("high_throughput", 0)
ExchangeOf = Callable[[int], ExchangePlan]  # what is agreed on for steps of so many tokens of each replica


def exchange_nothing(num_tokens: int) -> ExchangePlan:
    return SINGLE_RANK_PLAN


class DispatchHandle(Protocol):
    """What combine needs to undo a dispatch."""

    def start_combine(self, expert_out: torch.Tensor) -> Pending[torch.Tensor]:
        """See ``TokenDispatcher.start_combine``."""
        ...

    def combine_onto(self, expert_out: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
        """See ``TokenDispatcher.combine_onto``."""
        ...


class AddsAfterwards:
    """Of handles whose sum comes home before anything can be added to it."""

    def start_combine(self, expert_out: torch.Tensor) -> Pending[torch.Tensor]:
        raise NotImplementedError

    def combine_onto(self, expert_out: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
        return (self.start_combine(expert_out).wait() + addend).to(addend.dtype)


@dataclass(frozen=True, slots=True)
class DispatchedTokens:
    """Rows for this rank's experts, in one of three forms.

    Sorted: ``hidden_states [M, D]``, expert after expert; rows behind the counts' sum belong to nobody.
    Padded: ``hidden_states [e, capacity, D]``; rows at and behind an expert's count are padding.
    What the experts make of rows that are nobody's, or padding, is never read.
    Whole: ``hidden_states [T, D]`` with ``expert_weights``; every expert sees every token, and what comes out is the
    weighted sum over experts, [T, D]. Only where the experts were built to take it.
    """

    hidden_states: torch.Tensor
    num_tokens_per_expert: torch.Tensor  # [e] int32
    handle: DispatchHandle
    expert_weights: torch.Tensor | None = None  # [T, e] float32, 0 where the token does not go
    quantized: QuantizedRows | None = None  # sorted rows that came in 8 bits; ``hidden_states`` are their numbers
    # About how many sorted rows are somebody's, where the host does not know it and most may be nobody's; None: all.
    num_expected_rows: int | None = None

    @property
    def is_padded(self) -> bool:
        return self.hidden_states.dim() == 3


class TokenDispatcher(Protocol):
    """Moves tokens to experts and sums what comes back."""

    @property
    def takes_quantized(self) -> bool:
        """Whether ``start_dispatch`` also takes rows that were quantised for the experts."""
        ...

    def start_dispatch(
        self, x: torch.Tensor | QuantizedRows, topk_ids: torch.Tensor, topk_weights: torch.Tensor, plan: ExchangePlan
    ) -> Pending[DispatchedTokens]:
        """``x: [T, D]``, ``topk_ids: [T, K]`` int32, distinct within a token (-1 none), ``topk_weights: [T, K]`` f32.

        Collective over ep: every rank must call, also with T = 0. ``x`` must not change before ``wait``.
        """
        ...

    def start_combine(self, expert_out: torch.Tensor, handle: DispatchHandle) -> Pending[torch.Tensor]:
        """``expert_out`` in the form and order of the dispatched tokens -> [T, D] float32. Collective over ep."""
        ...

    def combine_onto(self, expert_out: torch.Tensor, handle: DispatchHandle, addend: torch.Tensor) -> torch.Tensor:
        """``start_combine``'s sums plus ``addend: [T, D]`` in float32 -> [T, D] in addend's dtype. Collective over
        ep."""
        ...


class ReturnPath(Protocol):
    """The way home of one exchange's rows."""

    @property
    def reads_empty_lines(self) -> bool:
        """Whether lines of rows that have no expert here must be zeros; else they may hold anything."""
        ...

    def start(self, partial_sums: torch.Tensor, addend: torch.Tensor | None = None) -> Pending[torch.Tensor]:
        """``partial_sums: [N, D]``, a line per received row -> [T, D] float32, each token's sum. With ``addend:
        [T, D]`` that is added in float32, and the result has its dtype. Collective over ep."""
        ...


@dataclass(frozen=True, slots=True)
class ReceivedRows:
    """Tokens of all ranks that came here, each once; from now on a problem of this rank alone."""

    x: torch.Tensor | QuantizedRows  # [N, D]; may be a strided view of the message
    topk_ids: torch.Tensor  # [N, K] int32, ids of all experts, -1 none; foreign experts' ids are there too
    topk_weights: torch.Tensor  # [N, K] float32
    num_local_entries: int | None  # ids that are this rank's, in all rows; None: unknown on the host
    return_path: ReturnPath


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """A rank's own tokens as columns of the rows to send, and what reading such rows takes."""

    payload: tuple[torch.Tensor, ...]  # int32, each [T, ...]: one part, or numbers and their scales
    topk_ids: torch.Tensor  # [T, K] int32
    topk_weights: torch.Tensor  # [T, K] float32
    hidden_size: int
    dtype: torch.dtype
    # Of the payload's numbers, whose scales are its second part, where the rows came in 8 bits; None: a codec wrote it.
    quantized_dtype: torch.dtype | None = None

    @property
    def payload_words(self) -> int:
        return sum(part.shape[1] for part in self.payload)

    @property
    def num_experts_per_tok(self) -> int:
        return self.topk_ids.shape[1]

    @property
    def num_spare_words(self) -> int:
        return -(self.payload_words + 2 * self.num_experts_per_tok) % ROW_ALIGNMENT_WORDS

    @property
    def row_words(self) -> int:
        return self.payload_words + 2 * self.num_experts_per_tok + self.num_spare_words

    @property
    def row_bytes(self) -> int:
        return self.row_words * WORD_BYTES

    @property
    def rows(self) -> torch.Tensor:
        """[T, W] int32: one copy, made at each call."""
        parts = (*self.payload, self.topk_ids, self.topk_weights.view(torch.int32))
        if self.num_spare_words:
            parts = (*parts, self.topk_ids.new_zeros(self.topk_ids.shape[0], self.num_spare_words))
        return torch.cat(parts, dim=1)


class RowOps(Protocol):
    """What a rank does to rows between the wire and the experts; plain torch or fused kernels."""

    def pack_rows(self, tokens: PackedTokens, num_rows: int) -> torch.Tensor:
        """-> [num_rows, W] int32: token i in row i; then rows of zeros with the ids -1."""
        ...

    def count_routes(self, topk_ids: torch.Tensor, expert_owner: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """``expert_owner: [E + 1]`` int32, the last for -1 -> places [T, G] int32: which of the rank's rows carries the
        token, -1 none. Writes ``counts: [G, 2]`` int32, contiguous: rows for each rank, and ids of its experts in them.
        """
        ...

    def pack_routes(
        self, tokens: PackedTokens, counts: torch.Tensor, places: torch.Tensor, num_rows: Callable[[], int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """With what ``count_routes`` made -> message [N, W], by rank, then by token; sent_rows [T, G] int64: the
        token's row in it, -1 none. ``num_rows()`` is N; it may wait, so it is called as late as can be.
        """
        ...

    def arrange_rows(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        num_local_entries: int | None,
        expert_map: torch.Tensor,
        num_local_experts: int,
        *,
        is_padded: bool,
    ) -> ArrangedRows:
        """``x: [N, D]``, ``topk_ids: [N, K]`` int32, ``expert_map: [E + 1]`` int32, see ``build_expert_tables``.

        ``num_local_entries``: ids that are this rank's, which is M of sorted rows; None: unknown here, and M is N * K.
        """
        ...

    def arrange_quantized(
        self,
        x: QuantizedRows,
        topk_ids: torch.Tensor,
        num_local_entries: int | None,
        expert_map: torch.Tensor,
        num_local_experts: int,
    ) -> tuple[QuantizedRows, torch.Tensor, torch.Tensor]:
        """``arrange_rows`` of sorted rows in 8 bits, with their scales."""
        ...

    def sum_visited_parts(
        self,
        parts: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_owner: torch.Tensor,
        addend: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``parts: [G, C, D]``, one of each rank, ``topk_ids: [T, K]``, ``expert_owner: [E + 1]`` int32 -> [T, D]
        float32: of each token the parts of the ranks that own its experts, in rank order; with ``addend: [T, D]`` that
        too, and in its dtype. What other parts hold is nothing: it is not read, or hidden."""
        ...


class RankExchange(Protocol):
    """Brings tokens to the ranks that own their experts."""

    def start(
        self, x: torch.Tensor | QuantizedRows, topk_ids: torch.Tensor, topk_weights: torch.Tensor, plan: ExchangePlan
    ) -> Pending[ReceivedRows]:
        """As ``TokenDispatcher.start_dispatch``. Collective over ep."""
        ...
