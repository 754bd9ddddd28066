"""The lightning indexer of DeepSeek Sparse Attention: which earlier tokens each token attends to.

It scores with its own small heads and keys; it does not attend. RoPE here is *half-split* and comes first in each head,
unlike MLA's (DeepSeek's model card of 2025-11-17 corrects the first release on this). The Hadamard rotation of the
published code is orthogonal and serves quantisation only, so 8-bit keys get it (``cache/index_key_format.py``).
Invariant: ties go to the lowest position, so the choice is the same on every rank and in every batch.

Shape letters: T tokens, D hidden, J index heads, I index_head_dim, P qk_rope_head_dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from argosy.cache.layer_settings import NormSettings
from argosy.cache.mla_kv_cache import LayerKV
from argosy.kernels import RotaryRows, rope_half_split_, select_topk_mask, select_topk_slots
from argosy.layers.forward_batch import AttentionMetadata, ForwardBatch, PrefillSegment
from argosy.layers.linear import Fp32Linear, build_linear
from argosy.layers.norm import LayerNorm
from argosy.models.deepseek.config import ModelConfig
from argosy.quantization.scheme import Schemes

_MAX_SCORES = 2**28  # of one segment that are in memory at a time: 1 GiB
K_NORM_EPS = 1e-6  # fixed in the published code, not in config.json


@dataclass(frozen=True, slots=True)
class IndexQuery:
    """What scores the cached index keys."""

    index_q: torch.Tensor  # [T, J, I]
    index_weights: torch.Tensor  # [T, J] float32, holding I^-0.5 * J^-0.5


class Indexer(nn.Module):
    """The checkpoint's ``self_attn.indexer``."""

    def __init__(self, config: ModelConfig, schemes: Schemes) -> None:
        super().__init__()
        self._heads, self._head_dim = config.index_n_heads, config.index_head_dim
        self._rope_dim, self.topk = config.qk_rope_head_dim, config.index_topk
        self.wq_b = build_linear(schemes, "wq_b", config.q_lora_rank, self._heads * self._head_dim)
        self.wk = build_linear(schemes, "wk", config.hidden_size, self._head_dim)
        self.k_norm = LayerNorm(self._head_dim)
        self._key_norm = NormSettings(self.k_norm.weight, K_NORM_EPS, self.k_norm.bias)
        self.weights_proj = Fp32Linear(config.hidden_size, self._heads, torch.float32)
        self._weight_scale = (self._heads * self._head_dim) ** -0.5

    def write_key(self, key: torch.Tensor, batch: ForwardBatch, kv: LayerKV) -> None:
        """``key: [T, I]``, what ``wk`` made of the hidden states -> the batch's entries of ``kv``."""
        kv.write_index_k(batch.attention.slot_mapping, key, self._key_norm, batch.rotary)

    def weigh_heads(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``hidden_states: [T, D]`` -> index_weights [T, J] float32."""
        return self.weights_proj(hidden_states, self._weight_scale)

    def project_query(self, q_resid: object) -> torch.Tensor:
        """``q_resid: [T, q_lora_rank]``: the *normed* output of ``q_a_layernorm``, or what was prepared of it.
        -> [T, J * I], for ``make_query``."""
        product: torch.Tensor = self.wq_b(q_resid)
        return product

    def make_query(self, index_weights: torch.Tensor, product: torch.Tensor, rotary: RotaryRows) -> IndexQuery:
        """Rotates ``product``, what ``project_query`` returned, in place."""
        query = product.view(index_weights.shape[0], self._heads, self._head_dim)
        rope_half_split_(query[..., : self._rope_dim], rotary)
        return IndexQuery(query, index_weights)

    def select_decode_slots(self, query: IndexQuery, kv: LayerKV, attention: AttentionMetadata) -> torch.Tensor:
        """Cache slots for the decode rows: [num_decode_tokens, index_topk] int64, -1 where a sequence is shorter."""
        rows = attention.num_decode_tokens
        block_table = attention.block_table[:rows]
        index_q, index_weights = query.index_q[:rows].unsqueeze(1), query.index_weights[:rows].unsqueeze(1)
        num_visible = attention.seq_lens[:rows]
        max_seq_len = attention.max_decode_seq_len
        scores = kv.index_scores(index_q, index_weights, block_table, num_visible.unsqueeze(1), max_seq_len)
        return select_topk_slots(scores.squeeze(1), num_visible, self.topk, block_table, kv.block_size)

    def select_prefill_slots(
        self, query: IndexQuery, kv: LayerKV, attention: AttentionMetadata, segment: PrefillSegment
    ) -> torch.Tensor:
        """Cache slots for one request's tokens: [segment.num_tokens, index_topk] int64."""
        block_table = attention.block_table[segment.row : segment.row + 1]
        parts = [
            select_topk_slots(scores, num_visible, self.topk, block_table, kv.block_size)
            for scores, num_visible in self._score_prefill(query, kv, block_table, segment)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def select_prefill_mask(
        self, query: IndexQuery, kv: LayerKV, attention: AttentionMetadata, segment: PrefillSegment
    ) -> torch.Tensor:
        """The same choice as bits of positions: [segment.num_tokens, ceil(segment.seq_len / 32)] int32."""
        block_table = attention.block_table[segment.row : segment.row + 1]
        parts = [
            select_topk_mask(scores, num_visible, self.topk)
            for scores, num_visible in self._score_prefill(query, kv, block_table, segment)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _score_prefill(
        self, query: IndexQuery, kv: LayerKV, block_table: torch.Tensor, segment: PrefillSegment
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Scores [n, seq_len] of the segment's next n tokens, and how many each sees [n]."""
        num_visible = torch.arange(
            segment.num_computed_tokens + 1, segment.seq_len + 1, dtype=torch.int32, device=block_table.device
        )  # causal
        step = max(1, _MAX_SCORES // segment.seq_len)
        for start in range(0, segment.num_tokens, step):
            visible = num_visible[start : start + step]
            tokens = slice(segment.start + start, segment.start + start + len(visible))
            index_q, index_weights = query.index_q[tokens].unsqueeze(0), query.index_weights[tokens].unsqueeze(0)
            scores = kv.index_scores(index_q, index_weights, block_table, visible.unsqueeze(0), segment.seq_len)
            yield scores.squeeze(0), visible
