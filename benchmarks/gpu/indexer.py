"""The indexer: scores of all visible keys, and the choice of the best 2,048 of them.

Decode's scores are laid out for the longest possible sequence, as in a device graph; the operations and bytes counted
are those of visible keys alone.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from argosy.kernels import reference, reference_cache_rows
from argosy.kernels.reference_cache_rows import FP8, INT8, NumberFormat
from argosy.kernels.triton import topk
from argosy.kernels.triton.index_scores import MANY_TILES, Tile, index_scores_paged, index_scores_paged_encoded
from argosy.kernels.triton.topk import select_topk_mask, select_topk_slots
from benchmarks.gpu.measure import Case, relative_error

DEVICE = "cuda"
HEADS, DIM, TOPK, BLOCK_SIZE, MAX_SEQ_LEN = 64, 128, 2048, 64, 163840
FORMATS: dict[str, NumberFormat | None] = {"int8": INT8, "fp8": FP8, "bf16": None}
DECODES = ((1, 4096), (16, 4096), (64, 4096), (128, 4096), (256, 4096), (1, 163840))  # requests, keys of each
PREFILLS = ((4096, 4096), (8192, 8192), (8192, 16384), (4096, 65536))  # tokens, keys that the last one sees
# Tiles of prefill to set beside the chosen one, by the bytes of a number.
OTHER_TILES = {
    1: (
        MANY_TILES[1],
        *(Tile(256, tokens, 8, 4, is_hopper=True) for tokens in (64, 256)),
        Tile(256, 128, 8, 4, is_hopper=True, turn_tokens=4),
        Tile(256, 128, 12, 4, is_hopper=True),
    ),
    2: (
        MANY_TILES[2],
        *(Tile(256, tokens, 6, 4, is_hopper=True) for tokens in (64, 256)),
        Tile(256, 128, 6, 4, is_hopper=True, turn_tokens=4),
        Tile(256, 128, 7, 4, is_hopper=True),
    ),
}
# Rows, visible scores of each, the room that each has. Of 9,300 no row begins at a multiple of 16 bytes, and scores are
# read one by one: `index_scores_paged` never returns such rows.
CHOICES = (
    *((num_rows, 4096, 4096) for num_rows in (1, 16, 64, 128, 4096)),
    *((16, 4100, 4160), (64, 9300, 9300), (64, 9300, 9312), (64, 4096, MAX_SEQ_LEN), (4096, 16384, 16384)),
    *((1, 65536, 65536), (64, 65536, 65536), (1, 163840, 163840), (64, 163840, 163840)),
)
# Rows of a prefill, each of which sees one score more than the one before; the scores that the last one sees.
CAUSAL_CHOICES = ((8192, 16384), (8192, 65536))
CAUSAL_MASKS = ((4096, 4096), (8192, 8192))
# Tiles of a choice to set beside the chosen one, by the scores that a program holds.
OTHER_CHOICE_TILES = {
    4096: (topk.Tile(4), topk.Tile(4, 64), topk.Tile(8), topk.Tile(16)),
    8192: (topk.Tile(8), topk.Tile(8, 64), topk.Tile(16), topk.Tile(32)),
    16384: (topk.Tile(16), topk.Tile(16, 64), topk.Tile(32)),
    topk.MAX_BLOCK: (topk.Tile(16), topk.Tile(32)),
}
CHECKED_ROWS = 128  # at a time
MOST_SORTED = 2**26  # scores


def cases() -> Iterator[Case]:
    for unit, numbers in FORMATS.items():
        for batch, length in DECODES:
            yield _score_case("decode", unit, numbers, torch.full((batch, 1), length, dtype=torch.int32), MAX_SEQ_LEN)
        for num_tokens, length in PREFILLS:
            visible = torch.arange(length - num_tokens + 1, length + 1, dtype=torch.int32).view(1, -1)
            yield _score_case("prefill", unit, numbers, visible, length)
    for num_rows, length, width in CHOICES:
        num_visible = torch.full((num_rows,), length, dtype=torch.int32)
        yield _choice_case(f"top {TOPK} of {length}, room for {width}", num_visible, width)
    for num_rows, width in CAUSAL_CHOICES:
        num_visible = torch.arange(width - num_rows + 1, width + 1, dtype=torch.int32)
        yield _choice_case(f"top {TOPK}, causal, to {width}", num_visible, width)
    for num_rows, width in CAUSAL_MASKS:
        yield _mask_case(torch.arange(width - num_rows + 1, width + 1, dtype=torch.int32), width)


def _score_case(
    phase: str, unit: str, numbers: NumberFormat | None, num_visible: torch.Tensor, max_seq_len: int
) -> Case:
    batch, num_tokens = num_visible.shape
    longest, num_seen = int(num_visible.max()), int(num_visible.sum(dtype=torch.int64))
    num_blocks = -(-longest // BLOCK_SIZE)
    table = torch.zeros(batch, -(-max_seq_len // BLOCK_SIZE), dtype=torch.int32, device=DEVICE)
    table[:, :num_blocks] = torch.randperm(batch * num_blocks, device=DEVICE).view(batch, num_blocks) + 1
    cache = torch.randn(batch * num_blocks + 1, BLOCK_SIZE, DIM, dtype=torch.bfloat16, device=DEVICE)
    index_q = torch.randn(batch, num_tokens, HEADS, DIM, dtype=torch.bfloat16, device=DEVICE)
    weights = torch.randn(batch, num_tokens, HEADS, device=DEVICE) * (HEADS * DIM) ** -0.5
    run: Callable[..., torch.Tensor]
    specified: Callable[..., torch.Tensor]
    if numbers is None:
        run, specified = index_scores_paged, reference.index_scores
    else:
        hadamard = reference_cache_rows.hadamard_matrix(DIM, cache.device)
        rows = reference_cache_rows.encode_index_k(cache.view(-1, DIM), hadamard, numbers)
        cache = rows.view(*cache.shape[:2], DIM + 4)
        run = partial(index_scores_paged_encoded, hadamard=hadamard, numbers=numbers)
        specified = partial(reference_cache_rows.index_scores_encoded, hadamard=hadamard, numbers=numbers)
    visible = num_visible.to(DEVICE)
    arguments = (index_q, cache, weights, table, visible, max_seq_len)

    def check() -> None:
        scores = run(*arguments)
        for request in range(0, batch, max(1, batch // 2)):  # one token in so many of one request in so many
            tokens = slice(num_tokens - 1, None, None) if num_tokens == 1 else slice(0, None, num_tokens // 31)
            one = slice(request, request + 1)
            keys = reference.gather_cache(cache, table[one], longest)
            expected = specified(index_q[one, tokens], keys, weights[one, tokens])
            is_visible = torch.arange(longest, device=DEVICE) < visible[one, tokens].unsqueeze(2)
            error = relative_error(scores[one, tokens, :longest][is_visible], expected[is_visible])
            assert error < 1e-3, f"relative error {error:.2e}"

    def run_reference() -> torch.Tensor:
        return specified(index_q, reference.gather_cache(cache, table, longest), weights)

    alternatives: dict[str, Callable[[], object]] = {}
    if batch * num_tokens * longest <= 4096 * 4096:
        alternatives["torch"] = run_reference
    if phase == "prefill":
        for tile in OTHER_TILES[2 if numbers is None else 1]:
            name = f"{tile.block_keys}/{tile.block_tokens}/{tile.num_stages}/{tile.num_warps}"
            name += f" by hand, turns of {tile.turn_tokens}" if tile.is_hopper else " by Triton"
            alternatives[name] = partial(run, *arguments, tile=tile)
    key_bytes = cache.shape[2] * cache.element_size()
    return Case(
        name=f"index scores {unit}, {phase}, {longest} keys",
        rows=batch * num_tokens,
        run=partial(run, *arguments),
        check=check,
        num_ops=2 * num_seen * HEADS * DIM,
        num_bytes=batch * longest * key_bytes + num_seen * 4 + index_q.numel() * 2 + weights.numel() * 4,
        unit=unit,
        alternatives=alternatives,
    )


def _choice_case(name: str, num_visible: torch.Tensor, width: int) -> Case:
    num_rows, num_seen = len(num_visible), int(num_visible.sum(dtype=torch.int64))
    scores = torch.randn(num_rows, width, device=DEVICE)
    visible = num_visible.to(DEVICE)
    table = torch.randperm(width // BLOCK_SIZE + 1, device=DEVICE).int().unsqueeze(0)
    arguments = (visible, TOPK, table, BLOCK_SIZE)

    def check() -> None:
        slots = select_topk_slots(scores, *arguments)
        for rows in torch.arange(num_rows).split(CHECKED_ROWS):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            expected = reference.select_topk_slots(scores[part], visible[part], TOPK, table, BLOCK_SIZE)
            assert torch.equal(slots[part].sort(dim=1).values, expected.sort(dim=1).values), "other slots"

    alternatives: dict[str, Callable[[], object]] = {
        "torch.topk": lambda: scores[:, : int(num_visible[-1])].topk(TOPK, dim=1)
    }
    if num_seen <= MOST_SORTED:  # the specification sorts numbers of 8 bytes
        alternatives["torch"] = lambda: reference.select_topk_slots(scores, *arguments)
    for tile in _other_tiles(width):
        alternatives[_describe(tile)] = partial(select_topk_slots, scores, *arguments, tile=tile)
    return Case(
        name=name,
        rows=num_rows,
        run=partial(select_topk_slots, scores, *arguments),
        check=check,
        num_ops=0,
        num_bytes=num_seen * 4 + num_rows * TOPK * 8,
        alternatives=alternatives,
    )


def _mask_case(num_visible: torch.Tensor, width: int) -> Case:
    num_rows, num_seen = len(num_visible), int(num_visible.sum(dtype=torch.int64))
    scores = torch.randn(num_rows, width, device=DEVICE)
    visible = num_visible.to(DEVICE)

    def check() -> None:
        mask = select_topk_mask(scores, visible, TOPK)
        for rows in torch.arange(num_rows).split(CHECKED_ROWS):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            assert torch.equal(mask[part], reference.select_topk_mask(scores[part], visible[part], TOPK)), "other bits"

    return Case(
        name=f"mask of top {TOPK}, causal, to {width}",
        rows=num_rows,
        run=partial(select_topk_mask, scores, visible, TOPK),
        check=check,
        num_ops=0,
        num_bytes=num_seen * 4 + num_rows * width / 8,
        alternatives={
            _describe(tile): partial(select_topk_mask, scores, visible, TOPK, tile=tile) for tile in _other_tiles(width)
        },
    )


def _other_tiles(width: int) -> tuple[topk.Tile, ...]:
    block = min(max(4096, 1 << (width - 1).bit_length()), topk.MAX_BLOCK)
    return OTHER_CHOICE_TILES[block]


def _describe(tile: topk.Tile) -> str:
    return f"{tile.num_warps} warps" + (f", {tile.max_registers} registers" if tile.max_registers else "")
