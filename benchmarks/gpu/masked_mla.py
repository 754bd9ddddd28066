"""Attention with materialised heads at DeepSeek-V3.2's dimensions: prefills that select 2,048 keys, or see all of them.

Operations are those of the keys that a token sees, chosen or not; the bytes are inputs read and outputs written once.
Beside it what it replaces: the sparse core on the same choice, with the products that go with it, and torch's own; and
"with kv_b_proj": this kernel with the product that makes keys and values, which is what a prefill pays.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from argosy.kernels import reference
from argosy.kernels.triton.masked_mla import PORTABLE_TILE, attend_expanded_masked
from argosy.kernels.triton.sparse_mla import attend_sparse
from argosy.kernels.triton.topk import select_topk_mask, select_topk_slots
from benchmarks.gpu.measure import Case, relative_error

HEADS, RANK, NOPE, ROPE, V, TOPK = 128, 512, 128, 64, 128, 2048
BLOCK_SIZE = 64
SCALE = 0.1352  # (N + P)^-0.5 times YaRN's factor, squared
# Tokens, and earlier ones.
LENGTHS = ((2048, 0), (4096, 0), (8192, 0), (4096, 4096), (12288, 0))
MAX_ERROR = 8e-3  # bfloat16 results and weights, against float32
CHECKED_HEADS, CHECKED_TOKENS = 2, 256  # the last, and the first


def cases() -> Iterator[Case]:
    for num_tokens, num_computed in LENGTHS:
        yield _case(num_tokens, num_computed)
    for num_rows in (4096, 12288):
        yield _mask_case(num_rows)


def _case(num_tokens: int, num_computed: int) -> Case:
    num_keys = num_computed + num_tokens
    query = torch.randn(num_tokens, HEADS, NOPE + ROPE, device="cuda").mul_(0.8).bfloat16()
    absorbed = torch.randn(num_tokens, HEADS, RANK + ROPE, device="cuda", dtype=torch.bfloat16)
    absorbed[..., RANK:] = query[..., NOPE:]
    latent = torch.randn(num_keys, RANK + ROPE, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(HEADS * (NOPE + V), RANK, device="cuda").mul_(RANK**-0.5).bfloat16()
    is_masked = num_keys > TOPK
    visible = torch.arange(num_computed + 1, num_keys + 1, dtype=torch.int32, device="cuda")
    scores = torch.randn(num_tokens, num_keys, device="cuda")
    mask = select_topk_mask(scores, visible, TOPK) if is_masked else None
    table = torch.arange(-(-num_keys // BLOCK_SIZE), dtype=torch.int32, device="cuda").unsqueeze(0)
    slots = select_topk_slots(scores, visible, TOPK, table, BLOCK_SIZE)
    cache = F.pad(latent, (0, 0, 0, -num_keys % BLOCK_SIZE)).view(-1, BLOCK_SIZE, RANK + ROPE)
    del scores

    def expand() -> tuple[torch.Tensor, torch.Tensor]:
        expanded = F.linear(latent[:, :RANK], weight).view(num_keys, HEADS, NOPE + V)
        return expanded[..., :NOPE], expanded[..., NOPE:]

    k_nope, value = expand()
    queries, k_rope = (query[..., :NOPE], absorbed[..., RANK:]), latent[:, RANK:]
    rest = (mask, num_computed, SCALE)

    def run() -> torch.Tensor:
        return attend_expanded_masked(*queries, k_nope, k_rope, value, *rest)

    def run_whole() -> torch.Tensor:
        k_nope, value = expand()
        return attend_expanded_masked(*queries, k_nope, k_rope, value, *rest)

    heads = weight.view(HEADS, NOPE + V, RANK)
    w_uk, w_uv = heads[:, :NOPE], heads[:, NOPE:].transpose(1, 2)

    def run_sparse() -> torch.Tensor:
        torch.bmm(queries[0].transpose(0, 1), w_uk, out=absorbed[..., :RANK].transpose(0, 1))
        attended = attend_sparse(absorbed, cache, slots, RANK, SCALE)
        return torch.bmm(attended.transpose(0, 1), w_uv)

    def check() -> None:
        out = run()
        for head in (0, HEADS - CHECKED_HEADS):
            part = slice(head, head + CHECKED_HEADS)
            tensors = [tensor[:, part].float() for tensor in (*queries, k_nope)]
            for start in (0, num_tokens - CHECKED_TOKENS):
                rows, last = slice(start, start + CHECKED_TOKENS), num_computed + start + CHECKED_TOKENS
                bits = None if mask is None else mask[rows, : -(-last // 32)]
                expected = reference.attend_expanded_masked(
                    *(tensor[rows] for tensor in tensors[:2]),
                    tensors[2][:last],
                    k_rope[:last].float(),
                    value[:last, part].float(),
                    bits,
                    last - CHECKED_TOKENS,
                    SCALE,
                )
                error = relative_error(out[rows, part], expected)
                if not error <= MAX_ERROR:
                    raise RuntimeError(f"attend_expanded_masked: error {error:.2e}, at most {MAX_ERROR} allowed")

    alternatives: dict[str, Callable[[], object]] = {
        "with kv_b_proj": run_whole,
        "portable loop": lambda: attend_expanded_masked(*queries, k_nope, k_rope, value, *rest, tile=PORTABLE_TILE),
        "sparse core and its products": run_sparse,
    }
    if mask is not None:
        alternatives["all that is visible"] = lambda: attend_expanded_masked(
            *queries, k_nope, k_rope, value, None, num_computed, SCALE
        )
    if num_computed == 0:
        key = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, HEADS, -1)), dim=-1)
        heads_first = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)]
        alternatives["torch, causal"] = lambda: F.scaled_dot_product_attention(
            *heads_first, is_causal=True, scale=SCALE
        )
        if mask is not None and num_keys <= 4096:
            is_chosen = reference.unpack_mask(mask, num_keys)
            alternatives["torch, mask"] = lambda: F.scaled_dot_product_attention(
                *heads_first, attn_mask=is_chosen, scale=SCALE
            )
    num_pairs = num_tokens * (num_computed + (num_tokens + 1) / 2)
    num_numbers = query.numel() + k_nope.numel() + value.numel() + k_rope.numel() + num_tokens * HEADS * V
    return Case(
        name=f"attend_expanded{'_masked' if is_masked else ''} behind {num_computed}",
        rows=num_tokens,
        run=run,
        check=check,
        num_ops=2.0 * num_pairs * HEADS * (NOPE + ROPE + V),
        num_bytes=2.0 * num_numbers + (0 if mask is None else mask.nbytes),
        alternatives=alternatives,
    )


def _mask_case(num_rows: int) -> Case:
    scores = torch.randn(num_rows, num_rows, device="cuda")
    visible = torch.arange(1, num_rows + 1, dtype=torch.int32, device="cuda")
    table = torch.arange(num_rows // BLOCK_SIZE, dtype=torch.int32, device="cuda").unsqueeze(0)

    def check() -> None:
        mask = select_topk_mask(scores, visible, TOPK)
        for rows in torch.arange(num_rows).split(512):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            expected = reference.select_topk_mask(scores[part], visible[part], TOPK)
            if not torch.equal(mask[part], expected):
                raise RuntimeError("select_topk_mask: other bits")

    return Case(
        name=f"top {TOPK} as a mask, of {num_rows}",
        rows=num_rows,
        run=lambda: select_topk_mask(scores, visible, TOPK),
        check=check,
        num_ops=0,
        num_bytes=num_rows * num_rows / 2 * 4 + num_rows * num_rows / 8,
        alternatives={"slots": lambda: select_topk_slots(scores, visible, TOPK, table, BLOCK_SIZE)},
    )
