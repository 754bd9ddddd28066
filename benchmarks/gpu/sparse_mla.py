"""Sparse attention at DeepSeek-V3.2's dimensions: decode with a context of 4K each, prefill in one of 16K.

Operations are those of both products over all K slots; the bytes are each chosen row once, a query and a result.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch

from argosy.kernels import reference, reference_cache_rows
from argosy.kernels.reference_cache_rows import FP8, INT8, LatentRowLayout, NumberFormat, decode_latent, encode_latent
from argosy.kernels.triton.sparse_mla import (
    HOPPER_TILE,
    PORTABLE_ENCODED_TILE,
    PORTABLE_TILE,
    Tile,
    attend_sparse,
    attend_sparse_encoded,
)
from benchmarks.gpu.measure import Case, relative_error

HEADS, RANK, ROPE_DIM, TOPK = 128, 512, 64, 2048
DIM = RANK + ROPE_DIM
BLOCK_SIZE = 64
SCALE = 0.1352  # (N + P)^-0.5 times YaRN's factor, squared
DECODE_CONTEXT, PREFILL_CONTEXT = 4096, 16384
MAX_ERROR = 8e-3  # bfloat16 results and weights, against float32
MAX_TORCH_TOKENS = 2048
CHECKED_TOKENS = 8  # at the start, and at the end


def cases() -> Iterator[Case]:
    for num_tokens in (1, 16, 64, 128):
        yield _plain(num_tokens, "decode")
    for num_tokens in (2048, 8192):
        yield _plain(num_tokens, "prefill")
    for name, numbers in (("int8", INT8), ("fp8", FP8)):
        yield _encoded(64, name, numbers)


def _draw(num_tokens: int, phase: Literal["decode", "prefill"]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, a cache, and slots: of a sequence each in decode, of one that all share in prefill."""
    is_decode = phase == "decode"
    context = DECODE_CONTEXT if is_decode else PREFILL_CONTEXT
    num_rows = num_tokens * context if is_decode else context
    query = torch.randn(num_tokens, HEADS, DIM, device="cuda").mul_(0.6).bfloat16()
    cache = torch.randn(num_rows // BLOCK_SIZE, BLOCK_SIZE, DIM, device="cuda", dtype=torch.bfloat16)
    slots = torch.rand(num_tokens, context, device="cuda").argsort(dim=1)[:, :TOPK]
    if is_decode:
        slots += torch.arange(num_tokens, device="cuda").unsqueeze(1) * context
    return query, cache, slots.contiguous()


def _plain(num_tokens: int, phase: Literal["decode", "prefill"]) -> Case:
    query, cache, slots = _draw(num_tokens, phase)

    def run() -> torch.Tensor:
        return attend_sparse(query, cache, slots, RANK, SCALE)

    def run_tile(tile: Tile) -> torch.Tensor:
        return attend_sparse(query, cache, slots, RANK, SCALE, tile=tile)

    alternatives: dict[str, Callable[[], object]] = {
        "block by block": partial(run_tile, HOPPER_TILE),
        "portable loop": partial(run_tile, PORTABLE_TILE),
    }
    if num_tokens <= MAX_TORCH_TOKENS:
        alternatives["torch"] = lambda: reference.attend_sparse(query, cache, slots, RANK, SCALE)
    return Case(
        name=f"attend_sparse {phase}",
        rows=num_tokens,
        run=run,
        check=lambda: _check(run(), query, cache, slots),
        num_ops=_count_ops(num_tokens),
        num_bytes=_count_bytes(query, cache, slots),
        alternatives=alternatives,
    )


def _encoded(num_tokens: int, name: str, numbers: NumberFormat) -> Case:
    query, plain, slots = _draw(num_tokens, "decode")
    layout = LatentRowLayout(RANK, ROPE_DIM, numbers)
    cache = encode_latent(plain.view(-1, DIM), layout).view(*plain.shape[:2], layout.num_bytes)

    def run() -> torch.Tensor:
        return attend_sparse_encoded(query, cache, slots, layout, SCALE)

    def run_portable() -> torch.Tensor:
        return attend_sparse_encoded(query, cache, slots, layout, SCALE, tile=PORTABLE_ENCODED_TILE)

    def run_torch() -> torch.Tensor:
        return reference_cache_rows.attend_sparse_encoded(query, cache, slots, layout, SCALE)

    alternatives: dict[str, Callable[[], object]] = {"portable loop": run_portable, "torch": run_torch}
    return Case(
        name=f"attend_sparse_encoded {name} decode",
        rows=num_tokens,
        run=run,
        check=lambda: _check(run(), query, decode_latent(cache, layout, torch.bfloat16), slots),
        num_ops=_count_ops(num_tokens),
        num_bytes=_count_bytes(query, cache, slots),
        alternatives=alternatives,
    )


def _check(out: torch.Tensor, query: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Some tokens in float32: the specification's own scores are rounded to bfloat16 before the softmax."""
    for part in (slice(0, CHECKED_TOKENS), slice(-CHECKED_TOKENS, None)):
        rows = cache.view(-1, DIM)[slots[part].flatten()].float()  # a small cache of just these
        places = torch.arange(rows.shape[0], device=rows.device).view(-1, TOPK)
        expected = reference.attend_sparse(query[part].float(), rows.unsqueeze(0), places, RANK, SCALE)
        error = relative_error(out[part], expected)
        if not error <= MAX_ERROR:
            raise RuntimeError(f"attend_sparse: error {error:.2e}, at most {MAX_ERROR} allowed")


def _count_ops(num_tokens: int) -> float:
    return 2.0 * num_tokens * HEADS * TOPK * (DIM + RANK)


def _count_bytes(query: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> float:
    row_bytes = cache.shape[-1] * cache.element_size()
    num_rows = min(slots.numel(), cache.shape[0] * cache.shape[1])
    return float(num_rows * row_bytes + query.nbytes * (1 + RANK / DIM) + slots.nbytes)
