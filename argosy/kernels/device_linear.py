"""Linears of an NVIDIA card: float32 results, by dtypes and number of tokens; products by head, written into place.

No large weight is ever copied to float32, and no large result is moved. Invariant: ``linear_fp32`` gives what
``reference.linear_fp32`` gives, within the order of float32 sums; a token's result is the same in every batch that goes
the same way (``triton/linear_fp32.py``).

Shape letters: T tokens, n in_features, m out_features, H heads, N qk_nope_head_dim, P qk_rope_head_dim, R kv_lora_rank.
"""

import torch

from argosy.kernels import reference

# A bfloat16 weight this tall fills the card with whole sums; more tokens make it cuBLAS's case (not measured yet).
MIN_STREAMED_FEATURES = 8192
MAX_STREAMED_TOKENS = 128


def linear_fp32(x: torch.Tensor, weight: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """See ``reference.linear_fp32``. ``x``, ``weight``: bf16 or float32."""
    if x.shape[0] == 0 or x.dtype == weight.dtype == torch.float32:
        return reference.linear_fp32(x, weight, factor)
    if x.dtype == torch.float32:
        return _times(_split_tokens(x, weight), factor)
    if weight.dtype == torch.float32 or _is_streamed(x, weight):
        return _linear_tiled(x, weight, factor)
    return _times(torch.mm(x, weight.t(), out_dtype=torch.float32), factor)


def linear_fp32_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``linear_fp32`` of a float32 ``weight`` before its parts of K are added: [S, T, m], to be added in S's order."""
    # Triton is installed with CUDA's torch only.
    from argosy.kernels.triton.linear_fp32 import has_aligned_rows, multiply_parts

    is_tiled = x.dtype == torch.bfloat16 and has_aligned_rows(x) and has_aligned_rows(weight)
    return multiply_parts(x, weight) if is_tiled and x.shape[0] else linear_fp32(x, weight).unsqueeze(0)


def linear_by_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See ``reference.linear_by_head``. Contiguous: what reads it next need not copy."""
    out = x.new_empty(x.shape[0], weight.shape[0], weight.shape[2])
    torch.bmm(x.transpose(0, 1), weight, out=out.transpose(0, 1))
    return out


def absorb_into(q_nope: torch.Tensor, w_uk: torch.Tensor, query: torch.Tensor) -> None:
    """See ``reference.absorb_into``. Written into its place: a copy took four times what its bytes take."""
    torch.bmm(q_nope.transpose(0, 1), w_uk, out=query[..., : w_uk.shape[2]].transpose(0, 1))


def split_in_three(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float32 numbers as the sum of three bfloat16 ones: the rounded number, and twice what is left."""
    high = x.bfloat16()
    rest = x - high
    middle = rest.bfloat16()
    return high, middle, (rest - middle).bfloat16()


def _is_streamed(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.shape[0] <= MAX_STREAMED_TOKENS and weight.shape[0] >= MIN_STREAMED_FEATURES


def _times(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x if factor == 1.0 else x.mul_(factor)


def _linear_tiled(x: torch.Tensor, weight: torch.Tensor, factor: float) -> torch.Tensor:
    # Triton is installed with CUDA's torch only.
    from argosy.kernels.triton.linear_fp32 import has_aligned_rows, multiply_parts
    from argosy.kernels.triton.sum_parts import sum_parts

    if not (has_aligned_rows(x) and has_aligned_rows(weight)):  # no published size
        return reference.linear_fp32(x, weight, factor)
    parts = multiply_parts(x, weight)
    return _times(parts[0], factor) if parts.shape[0] == 1 else sum_parts(parts, x.shape[0], factor)


def _split_tokens(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    high, middle, low = split_in_three(x)
    return linear_fp32(torch.cat((low, middle, high)), weight).view(3, x.shape[0], weight.shape[0]).sum(dim=0)
