"""Low latency on one node without collectives: ranks put tokens, and sums, straight into each other's memory.

The same rows as ``FixedExchange`` with ``AddAtHome``, its plain twin, but that only ranks that own one of a token's
experts get its payload, and only they send a sum back. Puts wait for nobody, so areas are used in turn: two for each
way. Invariant: a rank waits for all others in every exchange, and puts into an area again only when it has waited, for
all, in an exchange that each began behind its last look at that area. That holds for one batch, and for two in turn,
where the first comes home before a third is sent; no host sync, and a device graph can capture it.

Shape letters: T tokens, C max_tokens_per_rank, G ranks of the ep axis, N = G * C rows, D hidden, W words of a row.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol, TypeVar

import torch

from argosy.distributed.communicator import Communicator
from argosy.distributed.ep_fixed import check_fits
from argosy.distributed.ep_message import pack_tokens, unpack
from argosy.distributed.ep_payload import PayloadCodec
from argosy.distributed.ep_types import (
    ROW_ALIGNMENT_WORDS,
    WORD_BYTES,
    ExchangePlan,
    PackedTokens,
    QuantizedRows,
    RankExchange,
    ReceivedRows,
)
from argosy.distributed.pending import Pending

FLAG_WORDS = 32  # of a flag, which has a line of memory to itself
AREAS_PER_WAY = 2
NUM_AREAS = 2 * AREAS_PER_WAY
NS_PER_S = 10**9
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Area:
    """A part of every rank's buffer, in which each rank has a flag, and this rank's counters for it."""

    rank: int
    words: torch.Tensor  # int32, of this rank's buffer: what others put here
    flags: torch.Tensor  # [G * FLAG_WORDS] int32, of this rank's buffer; flag g is set by rank g
    word_addresses: torch.Tensor  # [G] int64: where every rank's ``words`` are
    flag_addresses: torch.Tensor  # [G] int64: where every rank's ``flags`` are
    counters: torch.Tensor  # [2 or more] int32: turns, and programs of a put that are done
    missing: torch.Tensor  # [G + 1] int32, read by the host: who did not come within the limit; the last: anybody
    limit_ns: int

    def find_missing(self) -> list[int]:
        """Positions of ranks that were waited for in vain, in any exchange of any area that has ended."""
        if not int(self.missing[-1]):  # NOTE(sync): none, it is the host's own memory
            return []
        missing: list[int] = self.missing[:-1].nonzero().flatten().tolist()
        return missing


class OneSidedOps(Protocol):
    """Fused kernels that reach into other ranks' memory; see ``argosy.kernels.triton.one_sided``."""

    def put_tokens(self, tokens: PackedTokens, num_rows: int, expert_owner: torch.Tensor, area: Area) -> None:
        """This rank's part of every rank's [G, num_rows, W], as ``RowOps.pack_rows`` packs it; a payload goes only to
        ranks that own one of the token's experts."""
        ...

    def wait_for_puts(self, area: Area) -> None:
        """Until all ranks' rows of this turn are here, or for ``limit_ns``."""
        ...

    def put_sums(self, sums: torch.Tensor, topk_ids: torch.Tensor, expert_owner: torch.Tensor, area: Area) -> None:
        """``sums: [N, D]``, by source rank: this rank's part of each source's [G, C, D]; ``topk_ids: [N, K]``."""
        ...

    def add_sums(
        self,
        parts: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_owner: torch.Tensor,
        area: Area,
        addend: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Waits, then ``parts: [G, C, D]``, ``topk_ids: [T, K]`` of this rank's tokens -> [T, D] float32; with
        ``addend: [T, D]``, added last, in its dtype."""
        ...


class SymmetricAreas:
    """One buffer of each rank of an ep axis, shared by all its dispatchers, whose exchanges take turns in it.

    All ranks begin the same exchanges in the same order, and so take the same areas.
    """

    def __init__(self, there: Sequence[Area], back: Sequence[Area]) -> None:
        self.num_bytes = there[0].words.numel() * WORD_BYTES  # of each area
        self._there, self._back = itertools.cycle(there), itertools.cycle(back)

    def next_there(self) -> Area:
        return next(self._there)

    def next_back(self) -> Area:
        return next(self._back)


def buffer_words(num_ranks: int, area_words: int) -> int:
    """int32 of each rank's buffer."""
    return NUM_AREAS * (num_ranks * FLAG_WORDS + area_words)


def area_words(num_ranks: int, max_tokens_per_rank: int, row_bytes: int) -> int:
    """For as many rows of each rank, of at most so many bytes; whole vectors."""
    words = -(-num_ranks * max_tokens_per_rank * row_bytes // WORD_BYTES)
    return -(-words // ROW_ALIGNMENT_WORDS) * ROW_ALIGNMENT_WORDS


def build_areas(rank: int, buffer: torch.Tensor, addresses: Sequence[int], timeout_s: float) -> SymmetricAreas:
    """``buffer``: this rank's, [buffer_words] int32, zeros; ``addresses``: of every rank's, as this rank sees them."""
    num_ranks, device = len(addresses), buffer.device
    num_words = buffer.shape[0] // NUM_AREAS - num_ranks * FLAG_WORDS
    is_card = device.type == "cuda"
    missing = torch.zeros(num_ranks + 1, dtype=torch.int32, device="cpu", pin_memory=is_card)
    # Each from a whole vector on: a pointer that is aligned otherwise is another kernel to Triton.
    counters = torch.zeros(NUM_AREAS, ROW_ALIGNMENT_WORDS, dtype=torch.int32, device=device)
    bases = torch.tensor(addresses, dtype=torch.int64, device=device)

    def area(number: int) -> Area:
        first_flag = number * num_ranks * FLAG_WORDS
        first_word = NUM_AREAS * num_ranks * FLAG_WORDS + number * num_words
        return Area(
            rank=rank,
            words=buffer[first_word : first_word + num_words],
            flags=buffer[first_flag : first_flag + num_ranks * FLAG_WORDS],
            word_addresses=bases + first_word * WORD_BYTES,
            flag_addresses=bases + first_flag * WORD_BYTES,
            counters=counters[number],
            missing=missing,
            limit_ns=round(timeout_s * NS_PER_S),
        )

    areas = tuple(area(number) for number in range(NUM_AREAS))
    return SymmetricAreas(areas[:AREAS_PER_WAY], areas[AREAS_PER_WAY:])


def connect_areas(
    ep: Communicator, device: torch.device, max_tokens_per_rank: int, row_bytes: int, timeout_s: float
) -> SymmetricAreas:
    """On cards of one node. Collective over ep.

    ``timeout_s``: how long a wait on the card may take; the watchdog should speak first. ``row_bytes``: of a token or
    of a sum, whichever is longer; larger exchanges take the collectives.

    Raises:
        RuntimeError: the cards cannot reach each other's memory.
    """
    words = buffer_words(ep.size, area_words(ep.size, max_tokens_per_rank, row_bytes))
    buffer, addresses = ep.share_memory(words, device)
    return build_areas(ep.rank, buffer, addresses, timeout_s)


@dataclass(frozen=True, slots=True)
class SymmetricTransport:
    """For ``build_dispatcher(..., symmetric=...)``."""

    areas: SymmetricAreas
    ops: OneSidedOps


@dataclass(frozen=True, slots=True)
class SymmetricLink:
    """What an exchange shares with its way home."""

    ep: Communicator
    transport: SymmetricTransport
    expert_owner: torch.Tensor  # [E + 1] int32: id -> rank; its last entry, which -1 finds, is no rank

    def start(
        self, op: str, rows: torch.Tensor, area: Area, put: Callable[[], None], finish: Callable[[], T]
    ) -> Pending[T]:
        """``rows``: what goes to each other rank, at most."""
        return self.ep.start_puts(op, rows, partial(self._put, area, put), finish)

    def _put(self, area: Area, put: Callable[[], None]) -> None:
        missing = area.find_missing()
        if missing:
            names = ", ".join(str(self.ep.ranks[position]) for position in missing)
            raise RuntimeError(
                f"rank {names} of axis {self.ep.axis} put nothing into rank {self.ep.ranks[self.ep.rank]}'s memory"
                f" within {area.limit_ns / NS_PER_S:g} s: it is gone, or stuck"
            )
        put()


@dataclass(frozen=True, slots=True)
class SymmetricReturn:
    """The way home of one dispatch."""

    link: SymmetricLink
    received_ids: torch.Tensor  # [N, K] int32
    sent_ids: torch.Tensor  # [T, K] int32
    reads_empty_lines: ClassVar[bool] = False

    def start(self, partial_sums: torch.Tensor, addend: torch.Tensor | None = None) -> Pending[torch.Tensor]:
        link, num_ranks = self.link, self.link.ep.size
        area = link.transport.areas.next_back()
        num_rows, hidden_size = partial_sums.shape
        words = area.words[: partial_sums.numel() * partial_sums.element_size() // WORD_BYTES]
        parts = words.view(partial_sums.dtype).view(num_ranks, num_rows // num_ranks, hidden_size)
        put = partial(link.transport.ops.put_sums, partial_sums, self.received_ids, link.expert_owner, area)
        add = partial(link.transport.ops.add_sums, parts, self.sent_ids, link.expert_owner, area, addend)
        return link.start("put_sums", parts[0], area, put, add)


class SymmetricExchange:
    """Puts ``[C, W]`` into every rank's buffer. ``twin`` takes what does not fit into an area."""

    def __init__(self, link: SymmetricLink, codec: PayloadCodec, twin: RankExchange) -> None:
        self._link = link
        self._codec = codec
        self._twin = twin

    def start(
        self, x: torch.Tensor | QuantizedRows, topk_ids: torch.Tensor, topk_weights: torch.Tensor, plan: ExchangePlan
    ) -> Pending[ReceivedRows]:
        link, num_rows = self._link, self._link.ep.size * plan.max_tokens_per_rank
        tokens = pack_tokens(x, topk_ids, topk_weights, self._codec)
        row_bytes = max(tokens.row_bytes, tokens.hidden_size * tokens.dtype.itemsize)  # or of a sum
        if not 0 < num_rows * row_bytes <= link.transport.areas.num_bytes:
            return self._twin.start(x, topk_ids, topk_weights, plan)
        check_fits(topk_ids.shape[0], plan)
        area = link.transport.areas.next_there()
        message = area.words[: num_rows * tokens.row_words].view(num_rows, tokens.row_words)
        put = partial(link.transport.ops.put_tokens, tokens, plan.max_tokens_per_rank, link.expert_owner, area)
        receive = partial(self._receive, area, tokens, message)
        return link.start("put_tokens", message[: plan.max_tokens_per_rank], area, put, receive)

    def _receive(self, area: Area, tokens: PackedTokens, message: torch.Tensor) -> ReceivedRows:
        self._link.transport.ops.wait_for_puts(area)
        x, topk_ids, topk_weights = unpack(message, tokens, self._codec)
        return ReceivedRows(x, topk_ids, topk_weights, None, SymmetricReturn(self._link, topk_ids, tokens.topk_ids))
