"""The specification of the masked grouped MLP: experts with a fixed capacity, of which counts say how much is real.

For the fixed layout of low-latency expert parallelism; sorted rows are ``reference.grouped_mlp``'s. Invariant: an
expert's real rows depend on nothing but themselves; what comes out for padding rows is unspecified.

Shape letters: e local experts, D hidden, F expert width.
"""

import torch
import torch.nn.functional as F

from argosy.kernels.reference import silu_mul


def grouped_mlp_masked(
    x: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, num_tokens_per_expert: torch.Tensor
) -> torch.Tensor:
    """Every expert's gated MLP on its first rows. ``x: [e, capacity, D]``, counts [e] int32 -> [e, capacity, D].

    ``gate_up_proj: [e, 2F, D]``, ``down_proj: [e, D, F]``. A CPU stops at the busiest expert's count; a device, which
    must not wait for a count, computes the whole capacity.
    """
    if not x.is_cpu or x.shape[1] == 0:
        return _batched_mlp(x, gate_up_proj, down_proj)
    busiest = int(num_tokens_per_expert.max())  # NOTE(sync): free on a CPU
    out = torch.empty_like(x)
    out[:, :busiest] = _batched_mlp(x[:, :busiest], gate_up_proj, down_proj)
    return out


def grouped_mlp_masked_loop(
    x: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, num_tokens_per_expert: torch.Tensor
) -> torch.Tensor:
    """Slow twin of ``grouped_mlp_masked``: one expert after another, padding rows 0. NOTE(sync): reads the counts."""
    out = torch.zeros_like(x)
    for expert, count in enumerate(num_tokens_per_expert.tolist()):
        gate_up = F.linear(x[expert, :count], gate_up_proj[expert])
        out[expert, :count] = F.linear(silu_mul(gate_up), down_proj[expert])
    return out


def weighted_mlp(
    x: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, expert_weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of all experts' gated MLPs on every token: ``x: [T, D]``, ``expert_weights: [T, e]`` f32 ->
    [T, D].

    ``gate_up_proj: [e, 2F, D]``, ``down_proj: [e, D, F]``. Added in float32.
    """
    out = x.new_zeros(x.shape, dtype=torch.float32)
    for expert in range(expert_weights.shape[1]):
        hidden = silu_mul(F.linear(x, gate_up_proj[expert]))
        out += F.linear(hidden, down_proj[expert]).float() * expert_weights[:, expert : expert + 1]
    return out.to(x.dtype)


def _batched_mlp(x: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> torch.Tensor:
    return torch.bmm(silu_mul(torch.bmm(x, gate_up_proj.transpose(1, 2))), down_proj.transpose(1, 2))
