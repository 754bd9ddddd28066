"""Experts in the model's own dtype on NVIDIA cards: torch's grouped products, which read the counts on the card, and
between them silu of real rows alone.

Invariant: what ``reference.grouped_mlp`` gives; silu has the card's own last bits.

Shape letters: see ``reference.py``.
"""

import torch

from argosy.kernels.reference import grouped_gemm
from argosy.kernels.triton.norms import silu_mul, silu_mul_real_rows


def grouped_mlp(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
    num_expected_rows: int | None = None,
) -> torch.Tensor:
    """See ``reference.grouped_mlp``. ``num_expected_rows``: see ``choice.grouped_mlp_w8a8``."""
    gate_up = grouped_gemm(x, gate_up_proj, num_tokens_per_expert)
    if num_expected_rows is None:
        hidden = silu_mul(gate_up)
    else:
        hidden = silu_mul_real_rows(gate_up, num_tokens_per_expert, num_expected_rows)
    return grouped_gemm(hidden, down_proj, num_tokens_per_expert)
