"""Tokens as rows of a message: payload, expert ids and weights beside each other, in one pass over the payload.

``pack_rows`` puts token i into row i and fills up with empty rows; ``count_routes`` and ``pack_routes`` put a token
into one row for every rank that needs it. Nothing is sent here. Invariant: rows stand by rank, then by token; every
word of a row is written, spare words with 0.

Shape letters: T tokens, K experts per token, G ranks, P payload words, W words of a row, N rows.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from argosy.kernels.triton.dependent_launch import IS_ON, let_next_start, wait_for_inputs

BLOCK_SIZE = 1024
NUM_WARPS = 4
# Tokens that one program of the count reads at once, and its warps: for a decode step, and for more.
FEW_TOKENS, FEW_WARPS = 128, 4
MANY_TOKENS, MANY_WARPS = 2048, 16


def pack_rows(
    payload: tuple[torch.Tensor, ...],
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    row_words: int,
    num_rows: int,
) -> torch.Tensor:
    """``payload``: int32 parts, each [T, ...], ``topk_ids: [T, K]`` int32 -> [num_rows, row_words] int32.

    Rows behind token T - 1 hold zeros and the ids -1.
    """
    message = topk_ids.new_empty(num_rows, row_words)
    if num_rows == 0:
        return message
    (words, scales), weights = split_payload(payload), topk_weights.view(torch.int32)
    num_blocks = triton.cdiv(row_words, BLOCK_SIZE)
    _pack_rows_kernel[(num_rows * num_blocks,)](
        words,
        scales,
        topk_ids,
        weights,
        message,
        topk_ids.shape[0],
        words.shape[1],
        row_words,
        words.stride(0),
        scales.stride(0),
        scales.stride(1),
        topk_ids.stride(0),
        topk_ids.stride(1),
        weights.stride(0),
        weights.stride(1),
        NUM_SCALES=scales.shape[1],
        NUM_IDS=topk_ids.shape[1],
        NUM_BLOCKS=num_blocks,
        BLOCK=BLOCK_SIZE,
        num_warps=NUM_WARPS,
        launch_pdl=IS_ON,
    )
    return message


def count_routes(topk_ids: torch.Tensor, expert_owner: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """``topk_ids: [T, K]``, ``expert_owner: [E + 1]`` int32 -> places [T, G] int32: its row among the rank's, or
    -1. Writes ``counts: [G, 2]`` int32, contiguous: rows for a rank, ids for it.
    """
    num_tokens, num_experts_per_tok = topk_ids.shape
    num_ranks = counts.shape[0]
    places = topk_ids.new_empty(num_tokens, num_ranks)
    is_few = num_tokens <= FEW_TOKENS
    _count_routes_kernel[(num_ranks,)](
        topk_ids,
        expert_owner,
        counts,
        places,
        num_tokens,
        expert_owner.shape[0] - 1,
        num_ranks,
        topk_ids.stride(0),
        topk_ids.stride(1),
        NUM_IDS=num_experts_per_tok,
        NUM_IDS_PADDED=triton.next_power_of_2(num_experts_per_tok),
        BLOCK=FEW_TOKENS if is_few else MANY_TOKENS,
        num_warps=FEW_WARPS if is_few else MANY_WARPS,
    )
    return places


def pack_routes(
    payload: tuple[torch.Tensor, ...],
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    row_words: int,
    counts: torch.Tensor,
    places: torch.Tensor,
    num_rows: Callable[[], int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """With what ``count_routes`` made -> message [N, row_words], sent_rows [T, G] int64: the token's row in it, or -1.

    ``num_rows`` waits for the host to know N; the card packs meanwhile, into as many rows as there could be.
    """
    num_tokens, num_ranks = places.shape
    message = topk_ids.new_empty(num_tokens * min(num_ranks, topk_ids.shape[1]), row_words)
    sent_rows = places.new_empty(num_tokens, num_ranks, dtype=torch.int64)
    if num_tokens > 0:
        (words, scales), weights = split_payload(payload), topk_weights.view(torch.int32)
        num_blocks = triton.cdiv(row_words, BLOCK_SIZE)
        _pack_routes_kernel[(num_tokens * num_blocks,)](
            words,
            scales,
            topk_ids,
            weights,
            counts,
            places,
            message,
            sent_rows,
            words.shape[1],
            row_words,
            words.stride(0),
            scales.stride(0),
            scales.stride(1),
            topk_ids.stride(0),
            topk_ids.stride(1),
            weights.stride(0),
            weights.stride(1),
            NUM_SCALES=scales.shape[1],
            NUM_IDS=topk_ids.shape[1],
            NUM_RANKS=num_ranks,
            NUM_BLOCKS=num_blocks,
            BLOCK=BLOCK_SIZE,
            num_warps=NUM_WARPS,
        )
    return message[: num_rows()], sent_rows


def split_payload(payload: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers, and their scales: [T, 0] of the model's own dtype, which has none."""
    return (payload[0], payload[0][:, :0]) if len(payload) == 1 else payload


@triton.jit
def load_words(
    words,
    scales,
    topk_ids,
    weights,
    token,
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
    NUM_SCALES: tl.constexpr,  # noqa: N803
    NUM_IDS: tl.constexpr,  # noqa: N803
):
    """Columns of a token's row: payload, ids, weights, spare words of 0; without a token zeros and ids of -1."""
    is_word = columns < num_words
    id_columns = columns - num_words - NUM_SCALES
    is_id = (id_columns >= 0) & (id_columns < NUM_IDS)
    weight_columns = id_columns - NUM_IDS
    is_weight = (weight_columns >= 0) & (weight_columns < NUM_IDS)
    values = tl.load(words + token * word_stride + columns, mask=is_word & is_token, other=0)
    if NUM_SCALES > 0:
        is_scale = (columns >= num_words) & (id_columns < 0)
        places = scales + token * scale_stride + (columns - num_words) * scale_column_stride
        values += tl.load(places, mask=is_scale & is_token, other=0)
    id_values = tl.load(topk_ids + token * id_stride + id_columns * id_column_stride, mask=is_id & is_token, other=-1)
    weight_values = tl.load(
        weights + token * weight_stride + weight_columns * weight_column_stride, mask=is_weight & is_token, other=0
    )
    return tl.where(is_id, id_values, tl.where(is_weight, weight_values, values))


@triton.jit(do_not_specialize=["num_tokens", "scale_column_stride"])
def _pack_rows_kernel(
    words,
    scales,
    topk_ids,
    weights,
    message,
    num_tokens,
    num_words,
    row_words,
    word_stride,
    scale_stride,
    scale_column_stride,
    id_stride,
    id_column_stride,
    weight_stride,
    weight_column_stride,
    NUM_SCALES: tl.constexpr,  # noqa: N803
    NUM_IDS: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    NUM_BLOCKS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    let_next_start()
    wait_for_inputs()
    row = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    columns = (tl.program_id(0) % NUM_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    values = load_words(
        words,
        scales,
        topk_ids,
        weights,
        row,
        columns,
        row < num_tokens,
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
    tl.store(message + row * row_words + columns, values, mask=columns < row_words)


@triton.jit(do_not_specialize=["scale_column_stride"])
def _pack_routes_kernel(
    words,
    scales,
    topk_ids,
    weights,
    counts,
    places,
    message,
    sent_rows,
    num_words,
    row_words,
    word_stride,
    scale_stride,
    scale_column_stride,
    id_stride,
    id_column_stride,
    weight_stride,
    weight_column_stride,
    NUM_SCALES: tl.constexpr,  # noqa: N803
    NUM_IDS: tl.constexpr,  # noqa: N803
    NUM_RANKS: tl.constexpr,  # noqa: N803
    NUM_BLOCKS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    token = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    block = tl.program_id(0) % NUM_BLOCKS
    columns = block * BLOCK + tl.arange(0, BLOCK)
    values = load_words(
        words,
        scales,
        topk_ids,
        weights,
        token,
        columns,
        True,
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
    first = tl.zeros((), dtype=tl.int64)
    for rank in tl.static_range(NUM_RANKS):
        place = tl.load(places + token * NUM_RANKS + rank).to(tl.int64)
        row = tl.where(place >= 0, first + place, -1)
        tl.store(message + row * row_words + columns, values, mask=(columns < row_words) & (row >= 0))
        tl.store(sent_rows + token * NUM_RANKS + rank, row, mask=block == 0)
        first += tl.load(counts + 2 * rank)


@triton.jit(do_not_specialize=["num_tokens"])
def _count_routes_kernel(
    topk_ids,
    expert_owner,
    counts,
    places,
    num_tokens,
    num_experts,
    num_ranks,
    id_stride,
    id_column_stride,
    NUM_IDS: tl.constexpr,  # noqa: N803
    NUM_IDS_PADDED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One program a rank, which reads all ids: they are few, and no second pass is needed."""
    rank = tl.program_id(0)
    id_columns = tl.arange(0, NUM_IDS_PADDED)[None, :]
    num_rows = tl.zeros((), dtype=tl.int32)
    num_entries = tl.zeros((), dtype=tl.int32)
    for start in range(0, num_tokens, BLOCK):
        tokens = (start + tl.arange(0, BLOCK)).to(tl.int64)
        is_token = tokens < num_tokens
        is_id = is_token[:, None] & (id_columns < NUM_IDS)
        ids = tl.load(
            topk_ids + tokens[:, None] * id_stride + id_columns * id_column_stride, mask=is_id, other=-1
        )  # [BLOCK, K]
        owners = tl.load(expert_owner + tl.where(ids < 0, num_experts, ids), mask=is_id, other=-1)
        hits = tl.sum((owners == rank).to(tl.int32), axis=1)  # [BLOCK]
        is_sent = (hits > 0).to(tl.int32)
        place = num_rows + tl.cumsum(is_sent, axis=0) - 1
        tl.store(places + tokens * num_ranks + rank, tl.where(hits > 0, place, -1), mask=is_token)
        num_rows += tl.sum(is_sent, axis=0)
        num_entries += tl.sum(hits, axis=0)
    tl.store(counts + 2 * rank, num_rows)
    tl.store(counts + 2 * rank + 1, num_entries)
