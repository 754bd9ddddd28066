"""The lightning indexer of DeepSeek Sparse Attention: which earlier tokens each token attends to.

It scores with its own small heads and keys; it does not attend. RoPE here is *half-split* and comes first in each head,
unlike MLA's (DeepSeek's model card of 2025-11-17 corrects the first release on this). The Hadamard rotation of the
published code is orthogonal and serves quantisation only, so a quantised cache applies it (``cache/cache_format.py``).
Invariant: ties go to the lowest position, so the choice is the same on every rank and in every batch.

Shape letters: T tokens, D hidden, J index heads, I index_head_dim, P qk_rope_head_dim.
"""

from dataclasses import dataclass

import torch
from torch import nn

from argosy.cache.mla_kv_cache import LayerKV
from argosy.kernels import RotaryRows, rope_half_split_, select_topk_slots
from argosy.layers.forward_batch import AttentionMetadata, PrefillSegment
from argosy.layers.linear import Fp32Linear, build_linear
from argosy.layers.norm import LayerNorm
from argosy.models.deepseek.config import ModelConfig
from argosy.quantization.scheme import Schemes

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
        self.k_norm = LayerNorm(self._head_dim, K_NORM_EPS)
        self.weights_proj = Fp32Linear(config.hidden_size, self._heads, torch.float32)
        self._weight_scale = (self._heads * self._head_dim) ** -0.5

    def make_key(self, hidden_states: torch.Tensor, rotary: RotaryRows) -> torch.Tensor:
        """``hidden_states: [T, D]`` -> index_k [T, I], to be cached."""
        key = self.k_norm(self.wk(hidden_states))
        rope_half_split_(key[:, : self._rope_dim].unsqueeze(1), rotary)
        return key

    def make_query(self, hidden_states: torch.Tensor, q_resid: torch.Tensor, rotary: RotaryRows) -> IndexQuery:
        """``q_resid: [T, q_lora_rank]`` is the *normed* output of ``q_a_layernorm``."""
        query = self.wq_b(q_resid).view(hidden_states.shape[0], self._heads, self._head_dim)
        rope_half_split_(query[..., : self._rope_dim], rotary)
        return IndexQuery(query, self.weights_proj(hidden_states) * self._weight_scale)

    def select_decode_slots(self, query: IndexQuery, kv: LayerKV, attention: AttentionMetadata) -> torch.Tensor:
        """Cache slots for the decode rows: [num_decode_tokens, index_topk] int64, -1 where a sequence is shorter."""
        rows = attention.num_decode_tokens
        block_table = attention.block_table[:rows]
        index_q, index_weights = query.index_q[:rows].unsqueeze(1), query.index_weights[:rows].unsqueeze(1)
        scores = kv.index_scores(index_q, index_weights, block_table, attention.max_decode_seq_len)  # [rows, 1, S]
        return select_topk_slots(scores.squeeze(1), attention.seq_lens[:rows], self.topk, block_table, kv.block_size)

    def select_prefill_slots(
        self, query: IndexQuery, kv: LayerKV, attention: AttentionMetadata, segment: PrefillSegment
    ) -> torch.Tensor:
        """Cache slots for one request's tokens: [segment.num_tokens, index_topk] int64."""
        tokens = slice(segment.start, segment.end)
        block_table = attention.block_table[segment.row : segment.row + 1]
        index_q, index_weights = query.index_q[tokens].unsqueeze(0), query.index_weights[tokens].unsqueeze(0)
        scores = kv.index_scores(index_q, index_weights, block_table, segment.seq_len)  # [1, T, S]
        num_visible = torch.arange(segment.num_computed_tokens + 1, segment.seq_len + 1, device=scores.device)  # causal
        return select_topk_slots(scores.squeeze(0), num_visible, self.topk, block_table, kv.block_size)
