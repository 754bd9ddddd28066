"""Which implementation of an operation runs: the device of its input decides, at every call.

It computes nothing. Invariant: every implementation of an operation gives what ``reference.py`` gives.
"""

from types import ModuleType

import torch

from argosy.kernels import cpu, cpu_w8a8, device_fp8, device_w8a8, reference, reference_experts, reference_fp8


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See ``reference.rms_norm``."""
    return (cpu if x.is_cpu else reference).rms_norm(x, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See ``reference.silu_mul``."""
    return (cpu if gate_up.is_cpu else reference).silu_mul(gate_up)


def select_topk_slots(
    scores: torch.Tensor, num_visible: torch.Tensor, topk: int, block_table: torch.Tensor, block_size: int
) -> torch.Tensor:
    """See ``reference.select_topk_slots``."""
    chosen = cpu if scores.is_cpu else reference
    return chosen.select_topk_slots(scores, num_visible, topk, block_table, block_size)


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


def weighted_mlp(
    x: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, expert_weights: torch.Tensor
) -> torch.Tensor:
    """See ``reference_experts.weighted_mlp``."""
    is_fast = x.is_cpu and x.dtype == torch.float32
    return (cpu if is_fast else reference_experts).weighted_mlp(x, gate_up_proj, down_proj, expert_weights)


def linear_w8a8(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """See ``reference_w8a8.linear_w8a8``."""
    return _w8a8_of(x).linear_w8a8(x, weight, weight_scale)


def grouped_mlp_w8a8(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_proj: torch.Tensor,
    down_scale: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
) -> torch.Tensor:
    """See ``reference_w8a8.grouped_mlp_w8a8``."""
    return _w8a8_of(x).grouped_mlp_w8a8(x, gate_up_proj, gate_up_scale, down_proj, down_scale, num_tokens_per_expert)


def grouped_mlp_w8a8_masked(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_proj: torch.Tensor,
    down_scale: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
) -> torch.Tensor:
    """See ``reference_w8a8.grouped_mlp_w8a8_masked``."""
    return _w8a8_of(x).grouped_mlp_w8a8_masked(
        x, gate_up_proj, gate_up_scale, down_proj, down_scale, num_tokens_per_expert
    )


def linear_fp8(
    x: torch.Tensor, weight: torch.Tensor, weight_scale_inv: torch.Tensor, *, has_ue8m0_scales: bool
) -> torch.Tensor:
    """See ``reference_fp8.linear_fp8``."""
    chosen = reference_fp8 if x.is_cpu else device_fp8
    return chosen.linear_fp8(x, weight, weight_scale_inv, has_ue8m0_scales=has_ue8m0_scales)


def _w8a8_of(x: torch.Tensor) -> ModuleType:
    if x.is_cpu:
        return cpu_w8a8
    if not x.is_cuda:
        return device_w8a8
    # Triton is installed with CUDA's torch only.
    from argosy.kernels.triton import w8a8

    return w8a8
