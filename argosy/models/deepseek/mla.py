"""Multi-head Latent Attention with DeepSeek Sparse Attention, in its two algebras.

*Expanded*: keys and values of every head are materialised from the latents; used when a prefill sees every position.
*Absorbed*: the query is moved into latent space, so that all heads read the same cached rows; used for decode, and
wherever attention is sparse. Both give the same numbers; tests hold them to it. This file does not schedule or
allocate. Invariant: a token's own cache entry is written before anything reads the cache.

Shape letters: T tokens, D hidden, H heads, R kv_lora_rank, P qk_rope_head_dim, N qk_nope_head_dim, V v_head_dim,
C = R + P, S keys of one sequence.
"""

from dataclasses import dataclass

import torch
from torch import nn

from argosy.cache.cache_format import NormSettings
from argosy.cache.mla_kv_cache import LayerKV
from argosy.kernels import absorb_query, attend_expanded, linear_by_head, rope_interleaved_
from argosy.layers.forward_batch import AttentionMetadata, ForwardBatch, PrefillSegment
from argosy.layers.linear import build_column_parallel, build_linear, build_row_parallel, share_preparation
from argosy.layers.norm import RMSNorm
from argosy.models.deepseek.config import ModelConfig
from argosy.models.deepseek.indexer import Indexer, IndexQuery
from argosy.quantization.linear_shape import LinearShape
from argosy.quantization.scheme import Schemes


@dataclass(frozen=True, slots=True)
class HeadQueries:
    """Per-head queries before either algebra."""

    q_nope: torch.Tensor  # [T, H, N]
    q_rope: torch.Tensor  # [T, H, P], rotated

    def rows(self, start: int, end: int) -> "HeadQueries":
        if end - start == self.q_nope.shape[0]:
            return self
        return HeadQueries(self.q_nope[start:end], self.q_rope[start:end])


class MLAAttention(nn.Module):
    """The checkpoint's ``self_attn``; with ``tp_size`` > 1 this rank's heads, and a partial sum as output.

    Latents and the indexer are the same on every tensor-parallel rank, and so is the cache.
    """

    def __init__(self, config: ModelConfig, schemes: Schemes, tp_size: int = 1) -> None:
        super().__init__()
        self._heads = config.num_attention_heads // tp_size
        v_width = config.num_attention_heads * config.v_head_dim
        self._rank, self._rope_dim = config.kv_lora_rank, config.qk_rope_head_dim
        self._nope_dim, self._v_dim = config.qk_nope_head_dim, config.v_head_dim
        self._softmax_scale = config.softmax_scale
        self.q_a_proj = build_linear(schemes, "q_a_proj", config.hidden_size, config.q_lora_rank)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = build_column_parallel(
            schemes, "q_b_proj", config.q_lora_rank, config.num_attention_heads * config.qk_head_dim, tp_size
        )
        self.kv_a_proj_with_mqa = build_linear(schemes, "kv_a_proj_with_mqa", config.hidden_size, config.latent_dim)
        self.kv_a_layernorm = RMSNorm(self._rank, config.rms_norm_eps)
        self._latent_norm = NormSettings(self.kv_a_layernorm.weight, config.rms_norm_eps)
        kv_b_width = config.num_attention_heads * config.qk_nope_head_dim + v_width
        # Absorption reads this weight, so it is plain in every model.
        self.kv_b_proj = schemes.build_plain_linear(
            LinearShape(in_features=self._rank, out_features=kv_b_width, out_parts=tp_size)
        )
        # Views, made once: slicing costs microseconds, and every step asks. The loader writes to the same memory.
        kv_b_heads = self.kv_b_proj.weight.view(self._heads, self._nope_dim + self._v_dim, self._rank)
        self._w_uk = kv_b_heads[:, : self._nope_dim]  # [H, N, R]
        self._w_uv = kv_b_heads[:, self._nope_dim :].transpose(1, 2)  # [H, R, V]
        self.o_proj = build_row_parallel(schemes, "o_proj", v_width, config.hidden_size, tp_size)
        self.indexer = Indexer(config, schemes.at("indexer"))
        self._prepare_hidden = share_preparation(self.q_a_proj, self.kv_a_proj_with_mqa, self.indexer.wk)
        self._prepare_resid = share_preparation(self.q_b_proj, self.indexer.wq_b)

    def forward(self, hidden_states: torch.Tensor, batch: ForwardBatch, kv: LayerKV) -> torch.Tensor:
        """``hidden_states: [T, D]`` -> [T, D], to be summed over tp. Writes this batch's entries into ``kv``."""
        attention = batch.attention
        hidden_rows = self._prepare_hidden(hidden_states)
        q_resid = self._prepare_resid(self.q_a_layernorm(self.q_a_proj(hidden_rows)))
        queries = self._make_queries(q_resid, batch)
        kv.write_latent(attention.slot_mapping, self.kv_a_proj_with_mqa(hidden_rows), self._latent_norm, batch.rotary)
        self.indexer.write_key(hidden_rows, batch, kv)
        index_query = None
        if attention.max_seq_len > self.indexer.topk:  # else every position is selected: the scores are not needed
            index_query = self.indexer.make_query(hidden_states, q_resid, batch.rotary)

        parts = []
        if attention.num_decode_tokens:
            parts.append(self._decode(queries, index_query, attention, kv))
        for segment in attention.prefill_segments:
            parts.append(self._prefill(queries, index_query, attention, kv, segment))
        return self.o_proj((parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1))

    def _make_queries(self, q_resid: object, batch: ForwardBatch) -> HeadQueries:
        """``q_resid: [T, q_lora_rank]``, normed, or what was prepared of it."""
        query = self.q_b_proj(q_resid).view(batch.num_tokens, self._heads, self._nope_dim + self._rope_dim)
        q_nope, q_rope = query[..., : self._nope_dim], query[..., self._nope_dim :]
        rope_interleaved_(q_rope, batch.rotary)
        return HeadQueries(q_nope, q_rope)

    def _decode(
        self, queries: HeadQueries, index_query: IndexQuery | None, attention: AttentionMetadata, kv: LayerKV
    ) -> torch.Tensor:
        """One token per request, absorbed: [num_decode_tokens, H, V]."""
        rows = attention.num_decode_tokens
        query = self._absorb(queries.rows(0, rows))
        if index_query is None or attention.max_decode_seq_len <= self.indexer.topk:
            attended = kv.attend_paged(
                query,
                attention.block_table[:rows],
                attention.seq_lens[:rows],
                attention.max_decode_seq_len,
                self._softmax_scale,
            )
        else:
            slots = self.indexer.select_decode_slots(index_query, kv, attention)
            is_full = attention.min_decode_seq_len >= self.indexer.topk
            attended = kv.attend_sparse(query, slots, self._softmax_scale, is_full=is_full)
        return self._unabsorb(attended)

    def _prefill(
        self,
        queries: HeadQueries,
        index_query: IndexQuery | None,
        attention: AttentionMetadata,
        kv: LayerKV,
        segment: PrefillSegment,
    ) -> torch.Tensor:
        """One request's tokens: [segment.num_tokens, H, V]; expanded while every position is selected, else sparse."""
        queries = queries.rows(segment.start, segment.end)
        if index_query is None or segment.seq_len <= self.indexer.topk:
            latent = kv.gather_latent(attention.block_table[segment.row : segment.row + 1], segment.seq_len)
            return self._attend_expanded(queries, latent.squeeze(0), segment.num_computed_tokens)
        slots = self.indexer.select_prefill_slots(index_query, kv, attention, segment)
        attended = kv.attend_sparse(self._absorb(queries), slots, self._softmax_scale)
        return self._unabsorb(attended)

    def _attend_expanded(self, queries: HeadQueries, latent: torch.Tensor, num_computed: int) -> torch.Tensor:
        """``latent: [S, C]`` -> keys [k_nope | k_rope] and values of every head, then plain attention: [T, H, V]."""
        kv_latent, k_rope = latent.split([self._rank, self._rope_dim], dim=-1)
        expanded = self.kv_b_proj(kv_latent).view(latent.shape[0], self._heads, self._nope_dim + self._v_dim)
        k_nope, value = expanded.split([self._nope_dim, self._v_dim], dim=-1)
        key = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, self._heads, -1)), dim=-1)
        query = torch.cat((queries.q_nope, queries.q_rope), dim=-1)
        return attend_expanded(query, key, value, num_computed, self._softmax_scale)

    def _absorb(self, queries: HeadQueries) -> torch.Tensor:
        """[q_nope @ w_uk | q_rope]: [T, H, C]."""
        return absorb_query(queries.q_nope, queries.q_rope, self._w_uk)

    def _unabsorb(self, attended: torch.Tensor) -> torch.Tensor:
        """``attended: [T, H, R]`` @ w_uv -> [T, H, V]."""
        return linear_by_head(attended, self._w_uv)
