"""The specification of every operation, in plain torch; what runs where nothing faster was written.

Nothing here knows of layers, requests or parallelism: tensors in, tensors out. Invariant: every function accepts T = 0.

Shape letters: T tokens, B requests, D hidden, H heads, R kv_lora_rank, P qk_rope_head_dim, N qk_nope_head_dim,
V v_head_dim, E experts, K experts per token, M sorted rows (T * K), S keys of one sequence, C = R + P, J index heads,
I index_head_dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Upper bound of the scratch memory that the chunked loops below allocate at a time.
_SCRATCH_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class RotaryRows:
    """The rotations of a batch's tokens in both layouts: made once a step, used by every layer."""

    turns: torch.Tensor  # [T, 1, P / 2] complex64: interleaved pairs are multiplied by it
    half_cos: torch.Tensor  # [T, 1, P] float32: half-split is x * half_cos + (x with its halves swapped) * half_sin
    half_sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """cos and sin by position: each [max_positions, P / 2] float32."""

    cos: torch.Tensor
    sin: torch.Tensor

    def at(self, positions: torch.Tensor) -> RotaryRows:
        """``positions: [T]``."""
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)  # [T, 1, P / 2]
        return RotaryRows(torch.complex(cos, sin), torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


# --- norms and activations --------------------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x: [T, n]`` any float, ``weight: [n]`` float32 -> [T, n] in x's dtype; the arithmetic is float32."""
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x: [T, n]``, ``delta: [T, n]`` any float -> (rms_norm(total), total), total = x + delta in x's dtype."""
    total = (x + delta).to(x.dtype)
    return rms_norm(total, weight, eps), total


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """``x: [T, n]`` -> [T, n] in x's dtype; float32 inside."""
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``gate_up: [M, 2F]`` (gate first) -> silu(gate) * up: [M, F]; float32 inside (DeepSeek's inference/model.py)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate.float()).mul_(up).to(gate_up.dtype)


def linear_fp32(x: torch.Tensor, weight: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """``x: [T, n]``, ``weight: [m, n]`` -> (x @ weight^T) * factor [T, m] float32, accumulated in float32."""
    product = F.linear(x.float(), weight.float())
    return product if factor == 1.0 else product * factor


def linear_by_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x: [T, H, n]``, ``weight: [H, n, m]`` -> each head's rows times its matrix: [T, H, m], in any memory order."""
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)


def absorb_into(q_nope: torch.Tensor, w_uk: torch.Tensor, query: torch.Tensor) -> None:
    """``q_nope: [T, H, N]`` @ ``w_uk: [H, N, R]`` into the first R of ``query: [T, H, C]``; the rest stays."""
    query[..., : w_uk.shape[2]] = linear_by_head(q_nope, w_uk)


def look_up(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``table: [V, D]``, ``ids: [T]`` int64, each a row of it -> [T, D]."""
    return F.embedding(ids, table)


def argmax_rows(x: torch.Tensor) -> torch.Tensor:
    """``x: [N, V]`` -> the place of each row's largest number [N] int64: the first of equals, and a NaN before all."""
    return x.argmax(dim=1)


# --- rotary embeddings ------------------------------------------------------------------------------------------------


def rope_interleaved_(x: torch.Tensor, rotary: RotaryRows) -> None:
    """Rotate the pairs (x0, x1), (x2, x3), ... in place: MLA's layout.

    ``x: [T, heads, P]``, usually the last P of a wider tensor; the strides of T and heads are even.
    """
    rotated = x.float()  # x itself, if it is float32
    torch.view_as_complex(rotated.unflatten(-1, (x.shape[-1] // 2, 2))).mul_(rotary.turns)
    if rotated is not x:
        x.copy_(rotated)


def rope_interleaved_into(x: torch.Tensor, rotary: RotaryRows, out: torch.Tensor) -> None:
    """``rope_interleaved_``, but what was rotated goes to ``out: [T, heads, P]``, tokens and heads strided; what x
    holds afterwards is unspecified."""
    rope_interleaved_(x, rotary)
    out.copy_(x)


def rope_half_split_(x: torch.Tensor, rotary: RotaryRows) -> None:
    """Rotate the pairs (x0, x[P/2]), (x1, x[P/2 + 1]), ... in place: the indexer's layout. ``x: [T, heads, P]``."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    torch.addcmul(x * rotary.half_cos, swapped, rotary.half_sin, out=x)


# --- cache ------------------------------------------------------------------------------------------------------------


def write_cache(cache: torch.Tensor, slot_mapping: torch.Tensor, values: torch.Tensor) -> None:
    """Write ``values: [T, n]`` into ``cache: [num_blocks, block_size, n]`` in place; slot -1 writes nothing.

    NOTE(order): on the CPU a slot of -1 lands in the null block (slot 0), which nobody reads.
    """
    cache.view(-1, cache.shape[-1]).index_copy_(0, slot_mapping.clamp(min=0), values.to(cache.dtype))


def gather_cache(cache: torch.Tensor, block_table: torch.Tensor, max_seq_len: int) -> torch.Tensor:
    """Entries of whole sequences: ``cache: [num_blocks, block_size, n]``, ``block_table: [B, >= blocks]`` -> [B,
    max_seq_len, n].

    What lies beyond a sequence's length is whatever the cache holds; the caller masks it.
    """
    block_size = cache.shape[1]
    num_blocks = (max_seq_len + block_size - 1) // block_size
    blocks = cache.index_select(0, block_table[:, :num_blocks].flatten())  # [B * blocks, block_size, n]
    return blocks.view(block_table.shape[0], num_blocks * block_size, cache.shape[2])[:, :max_seq_len]


# --- the indexer ------------------------------------------------------------------------------------------------------


def index_scores(index_q: torch.Tensor, index_k: torch.Tensor, index_weights: torch.Tensor) -> torch.Tensor:
    """sum over heads of weight * relu(q . k): ``index_q [B, T, J, I]``, ``index_k [B, S, I]``, ``index_weights [B,
    T, J]`` f32.

    Returns [B, T, S] float32. The weights already hold I^-0.5 * J^-0.5 (DeepSeek-V3.2 report, equation 1).
    """
    batch, num_tokens, heads, _ = index_q.shape
    keys = index_k.transpose(1, 2).float()  # [B, I, S]
    step = max(1, _SCRATCH_BYTES // max(1, 4 * batch * heads * keys.shape[2]))
    if num_tokens <= step:
        return _index_scores_of(index_q, keys, index_weights)
    parts = zip(index_q.split(step, dim=1), index_weights.split(step, dim=1), strict=True)
    return torch.cat([_index_scores_of(queries, keys, weights) for queries, weights in parts], dim=1)


def _index_scores_of(queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    batch, num_tokens, heads, _ = queries.shape
    products = torch.bmm(queries.float().flatten(1, 2), keys).relu_().view(batch * num_tokens, heads, keys.shape[2])
    return torch.bmm(weights.reshape(batch * num_tokens, 1, heads), products).view(batch, num_tokens, keys.shape[2])


def select_topk_positions(scores: torch.Tensor, num_visible: torch.Tensor, topk: int) -> torch.Tensor:
    """Positions of the ``topk`` highest scores among the first ``num_visible`` keys: [N, topk] int32, -1 where there
    are fewer.

    ``scores: [N, S]`` float32, ``num_visible: [N]``. Ties go to the lowest position, so the choice is deterministic:
    score and position are packed into one integer, which makes every key distinct.
    """
    num_keys = scores.shape[1]
    position = torch.arange(num_keys, device=scores.device)
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # monotone in the float's value
    keys = (ordered.long() << 32) | (0x7FFFFFFF - position)
    keys = torch.where(position < num_visible.unsqueeze(1), keys, torch.iinfo(torch.int64).min)
    values, chosen = keys.topk(min(topk, num_keys), dim=1)
    chosen = torch.where(values == torch.iinfo(torch.int64).min, -1, chosen).to(torch.int32)
    return chosen if chosen.shape[1] == topk else F.pad(chosen, (0, topk - chosen.shape[1]), value=-1)


def select_topk_mask(scores: torch.Tensor, num_visible: torch.Tensor, topk: int) -> torch.Tensor:
    """The keys that ``select_topk_positions`` chooses, as bits: [N, ceil(S / 32)] int32, bit s % 32 of word s // 32."""
    num_rows, num_keys = scores.shape
    positions = select_topk_positions(scores, num_visible, topk).long()
    is_chosen = torch.zeros(num_rows, num_keys + 1, dtype=torch.bool, device=scores.device)
    is_chosen.scatter_(1, torch.where(positions < 0, num_keys, positions), True)
    return pack_mask(is_chosen[:, :num_keys])


def pack_mask(is_chosen: torch.Tensor) -> torch.Tensor:
    """``is_chosen: [N, S]`` bool -> [N, ceil(S / 32)] int32: bit s % 32 of word s // 32."""
    bits = F.pad(is_chosen, (0, -is_chosen.shape[1] % 32)).unflatten(1, (-(-is_chosen.shape[1] // 32), 32))
    return (bits.int() << torch.arange(32, dtype=torch.int32, device=bits.device)).sum(dim=2, dtype=torch.int32)


def unpack_mask(mask: torch.Tensor, num_keys: int) -> torch.Tensor:
    """``pack_mask``, backwards: [N, num_keys] bool."""
    bits = mask.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=mask.device)
    return (bits & 1).bool().flatten(1)[:, :num_keys]


# --- attention --------------------------------------------------------------------------------------------------------


def attend_expanded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_computed: int, softmax_scale: float
) -> torch.Tensor:
    """Causal attention of one sequence with materialised heads.

    ``query: [T, H, N + P]`` are positions num_computed .. num_computed + T - 1; ``key: [S, H, N + P]``,
    ``value: [S, H, V]`` with S = num_computed + T. Returns [T, H, V].
    """
    num_tokens, num_keys = query.shape[0], key.shape[0]
    mask = None
    if num_tokens > 1 and num_computed:
        rows = torch.arange(num_computed, num_keys, device=query.device).unsqueeze(1)
        mask = torch.arange(num_keys, device=query.device) <= rows  # [T, S]
    heads_first = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(
        *heads_first, attn_mask=mask, is_causal=num_tokens > 1 and not num_computed, scale=softmax_scale
    )
    return out.squeeze(0).transpose(0, 1)


def attend_expanded_masked(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    num_computed: int,
    softmax_scale: float,
) -> torch.Tensor:
    """``attend_expanded`` of parts, in which a token attends to the keys that its row of ``mask`` names.

    ``q_nope: [T, H, N]``, ``q_rope: [T, H, P]``, ``k_nope: [S, H, N]``, ``k_rope: [S, P]`` of all heads, ``value: [S,
    H, V]``, ``mask: [T, ceil(S / 32)]`` int32 as ``select_topk_mask`` gives it, or None: all up to the token's own
    position. Returns [T, H, V]; zeros for a token without keys.
    """
    key = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, k_nope.shape[1], -1)), dim=-1)
    query = torch.cat((q_nope, q_rope), dim=-1)
    if mask is None:
        return attend_expanded(query, key, value, num_computed, softmax_scale)
    is_chosen = unpack_mask(mask, key.shape[0])
    heads_first = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=is_chosen, scale=softmax_scale)
    return out.squeeze(0).transpose(0, 1).masked_fill(~is_chosen.any(dim=1)[:, None, None], 0.0)


def attend_absorbed(
    query: torch.Tensor, latent: torch.Tensor, is_hidden: torch.Tensor | None, kv_lora_rank: int, softmax_scale: float
) -> torch.Tensor:
    """Attention in latent space: every head of a token reads the same rows.

    ``query: [T, H, C]`` (q_nope absorbed, then q_rope), ``latent: [T, S, C]``, ``is_hidden: [T, S]`` with at least one
    False a row, or None if nothing is hidden. Returns [T, H, R], still to be multiplied by w_uv. Softmax in float32.
    """
    mask, beta = query.new_empty(1, 1, 1), 0  # not read
    if is_hidden is not None:
        mask = query.new_zeros(is_hidden.shape).masked_fill_(is_hidden, float("-inf")).unsqueeze(1)  # [T, 1, S]
        beta = 1
    scores = torch.baddbmm(mask, query, latent.transpose(1, 2), beta=beta, alpha=softmax_scale)  # [T, H, S]
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.bmm(weights, latent[..., :kv_lora_rank])


def attend_sparse(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    topk_slots: torch.Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
    *,
    is_full: bool = False,
) -> torch.Tensor:
    """Absorbed attention over gathered cache rows.

    ``query: [T, H, C]``, ``latent_cache: [num_blocks, block_size, C]``, ``topk_slots: [T, index_topk]`` int64 slots,
    -1 none; ``is_full`` promises that there is no -1. Returns [T, H, R].
    """
    rows = latent_cache.view(-1, latent_cache.shape[-1])
    num_tokens, num_selected = topk_slots.shape
    step = max(1, _SCRATCH_BYTES // (num_selected * rows.shape[1] * rows.element_size()))
    if num_tokens <= step:
        return _attend_rows(query, rows, topk_slots, kv_lora_rank, softmax_scale, is_full)
    parts = zip(query.split(step), topk_slots.split(step), strict=True)
    return torch.cat([_attend_rows(part, rows, slots, kv_lora_rank, softmax_scale, is_full) for part, slots in parts])


def _attend_rows(
    query: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, kv_lora_rank: int, softmax_scale: float, is_full: bool
) -> torch.Tensor:
    known = slots if is_full else slots.clamp(min=0)
    latent = rows.index_select(0, known.view(-1)).view(*slots.shape, rows.shape[1])  # [t, index_topk, C]
    return attend_absorbed(query, latent, None if is_full else slots < 0, kv_lora_rank, softmax_scale)


def positions_to_slots(positions: torch.Tensor, block_table: torch.Tensor, block_size: int) -> torch.Tensor:
    """Cache slots [N, k] int64 of ``positions: [N, k]`` int32 (-1 none), given ``block_table: [N or 1, blocks]``."""
    known = positions.clamp(min=0).long()
    blocks = block_table.expand(positions.shape[0], block_table.shape[1]).gather(1, known // block_size).long()
    return torch.where(positions >= 0, blocks * block_size + known % block_size, -1)


def select_topk_slots(
    scores: torch.Tensor, num_visible: torch.Tensor, topk: int, block_table: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Cache slots of the keys that ``select_topk_positions`` chooses: [N, topk] int64, -1 where there are fewer."""
    return positions_to_slots(select_topk_positions(scores, num_visible, topk), block_table, block_size)


# --- experts ----------------------------------------------------------------------------------------------------------


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
    """DeepSeek's noaux_tc router (V3 report, section 2.1.2). ``router_logits: [T, E]``, ``correction_bias: [E]`` f32.

    Sigmoid scores plus bias choose: the best ``topk_group`` groups by the sum of their two best experts, then the best
    experts within them (other groups are -inf). The weights are the scores *without* the bias.
    Returns topk_ids [T, K] int32 and topk_weights [T, K] float32.
    """
    num_tokens, num_experts = router_logits.shape
    scores = router_logits.sigmoid()
    biased = scores + correction_bias
    if n_group > 1:
        grouped = biased.view(num_tokens, n_group, num_experts // n_group)
        group_scores = grouped.topk(2, dim=-1)[0].sum(dim=-1)  # [T, n_group]
        chosen = group_scores.topk(topk_group, dim=-1)[1]
        is_dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, chosen, False)
        biased = grouped.masked_fill(is_dropped.unsqueeze(-1), float("-inf")).flatten(1)
    topk_ids = biased.topk(num_experts_per_tok, dim=-1)[1]
    weights = scores.gather(1, topk_ids)
    if norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return topk_ids.to(torch.int32), weights * routed_scaling_factor


def grouped_mlp(
    x: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, num_tokens_per_expert: torch.Tensor
) -> torch.Tensor:
    """Every expert's gated MLP on its rows. ``x: [M, D]`` sorted by expert, counts [e] int32 -> [M, D].

    ``gate_up_proj: [e, 2F, D]``, ``down_proj: [e, D, F]``.
    """
    gate_up = grouped_gemm(x, gate_up_proj, num_tokens_per_expert)
    return grouped_gemm(silu_mul(gate_up), down_proj, num_tokens_per_expert)


def grouped_gemm(x: torch.Tensor, weight: torch.Tensor, num_tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """Sorted rows times their expert's matrix: ``x: [M, n]``, ``weight: [e, m, n]``, counts [e] -> [M, m].

    Rows behind the last expert's are spare: what comes out for them is unspecified.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[1])
    offsets = num_tokens_per_expert.cumsum(0, dtype=torch.int32)
    if x.is_cuda and x.dtype == torch.float32:  # torch has no float32 grouped product for CUDA
        return _grouped_gemm_gathered(x, weight, offsets)
    return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)


def _grouped_gemm_gathered(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """A copy of its expert's matrix for each row, a few rows at a time: slow, and nothing is read on the host.

    ``offsets: [e]`` int32: rows up to each expert's end.
    """
    row = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    experts = torch.searchsorted(offsets, row, right=True).clamp_(max=weight.shape[0] - 1)
    step = max(1, _SCRATCH_BYTES // (weight[0].numel() * weight.element_size()))
    parts = zip(x.split(step), experts.split(step), strict=True)
    return torch.cat([torch.bmm(weight[expert], part.unsqueeze(2)).squeeze(2) for part, expert in parts])


def grouped_gemm_loop(x: torch.Tensor, weight: torch.Tensor, num_tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """Slow twin of ``grouped_gemm``: one expert after another. NOTE(sync): reads the counts on the host."""
    counts = num_tokens_per_expert.tolist()
    *parts, spare = x.split([*counts, x.shape[0] - sum(counts)])
    products = [F.linear(part, matrix) for part, matrix in zip(parts, weight, strict=True)]
    return torch.cat([*products, spare.new_empty(spare.shape[0], weight.shape[1])])
