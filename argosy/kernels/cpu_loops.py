"""Operations that a CPU does in the compiled loops of ``loops/``: room for what comes out, and where everything lies.

Invariant: each function is the fast twin of the one of its name in ``reference.py`` or ``reference_paged.py``, for
float32; tests hold them equal. The last dimension of what comes in lies whole in memory, and weights, caches and the
rows of rotations lie whole altogether. Importing this needs numba, so only ``cpu_choice.py`` does.

Shape letters: see ``reference.py``.
"""

import torch

from argosy.kernels import cpu
from argosy.kernels.loops import experts, norms, rotary, topk
from argosy.kernels.reference import RotaryRows, RotaryTable

# NOTE: torch.empty, not Tensor.new_empty, which takes twice as long.


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty(x.shape)
    norms.rms_norm(*x.shape, x.data_ptr(), x.stride(0), weight.data_ptr(), eps, out.data_ptr())
    return out


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if delta.dtype is not x.dtype:
        return cpu.add_rms_norm(x, delta, weight, eps)
    out, total = torch.empty(x.shape), torch.empty(x.shape)
    terms = x.data_ptr(), x.stride(0), delta.data_ptr(), delta.stride(0)
    norms.add_rms_norm(*x.shape, *terms, weight.data_ptr(), eps, out.data_ptr(), total.data_ptr())
    return out, total


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    out = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2)
    experts.silu_mul(*out.shape, gate_up.data_ptr(), gate_up.stride(0), out.data_ptr())
    return out


# --- rotary embeddings and the cache ----------------------------------------------------------------------------------


def rotary_rows(table: RotaryTable, positions: torch.Tensor) -> RotaryRows:
    """See ``reference.RotaryTable.at``."""
    num_tokens, half = len(positions), table.cos.shape[1]
    turns = torch.empty(num_tokens, 1, half, dtype=torch.complex64)
    half_cos, half_sin = torch.empty(num_tokens, 1, 2 * half), torch.empty(num_tokens, 1, 2 * half)
    angles = table.cos.data_ptr(), table.sin.data_ptr(), positions.data_ptr()
    rotary.gather_rows(num_tokens, half, *angles, turns.data_ptr(), half_cos.data_ptr(), half_sin.data_ptr())
    return RotaryRows(turns, half_cos, half_sin)


def rope_interleaved_(x: torch.Tensor, rows: RotaryRows) -> None:
    rope_interleaved_into(x, rows, x)


def rope_interleaved_into(x: torch.Tensor, rows: RotaryRows, out: torch.Tensor) -> None:
    source, target = (x.data_ptr(), *x.stride()[:2]), (out.data_ptr(), *out.stride()[:2])
    rotary.rotate_pairs(*x.shape, *source, rows.turns.data_ptr(), *target)


def rope_half_split_(x: torch.Tensor, rows: RotaryRows) -> None:
    angles = rows.half_cos.data_ptr(), rows.half_sin.data_ptr()
    rotary.rotate_halves(*x.shape, x.data_ptr(), *x.stride()[:2], *angles)


def write_latent(
    latent: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    rows: RotaryRows,
    latent_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    rank = norm_weight.shape[0]
    shape, norm = (latent.shape[0], rank, latent.shape[1] - rank), (norm_weight.data_ptr(), eps)
    target = latent_cache.data_ptr(), slot_mapping.data_ptr()
    norms.write_latent(*shape, latent.data_ptr(), latent.stride(0), *norm, rows.turns.data_ptr(), *target)


def write_index_k(
    key: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    rows: RotaryRows,
    rope_dim: int,
    index_k_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    norm = norm_weight.data_ptr(), norm_bias.data_ptr(), eps
    angles, target = (
        (rows.half_cos.data_ptr(), rows.half_sin.data_ptr()),
        (index_k_cache.data_ptr(), slot_mapping.data_ptr()),
    )
    norms.write_index_k(*key.shape, rope_dim, key.data_ptr(), key.stride(0), *norm, *angles, *target)


# --- the indexer and experts ------------------------------------------------------------------------------------------


def select_topk_slots(
    scores: torch.Tensor, num_visible: torch.Tensor, num_selected: int, block_table: torch.Tensor, block_size: int
) -> torch.Tensor:
    """In the order of positions."""
    assert num_visible.dtype is block_table.dtype is torch.int32
    slots = torch.empty(scores.shape[0], num_selected, dtype=torch.int64)
    table_stride = 0 if block_table.shape[0] == 1 else block_table.stride(0)
    table = num_visible.data_ptr(), block_table.data_ptr(), table_stride, block_size
    topk.select_topk_slots(*scores.shape, num_selected, scores.data_ptr(), scores.stride(0), *table, slots.data_ptr())
    return slots


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
    """Ties go to the lowest number; ``reference`` leaves them open."""
    shape = router_logits.shape[0], num_experts_per_tok
    topk_ids, topk_weights = torch.empty(shape, dtype=torch.int32), torch.empty(shape)
    settings = n_group, topk_group, norm_topk_prob, routed_scaling_factor
    logits, out = (router_logits.data_ptr(), correction_bias.data_ptr()), (topk_ids.data_ptr(), topk_weights.data_ptr())
    experts.route_grouped_topk(*router_logits.shape, num_experts_per_tok, *logits, *settings, *out)
    return topk_ids, topk_weights


def spread_weights(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ep_local.spread_weights_on_host``."""
    num_tokens, num_chosen = topk_ids.shape
    weights, counts = torch.empty(num_tokens, num_experts), torch.empty(num_experts, dtype=torch.int32)
    chosen, out = (topk_ids.data_ptr(), topk_weights.data_ptr()), (weights.data_ptr(), counts.data_ptr())
    experts.spread_weights(num_tokens, num_experts, num_chosen, *chosen, *out)
    return weights, counts


def weighted_mlp(
    x: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, expert_weights: torch.Tensor
) -> torch.Tensor:
    return cpu.weighted_mlp(x, gate_up_proj, down_proj, expert_weights, activate=_silu_mul_weighted)


def _silu_mul_weighted(gate_up: torch.Tensor, expert_weights: torch.Tensor) -> torch.Tensor:
    num_tokens, num_experts, joined_width = gate_up.shape
    out = torch.empty(num_tokens, num_experts, joined_width // 2)
    source = gate_up.data_ptr(), gate_up.stride(0), gate_up.stride(2)
    weights = expert_weights.data_ptr(), expert_weights.stride(0)
    experts.silu_mul_weighted(*out.shape, *source, *weights, out.data_ptr())
    return out
