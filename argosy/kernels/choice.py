"""Which implementation of an operation runs: the device of its input decides, at every call.

It computes nothing. Invariant: every implementation of an operation gives what ``reference.py`` gives.
"""

import torch

from argosy.kernels import cpu, reference


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See ``reference.rms_norm``."""
    return (cpu if x.is_cpu else reference).rms_norm(x, weight, eps)


def select_topk_positions(scores: torch.Tensor, num_visible: torch.Tensor, topk: int) -> torch.Tensor:
    """See ``reference.select_topk_positions``."""
    return (cpu if scores.is_cpu else reference).select_topk_positions(scores, num_visible, topk)


def positions_to_slots(positions: torch.Tensor, block_table: torch.Tensor, block_size: int) -> torch.Tensor:
    """See ``reference.positions_to_slots``."""
    return (cpu if positions.is_cpu else reference).positions_to_slots(positions, block_table, block_size)


def route_grouped_topk(
    router_logits: torch.Tensor,
    correction_bias: torch.Tensor,
    *,
    n_group: int,
    topk_group: int,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.route_grouped_topk``."""
    return (cpu if router_logits.is_cpu else reference).route_grouped_topk(
        router_logits,
        correction_bias,
        n_group=n_group,
        topk_group=topk_group,
        num_experts_per_tok=num_experts_per_tok,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=routed_scaling_factor,
    )


def grouped_mlp(
    x: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, num_tokens_per_expert: torch.Tensor
) -> torch.Tensor:
    """See ``reference.grouped_mlp``."""
    return (cpu if x.is_cpu else reference).grouped_mlp(x, gate_up_proj, down_proj, num_tokens_per_expert)
