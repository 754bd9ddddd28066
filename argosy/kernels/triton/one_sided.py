"""Tokens and sums put straight into other ranks' memory, and waiting for what they put here: low latency on one node.

Every rank maps every rank's buffer; ``addresses`` are where. A put ends with a flag in each peer's buffer that tells
which turn of the area it was; a wait compares flags with the turn that this rank's own put counted. Nobody waits before
a put: who may overwrite what, and when, is the caller's (``distributed/ep_symmetric.py``). Invariant: turns are counted
on the card, so that a recording replays them; a flag is set behind all of its put's rows, and read before any.

Shape letters: T tokens, K experts per token, E experts, G ranks, C rows of a rank, D hidden, W words of a row.
"""

from typing import Protocol

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from argosy.kernels.triton.pack_rows import load_words, split_payload
from argosy.kernels.triton.row_ops import TokenColumns
from argosy.kernels.triton.sum_parts import sum_visited_parts

BLOCK_SIZE = 1024
NUM_WARPS = 4
MAX_PROGRAMS = 256  # of a put: enough to fill the links, few enough that counting those that are done costs nothing
_IS_INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


class Area(Protocol):
    """A part of every rank's buffer that one kind of exchange uses in turn, and its counters here."""

    @property
    def rank(self) -> int: ...
    @property
    def words(self) -> torch.Tensor: ...  # int32, of this rank's buffer: the area's rows
    @property
    def flags(
        self,
    ) -> torch.Tensor: ...  # int32, of this rank's buffer, G of the same length; the first word is set by rank g
    @property
    def word_addresses(self) -> torch.Tensor: ...  # [G] int64: where every rank's ``words`` are
    @property
    def flag_addresses(self) -> torch.Tensor: ...  # [G] int64: where every rank's ``flags`` are
    @property
    def counters(self) -> torch.Tensor: ...  # [2] int32: turns, and programs of a put that are done
    @property
    def missing(self) -> torch.Tensor: ...  # [G + 1] int32, read by the host: who did not come; the last: anybody
    @property
    def limit_ns(self) -> int: ...  # how long a wait may take; the interpreter counts looks


class TritonOneSidedOps:
    """For ``SymmetricTransport``."""

    def put_tokens(self, tokens: TokenColumns, num_rows: int, expert_owner: torch.Tensor, area: Area) -> None:
        """Into every rank's ``words`` as [G, num_rows, W]: this rank's part of them.

        ``expert_owner: [E + 1]`` int32, the last for -1. Ids and weights go to all; the payload to ranks that own one
        of the token's experts, elsewhere old words stay. Rows behind token T - 1 have the ids -1.
        """
        words, scales = split_payload(tokens.payload)
        topk_ids, weights = tokens.topk_ids, tokens.topk_weights.view(torch.int32)
        num_blocks = triton.cdiv(tokens.row_words, BLOCK_SIZE)
        _put_tokens_kernel[(min(num_rows * num_blocks, MAX_PROGRAMS),)](
            words,
            scales,
            topk_ids,
            weights,
            expert_owner,
            area.word_addresses,
            area.flag_addresses,
            area.counters,
            topk_ids.shape[0],
            num_rows,
            words.shape[1],
            tokens.row_words,
            expert_owner.shape[0] - 1,
            area.rank,
            words.stride(0),
            scales.stride(0),
            scales.stride(1),
            topk_ids.stride(0),
            topk_ids.stride(1),
            weights.stride(0),
            weights.stride(1),
            NUM_SCALES=scales.shape[1],
            NUM_BLOCKS=num_blocks,
            BLOCK=BLOCK_SIZE,
            num_warps=NUM_WARPS,
            **_sizes(topk_ids, area),
        )

    def wait_for_puts(self, area: Area) -> None:
        """Until all ranks' rows of this turn are here; at the limit ``missing`` tells whose are not."""
        _wait_kernel[(1,)](area.flags, area.counters, area.missing, area.limit_ns, num_warps=1, **_rank_sizes(area))

    def put_sums(self, sums: torch.Tensor, topk_ids: torch.Tensor, expert_owner: torch.Tensor, area: Area) -> None:
        """``sums: [G * C, D]``, by source rank: into each source's ``words`` as [G, C, D] of the sums' dtype, this
        rank's part of them. ``topk_ids: [G * C, K]`` int32; sums of tokens that have no expert here are not sent.
        """
        num_lines, hidden_size = sums.shape
        num_blocks = triton.cdiv(hidden_size, BLOCK_SIZE)
        _put_sums_kernel[(min(num_lines * num_blocks, MAX_PROGRAMS),)](
            sums,
            topk_ids,
            expert_owner,
            area.word_addresses,
            area.flag_addresses,
            area.counters,
            num_lines,
            num_lines // area.word_addresses.shape[0],
            hidden_size,
            expert_owner.shape[0] - 1,
            area.rank,
            sums.stride(0),
            topk_ids.stride(0),
            topk_ids.stride(1),
            NUM_BLOCKS=num_blocks,
            BLOCK=BLOCK_SIZE,
            num_warps=NUM_WARPS,
            **_sizes(topk_ids, area),
        )

    def add_sums(
        self,
        parts: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_owner: torch.Tensor,
        area: Area,
        addend: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Waits as ``wait_for_puts``, then adds in float32, in rank order: ``parts: [G, C, D]``, a view of ``words``,
        ``topk_ids: [T, K]`` int32 of this rank's own tokens -> [T, D] float32. With ``addend: [T, D]`` of any float,
        contiguous, added last: in its dtype."""
        # One program waits, also without tokens: if all of the sum's did, their looks would queue up at the flags.
        self.wait_for_puts(area)
        return sum_visited_parts(parts, topk_ids, expert_owner, addend)


def _sizes(topk_ids: torch.Tensor, area: Area) -> dict[str, int]:
    num_ids = topk_ids.shape[1]
    return {"NUM_IDS": num_ids, "NUM_IDS_PADDED": triton.next_power_of_2(num_ids)} | _rank_sizes(area)


def _rank_sizes(area: Area) -> dict[str, int]:
    num_ranks = area.word_addresses.shape[0]
    return {
        "NUM_RANKS": num_ranks,
        "NUM_RANKS_PADDED": triton.next_power_of_2(num_ranks),
        "FLAG_WORDS": area.flags.shape[0] // num_ranks,
    }


@triton.jit
def _load_owners(
    topk_ids,
    expert_owner,
    token,
    is_token,
    num_experts,
    id_stride,
    id_column_stride,
    NUM_IDS: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    NUM_IDS_PADDED: tl.constexpr,  # noqa: N803
):
    """Ranks that own the token's experts; for -1 that of no rank."""
    id_columns = tl.arange(0, NUM_IDS_PADDED)
    is_id = (id_columns < NUM_IDS) & is_token
    ids = tl.load(topk_ids + token * id_stride + id_columns * id_column_stride, mask=is_id, other=-1)
    return tl.load(expert_owner + tl.where(ids < 0, num_experts, ids))


@triton.jit
def _is_among(rank, owners):
    return tl.max((owners == rank).to(tl.int32), axis=0) > 0


@triton.jit
def _set_flags(
    flag_addresses,
    counters,
    rank,
    NUM_RANKS: tl.constexpr,  # noqa: N803
    NUM_RANKS_PADDED: tl.constexpr,  # noqa: N803
    FLAG_WORDS: tl.constexpr,  # noqa: N803
):
    """Behind a put, by its last program. NOTE(order): the barrier brings what all threads of a program wrote before the
    count of one of them, the count before the last program's, and that before the flags, for all cards of the system.
    """
    tl.debug_barrier()
    num_done = tl.atomic_add(counters + 1, 1, sem="acq_rel", scope="sys")
    if num_done == tl.num_programs(0) - 1:
        turn = tl.load(counters) + 1
        tl.store(counters, turn)
        tl.store(counters + 1, 0)
        peers = tl.arange(0, NUM_RANKS_PADDED)  # a thread each: flags travel at once
        is_peer = peers < NUM_RANKS
        flags = tl.load(flag_addresses + peers, mask=is_peer, other=0).to(tl.pointer_type(tl.int32))
        turns = turn + tl.zeros((NUM_RANKS_PADDED,), dtype=tl.int32)
        tl.atomic_xchg(flags + rank * FLAG_WORDS, turns, mask=is_peer, sem="release", scope="sys")


@triton.jit
def _now_ns(num_looks):
    if _IS_INTERPRETED:
        return num_looks
    else:  # noqa: RET505 - what is not compiled must not be looked at
        return cuda.globaltimer()


@triton.jit
def _find_lead(
    flags,
    turn,
    NUM_RANKS: tl.constexpr,  # noqa: N803
    FLAG_WORDS: tl.constexpr,  # noqa: N803
):
    """How far the last rank is ahead of the turn; below 0 it has not come. Every thread looks for itself: they may see
    different numbers, so they must not exchange any while they wait."""
    lead = tl.load(flags, volatile=True) - turn
    for source in tl.static_range(1, NUM_RANKS):
        lead = tl.minimum(lead, tl.load(flags + source * FLAG_WORDS, volatile=True) - turn)
    return lead


@triton.jit
def _wait_kernel(
    flags,
    counters,
    missing,
    limit_ns,
    NUM_RANKS: tl.constexpr,  # noqa: N803
    NUM_RANKS_PADDED: tl.constexpr,  # noqa: N803
    FLAG_WORDS: tl.constexpr,  # noqa: N803
):
    """Looks without order, until all flags are there, then reads them once more before all that comes behind.

    When once somebody did not come, nobody is waited for again.
    """
    turn = tl.load(counters)
    num_looks = tl.zeros((), dtype=tl.int64)
    waited_ns = tl.zeros((), dtype=tl.int64)
    lead = _find_lead(flags, turn, NUM_RANKS, FLAG_WORDS)
    if lead < 0:  # noqa: SIM102 - the host's memory is far away: it is read only where there is time
        if tl.load(missing + NUM_RANKS, volatile=True) == 0:
            started_ns = _now_ns(num_looks)
            while (lead < 0) & (waited_ns <= limit_ns):
                lead = _find_lead(flags, turn, NUM_RANKS, FLAG_WORDS)
                num_looks += 1
                waited_ns = _now_ns(num_looks) - started_ns
    sources = tl.arange(0, NUM_RANKS_PADDED)
    is_source = sources < NUM_RANKS
    places = flags + sources * FLAG_WORDS
    seen = tl.atomic_add(places, tl.zeros_like(sources), mask=is_source, sem="acquire", scope="sys")
    tl.debug_barrier()
    is_missing = is_source & (seen - turn < 0)
    tl.store(missing + sources, 1, mask=is_missing)
    tl.store(missing + NUM_RANKS + tl.zeros_like(sources), 1, mask=is_missing)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "rank", "scale_column_stride"])
def _put_tokens_kernel(
    words,
    scales,
    topk_ids,
    weights,
    expert_owner,
    word_addresses,
    flag_addresses,
    counters,
    num_tokens,
    num_rows,
    num_words,
    row_words,
    num_experts,
    rank,
    word_stride,
    scale_stride,
    scale_column_stride,
    id_stride,
    id_column_stride,
    weight_stride,
    weight_column_stride,
    NUM_SCALES: tl.constexpr,  # noqa: N803
    NUM_IDS: tl.constexpr,  # noqa: N803
    NUM_IDS_PADDED: tl.constexpr,  # noqa: N803
    NUM_RANKS: tl.constexpr,  # noqa: N803
    NUM_RANKS_PADDED: tl.constexpr,  # noqa: N803
    FLAG_WORDS: tl.constexpr,  # noqa: N803
    NUM_BLOCKS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    first = rank * num_rows
    for item in range(tl.program_id(0), num_rows * NUM_BLOCKS, tl.num_programs(0)):
        row = item // NUM_BLOCKS + tl.zeros((), dtype=tl.int64)
        columns = (item % NUM_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        is_token = row < num_tokens
        values = load_words(
            words,
            scales,
            topk_ids,
            weights,
            row,
            columns,
            is_token,
            num_words,
            word_stride,
            scale_stride,
            scale_column_stride,
            id_stride,
            id_column_stride,
            weight_stride,
            weight_column_stride,
            NUM_SCALES,
            NUM_IDS,
        )
        owners = _load_owners(
            topk_ids, expert_owner, row, is_token, num_experts, id_stride, id_column_stride, NUM_IDS, NUM_IDS_PADDED
        )
        for i in tl.static_range(NUM_RANKS):
            peer = (rank + 1 + i) % NUM_RANKS  # not all to one first
            places = tl.load(word_addresses + peer).to(tl.pointer_type(tl.int32))
            places = tl.multiple_of(places, 16) + (first + row) * row_words
            is_sent = (columns >= num_words + NUM_SCALES) | _is_among(peer, owners)
            tl.store(places + columns, values, mask=(columns < row_words) & is_sent)
    _set_flags(flag_addresses, counters, rank, NUM_RANKS, NUM_RANKS_PADDED, FLAG_WORDS)


@triton.jit(do_not_specialize=["num_lines", "num_rows", "rank"])
def _put_sums_kernel(
    sums,
    topk_ids,
    expert_owner,
    word_addresses,
    flag_addresses,
    counters,
    num_lines,
    num_rows,
    hidden_size,
    num_experts,
    rank,
    sum_stride,
    id_stride,
    id_column_stride,
    NUM_IDS: tl.constexpr,  # noqa: N803
    NUM_IDS_PADDED: tl.constexpr,  # noqa: N803
    NUM_RANKS: tl.constexpr,  # noqa: N803
    NUM_RANKS_PADDED: tl.constexpr,  # noqa: N803
    FLAG_WORDS: tl.constexpr,  # noqa: N803
    NUM_BLOCKS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    first = rank * num_rows
    for item in range(tl.program_id(0), num_lines * NUM_BLOCKS, tl.num_programs(0)):
        line = item // NUM_BLOCKS + tl.zeros((), dtype=tl.int64)
        columns = (item % NUM_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        owners = _load_owners(
            topk_ids, expert_owner, line, True, num_experts, id_stride, id_column_stride, NUM_IDS, NUM_IDS_PADDED
        )
        is_sent = (columns < hidden_size) & _is_among(rank, owners)
        values = tl.load(sums + line * sum_stride + columns, mask=is_sent, other=0.0)
        places = tl.load(word_addresses + line // num_rows).to(sums.dtype)
        places = tl.multiple_of(places, 16) + (first + line % num_rows) * hidden_size
        tl.store(places + columns, values, mask=is_sent)
    _set_flags(flag_addresses, counters, rank, NUM_RANKS, NUM_RANKS_PADDED, FLAG_WORDS)
