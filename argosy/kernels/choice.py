"""Which implementation of an operation runs: the device of its input decides, at every call.

It computes nothing, and imports Triton, which is installed with CUDA's torch only, where a CUDA tensor asks for it.
Invariant: every implementation of an operation gives what ``reference.py`` gives.
"""

import functools
from types import ModuleType

import torch

from argosy.kernels import (
    cpu,
    cpu_w8a8,
    device_fp8,
    device_linear,
    device_w8a8,
    reference,
    reference_experts,
    reference_fp8,
)
from argosy.kernels.card import has_kernels
from argosy.kernels.cpu_choice import loops_for

# --- norms, activations, linears, rows --------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See ``reference.rms_norm``."""
    return _norms_of(x).rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.add_rms_norm``."""
    return _norms_of(x).add_rms_norm(x, delta, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See ``reference.silu_mul``."""
    return _norms_of(gate_up).silu_mul(gate_up)


def linear_fp32(x: torch.Tensor, weight: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """See ``reference.linear_fp32``."""
    return (device_linear if has_kernels(x) else reference).linear_fp32(x, weight, factor)


def look_up(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """See ``reference.look_up``."""
    if not has_kernels(table):
        return reference.look_up(table, ids)
    from argosy.kernels.triton import embedding

    return embedding.look_up(table, ids)


def argmax_rows(x: torch.Tensor) -> torch.Tensor:
    """See ``reference.argmax_rows``."""
    if not has_kernels(x):
        return reference.argmax_rows(x)
    from argosy.kernels.triton import argmax

    return argmax.argmax_rows(x)


def linear_fp32_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``linear_fp32`` of a float32 ``weight``, in parts for ``route_parts``: [S, T, out], to be added over S."""
    return device_linear.linear_fp32_parts(x, weight) if has_kernels(x) else linear_fp32(x, weight).unsqueeze(0)


def linear_by_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See ``reference.linear_by_head``."""
    return _by_head_of(x).linear_by_head(x, weight)


def absorb_into(q_nope: torch.Tensor, w_uk: torch.Tensor, query: torch.Tensor) -> None:
    """See ``reference.absorb_into``."""
    _by_head_of(q_nope).absorb_into(q_nope, w_uk, query)


def _by_head_of(x: torch.Tensor) -> ModuleType:
    """A CPU's product into a strided place costs twice a product and a copy."""
    return device_linear if has_kernels(x) else reference


def _norms_of(x: torch.Tensor) -> ModuleType:
    if x.is_cpu:
        return loops_for(x) or cpu
    if not has_kernels(x):
        return reference
    from argosy.kernels.triton import norms

    return norms


# --- experts and quantised linears ------------------------------------------------------------------------------------


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
    return _route_of(router_logits).route_grouped_topk(
        router_logits,
        correction_bias,
        n_group=n_group,
        topk_group=topk_group,
        num_experts_per_tok=num_experts_per_tok,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=routed_scaling_factor,
    )


def route_parts(
    parts: torch.Tensor,
    correction_bias: torch.Tensor,
    *,
    n_group: int,
    topk_group: int,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``route_grouped_topk`` of what ``linear_fp32_parts`` gave, ``parts: [S, T, E]``."""
    if has_kernels(parts):
        from argosy.kernels.triton import route

        compute = functools.partial(route.route_parts, parts)
    else:
        compute = functools.partial(route_grouped_topk, parts[0] if len(parts) == 1 else parts.sum(dim=0))
    return compute(
        correction_bias,
        n_group=n_group,
        topk_group=topk_group,
        num_experts_per_tok=num_experts_per_tok,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=routed_scaling_factor,
    )


def _route_of(x: torch.Tensor) -> ModuleType:
    if x.is_cpu:
        return loops_for(x) or cpu
    if not has_kernels(x):
        return reference
    from argosy.kernels.triton import route

    return route


def grouped_mlp(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
    num_expected_rows: int | None = None,
) -> torch.Tensor:
    """See ``reference.grouped_mlp``. ``num_expected_rows``: see ``grouped_mlp_w8a8``."""
    if has_kernels(x):
        from argosy.kernels.triton import plain_experts

        return plain_experts.grouped_mlp(x, gate_up_proj, down_proj, num_tokens_per_expert, num_expected_rows)
    return (cpu if x.is_cpu else reference).grouped_mlp(x, gate_up_proj, down_proj, num_tokens_per_expert)


def weighted_mlp(
    x: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, expert_weights: torch.Tensor
) -> torch.Tensor:
    """See ``reference_experts.weighted_mlp``."""
    is_fast = x.is_cpu and x.dtype == torch.float32
    chosen = (loops_for(x) or cpu) if is_fast else reference_experts
    return chosen.weighted_mlp(x, gate_up_proj, down_proj, expert_weights)


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference_w8a8.quantize_per_token``."""
    return _w8a8_of(x).quantize_per_token(x)


def silu_mul_quantize(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize_per_token`` of ``silu_mul``: ``gate_up: [T, 2F]`` -> int8 [T, F] and scale [T, 1] float32."""
    if not has_kernels(gate_up):
        return quantize_per_token(silu_mul(gate_up))
    from argosy.kernels.triton import norms

    return norms.silu_mul_quantize(gate_up)


def linear_w8a8_quantized(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """See ``reference_w8a8.linear_w8a8_quantized``."""
    return _w8a8_of(x).linear_w8a8_quantized(x, x_scale, weight, weight_scale, out_dtype)


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
    num_expected_rows: int | None = None,
) -> torch.Tensor:
    """See ``reference_w8a8.grouped_mlp_w8a8``.

    ``num_expected_rows``: about how many rows the counts add up to, where the host does not know it and most of x may
    be spare; None: all but a few. It is for a card's choice of programs, and changes no number of W8A8's.
    """
    matrices = gate_up_proj, gate_up_scale, down_proj, down_scale
    if has_kernels(x):
        from argosy.kernels.triton import w8a8

        return w8a8.grouped_mlp_w8a8(x, *matrices, num_tokens_per_expert, num_expected_rows)
    return _w8a8_of(x).grouped_mlp_w8a8(x, *matrices, num_tokens_per_expert)


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
    return _fp8_of(x).linear_fp8(x, weight, weight_scale_inv, has_ue8m0_scales=has_ue8m0_scales)


def grouped_mlp_fp8(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_scale_inv: torch.Tensor,
    down_proj: torch.Tensor,
    down_scale_inv: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
    *,
    has_ue8m0_scales: bool,
    num_expected_rows: int | None = None,
) -> torch.Tensor:
    """See ``reference_fp8.grouped_mlp_fp8``. ``num_expected_rows``: see ``grouped_mlp_w8a8``."""
    compute = _fp8_of(x).grouped_mlp_fp8
    if has_kernels(x):
        compute = functools.partial(compute, num_expected_rows=num_expected_rows)
    return compute(
        x,
        gate_up_proj,
        gate_up_scale_inv,
        down_proj,
        down_scale_inv,
        num_tokens_per_expert,
        has_ue8m0_scales=has_ue8m0_scales,
    )


def _fp8_of(x: torch.Tensor) -> ModuleType:
    """Cards without FP8 never ask: models dequantise there when they load."""
    if x.is_cpu:
        return reference_fp8
    if not has_kernels(x):
        return device_fp8
    from argosy.kernels.triton import fp8

    return fp8


def _w8a8_of(x: torch.Tensor) -> ModuleType:
    if x.is_cpu:
        return cpu_w8a8
    if not has_kernels(x):
        return device_w8a8
    from argosy.kernels.triton import w8a8

    return w8a8
