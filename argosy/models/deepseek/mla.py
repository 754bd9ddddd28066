"""Multi-head Latent Attention with DeepSeek Sparse Attention, in its two algebras.

*Expanded*: keys and values of every head are materialised from the latents; used when a prefill sees every position,
and on cards while it sees few enough that multiplying what a mask then hides costs less.
*Absorbed*: the query is moved into latent space, so that all heads read the same cached rows; used for decode, and
wherever attention is sparse. Both give the same numbers; tests hold them to it. This file does not schedule or
allocate. Invariant: a token's own cache entry is written before anything reads the cache.

Shape letters: T tokens, D hidden, H heads, R kv_lora_rank, P qk_rope_head_dim, N qk_nope_head_dim, V v_head_dim,
C = R + P, S keys of one sequence.
"""

from dataclasses import dataclass

import torch
from torch import nn

from argosy.cache.layer_settings import NormSettings
from argosy.cache.mla_kv_cache import LayerKV
from argosy.kernels import absorb_into, attend_expanded_masked, is_masked_faster, linear_by_head, rope_interleaved_into
from argosy.kernels.select import select_joined_linears
from argosy.layers.forward_batch import AttentionMetadata, ForwardBatch, PrefillSegment
from argosy.layers.linear import (
    build_column_parallel,
    build_linear,
    build_row_parallel,
    group_linears,
    share_preparation,
)
from argosy.layers.norm import RMSNorm
from argosy.models.deepseek.config import ModelConfig
from argosy.models.deepseek.indexer import Indexer, IndexQuery
from argosy.platforms import SideWork
from argosy.quantization.linear_shape import LinearShape
from argosy.quantization.preparation import NoPreparation, NormedRows
from argosy.quantization.scheme import Schemes


@dataclass(frozen=True, slots=True)
class HeadQueries:
    """Per-head queries of either algebra."""

    q_nope: torch.Tensor  # [T, H, N]
    absorbed: torch.Tensor  # [T, H, C]: room for q_nope in latent space, then q_rope
    rope_dim: int  # P

    @property
    def q_rope(self) -> torch.Tensor:
        """[T, H, P], rotated."""
        return self.absorbed[..., -self.rope_dim :]

    def rows(self, start: int, end: int) -> "HeadQueries":
        if end - start == self.q_nope.shape[0]:
            return self
        return HeadQueries(self.q_nope[start:end], self.absorbed[start:end], self.rope_dim)


@dataclass(frozen=True, slots=True)
class IndexChoice:
    """What the indexer says of a batch; None where every position is selected."""

    query: IndexQuery | None
    decode_slots: torch.Tensor | None  # [num_decode_tokens, index_topk] int64


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
        linears = self.q_a_proj, self.indexer.wk, self.kv_a_proj_with_mqa  # in whole FP8 blocks but for the last
        self.preparation = share_preparation(*linears)
        is_joined = select_joined_linears(
            torch.get_default_device().type, is_quantized=self.preparation != NoPreparation()
        )
        self._project_hidden = group_linears(*linears, is_joined=is_joined)
        self._resid_preparation = share_preparation(self.q_b_proj, self.indexer.wq_b)

    def forward(self, normed: NormedRows, batch: ForwardBatch, kv: LayerKV) -> torch.Tensor:
        """T tokens, prepared by ``preparation`` -> [T, D], to be summed over tp. Writes this batch's entries into
        ``kv``. The indexer works beside the queries, where the batch has a lane for it."""
        attention = batch.attention
        weights = batch.side_lane.start(lambda: self._weigh_heads(normed.rows, attention))
        q_a, index_key, latent = self._project_hidden(normed.prepared)
        written = batch.side_lane.start(lambda: self.indexer.write_key(index_key, batch, kv))
        q_resid = self.q_a_layernorm.prepare(q_a, None, self._resid_preparation).prepared
        product = batch.side_lane.start(lambda: self._project_index_query(weights.wait(), q_resid))
        choice = batch.side_lane.start(lambda: self._index(weights.wait(), product.wait(), written, batch, kv))
        # NOTE(order): the way through the indexer is the longer one, and two products at once share the memory.
        product.wait()
        queries = self._make_queries(q_resid, batch)
        kv.write_latent(attention.slot_mapping, latent, self._latent_norm, batch.rotary)

        parts = []
        if attention.num_decode_tokens:
            query = self._absorb(queries.rows(0, attention.num_decode_tokens))
            parts.append(self._decode(query, choice.wait().decode_slots, attention, kv))
        for segment in attention.prefill_segments:
            parts.append(self._prefill(queries, choice.wait().query, attention, kv, segment))
        return self.o_proj((parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1))

    def _weigh_heads(self, hidden_states: torch.Tensor, attention: AttentionMetadata) -> torch.Tensor | None:
        """None: every position is selected, and the scores are not needed."""
        return self.indexer.weigh_heads(hidden_states) if attention.max_seq_len > self.indexer.topk else None

    def _project_index_query(self, index_weights: torch.Tensor | None, q_resid: object) -> torch.Tensor | None:
        return None if index_weights is None else self.indexer.project_query(q_resid)

    def _index(
        self,
        index_weights: torch.Tensor | None,
        product: torch.Tensor | None,
        written: SideWork[None],
        batch: ForwardBatch,
        kv: LayerKV,
    ) -> IndexChoice:
        """Reads the cache, once the batch's index keys are ``written``."""
        written.wait()
        if index_weights is None or product is None:
            return IndexChoice(None, None)
        query = self.indexer.make_query(index_weights, product, batch.rotary)
        if batch.attention.max_decode_seq_len <= self.indexer.topk:
            return IndexChoice(query, None)
        return IndexChoice(query, self.indexer.select_decode_slots(query, kv, batch.attention))

    def _make_queries(self, q_resid: object, batch: ForwardBatch) -> HeadQueries:
        """``q_resid: [T, q_lora_rank]``, normed, or what was prepared of it."""
        query = self.q_b_proj(q_resid).view(batch.num_tokens, self._heads, self._nope_dim + self._rope_dim)
        absorbed = query.new_empty(*query.shape[:2], self._rank + self._rope_dim)
        queries = HeadQueries(query[..., : self._nope_dim], absorbed, self._rope_dim)
        rope_interleaved_into(query[..., self._nope_dim :], batch.rotary, queries.q_rope)
        return queries

    def _decode(
        self, query: torch.Tensor, slots: torch.Tensor | None, attention: AttentionMetadata, kv: LayerKV
    ) -> torch.Tensor:
        """One token per request, ``query: [num_decode_tokens, H, C]``, ``slots``: None selects everything ->
        [num_decode_tokens, H, V]."""
        if slots is None:
            rows = attention.num_decode_tokens
            attended = kv.attend_paged(
                query,
                attention.block_table[:rows],
                attention.seq_lens[:rows],
                attention.max_decode_seq_len,
                self._softmax_scale,
            )
        else:
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
        """One request's tokens: [segment.num_tokens, H, V]; expanded while every position is selected, or where that
        is faster, else sparse."""
        queries = queries.rows(segment.start, segment.end)
        if index_query is None or segment.seq_len <= self.indexer.topk:
            return self._attend_expanded(queries, None, attention, kv, segment)
        if is_masked_faster(
            queries.q_nope,
            num_computed=segment.num_computed_tokens,
            num_selected=self.indexer.topk,
            kv_lora_rank=self._rank,
            rope_dim=self._rope_dim,
            v_dim=self._v_dim,
        ):
            mask = self.indexer.select_prefill_mask(index_query, kv, attention, segment)
            return self._attend_expanded(queries, mask, attention, kv, segment)
        slots = self.indexer.select_prefill_slots(index_query, kv, attention, segment)
        attended = kv.attend_sparse(self._absorb(queries), slots, self._softmax_scale)
        return self._unabsorb(attended)

    def _attend_expanded(
        self,
        queries: HeadQueries,
        mask: torch.Tensor | None,
        attention: AttentionMetadata,
        kv: LayerKV,
        segment: PrefillSegment,
    ) -> torch.Tensor:
        """Keys [k_nope | k_rope] and values of every head from the latents, then attention to what ``mask`` names (see
        ``select_topk_mask``), or to all that a token sees: [segment.num_tokens, H, V]."""
        latent = kv.gather_latent(attention.block_table[segment.row : segment.row + 1], segment.seq_len).squeeze(0)
        kv_latent, k_rope = latent.split([self._rank, self._rope_dim], dim=-1)
        expanded = self.kv_b_proj(kv_latent).view(segment.seq_len, self._heads, self._nope_dim + self._v_dim)
        k_nope, value = expanded.split([self._nope_dim, self._v_dim], dim=-1)
        return attend_expanded_masked(
            queries.q_nope,
            queries.q_rope,
            k_nope,
            k_rope,
            value,
            mask,
            segment.num_computed_tokens,
            self._softmax_scale,
        )

    def _absorb(self, queries: HeadQueries) -> torch.Tensor:
        """[q_nope @ w_uk | q_rope]: [T, H, C]."""
        absorb_into(queries.q_nope, self._w_uk, queries.absorbed)
        return queries.absorbed

    def _unabsorb(self, attended: torch.Tensor) -> torch.Tensor:
        """``attended: [T, H, R]`` @ w_uv -> [T, H, V]."""
        return linear_by_head(attended, self._w_uv)
