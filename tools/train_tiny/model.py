"""The training-time DeepSeek-V3.2 network in plain torch: expanded MLA, DSA as a mask, every expert computed densely.

Parameter names are transformers' in-memory names (experts stacked), the MTP block is the last entry of `layers`.
Right padding only; index = position. Not an inference engine: see `decode.py` for its small cached greedy loop.
Invariant: with the MTP block left out, logits equal `DeepseekV32ForCausalLM`'s.

Shapes: B sequences, S queries, C keys, D hidden, H heads, I index heads, E experts, F expert width, N sampled rows.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from tools.train_tiny.config import TinyConfig
from tools.train_tiny.rope import Rotary, build_inverse_frequencies

_MAX_INDEX_DOTS = 2 * 10**9  # index dot products held at once: bounds memory


@dataclass(kw_only=True, slots=True)
class ForwardPlan:
    """What a forward pass should do besides computing hidden states."""

    is_sparse: bool = False  # attend to the indexer's top-k only
    kl_rows: Tensor | None = None  # [N] query rows on which the indexers are trained
    valid: Tensor | None = None  # [B, S] bool, False at padding; counts expert load and weighs the KL
    kl_terms: list[Tensor] = field(default_factory=list)  # one scalar per layer, filled by the forward pass


class LayerCache:
    """Keys, values and index keys of one layer by position."""

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, Tensor, Tensor] | None = None

    def write(
        self, positions: Tensor, capacity: int, new: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Stores k [B, H, S, *], v [B, H, S, *], index_k [B, S, *] at `positions` [B, S]; returns all C positions."""
        if self.tensors is None:
            shapes = [(*t.shape[:-2], capacity, t.shape[-1]) for t in new]
            self.tensors = tuple(t.new_zeros(shape) for t, shape in zip(new, shapes, strict=True))
        for store, fresh in zip(self.tensors, new, strict=True):
            index = positions.view(positions.shape[0], *(1,) * (fresh.dim() - 3), positions.shape[1], 1)
            store.scatter_(-2, index.expand_as(fresh), fresh)
        return self.tensors


class RMSNorm(nn.Module):
    """Root-mean-square norm in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)


class HeadSum(nn.Module):
    """Sum over index heads of weight * ReLU(dot); a module of its own so that it can be compiled."""

    def forward(self, dots: Tensor, weights: Tensor) -> Tensor:
        """dots: [B, I, S, C]; weights: [B, S, I] fp32; returns [B, S, C] fp32"""
        return (functional.relu(dots).float() * weights.transpose(1, 2).unsqueeze(-1)).sum(dim=1)


class Indexer(nn.Module):
    """DSA's lightning indexer, without Hadamard rotation or FP8: both leave exact scores unchanged."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.rope_dim = (
            config.index_n_heads,
            config.index_head_dim,
            config.qk_rope_head_dim,
        )
        self.wq_b = nn.Linear(config.q_lora_rank, self.num_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.head_sum = HeadSum()

    def query(self, q_resid: Tensor, rotary: Rotary) -> Tensor:
        """index_q [B, I, S, d]; the rope part comes first."""
        q = self.wq_b(q_resid).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        return self._rotate(q, rotary)

    def key(self, x: Tensor, rotary: Rotary) -> Tensor:
        """index_k [B, S, d]"""
        return self._rotate(self.k_norm(self.wk(x)), rotary)

    def head_weights(self, x: Tensor) -> Tensor:
        """index_weights [B, S, I] fp32"""
        with torch.autocast(x.device.type, enabled=False):
            return self.weights_proj(x.float()) * (self.num_heads * self.head_dim) ** -0.5

    def scores(self, index_q: Tensor, index_k: Tensor, index_weights: Tensor) -> Tensor:
        """index_scores [B, S, C] fp32, not masked."""
        total = None
        size = max(1, min(self.num_heads, _MAX_INDEX_DOTS // (index_q.shape[0] * index_q.shape[2] * index_k.shape[1])))
        for start in range(0, self.num_heads, size):
            part = slice(start, start + size)
            dots = index_q[:, part] @ index_k.transpose(1, 2).unsqueeze(1)  # [B, i, S, C]
            summed = self.head_sum(dots, index_weights[..., part])
            total = summed if total is None else total + summed
        return total

    def _rotate(self, x: Tensor, rotary: Rotary) -> Tensor:
        rope, rest = x.split((self.rope_dim, self.head_dim - self.rope_dim), dim=-1)
        return torch.cat((rotary.rotate_half_split(rope), rest), dim=-1)


class Attention(nn.Module):
    """MLA with keys and values expanded, and DSA's selection as a mask."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.hidden_size, config.num_attention_heads
        self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, config.kv_lora_rank + config.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, width, bias=False)
        self.indexer = Indexer(config)

    def forward(
        self, x: Tensor, positions: Tensor, rotary: Rotary, plan: ForwardPlan, cache: LayerCache | None, capacity: int
    ) -> Tensor:
        """x: [B, S, D] normed; positions: [B or 1, S]"""
        config = self.config
        q_resid = self.q_a_layernorm(self.q_a_proj(x))
        q, k, v = self._expand(x, q_resid, rotary)
        needs_index = plan.is_sparse or cache is not None
        with torch.no_grad():
            index_k = self.indexer.key(x, rotary) if needs_index else None
            if cache is not None:
                k, v, index_k = cache.write(positions, capacity, (k, v, index_k))
        if plan.kl_rows is not None:
            plan.kl_terms.append(self._index_loss(x, q_resid, q, k, rotary, plan))
        mask = None
        if plan.is_sparse and k.shape[2] > config.index_topk:
            mask = self._select(x, q_resid, index_k, positions, rotary)  # [B, S, C]
        elif cache is not None:
            mask = torch.arange(k.shape[2], device=x.device) <= positions[..., None]
        v = functional.pad(v, (0, config.qk_head_dim - config.v_head_dim))  # fused kernels want one head width
        out = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if mask is None else mask.unsqueeze(1),
            is_causal=mask is None,
            scale=config.softmax_scale,
        )[..., : config.v_head_dim]
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _expand(self, x: Tensor, q_resid: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [B, H, S, nope + rope] and v [B, H, S, V]."""
        config, heads = self.config, self.config.num_attention_heads
        q = self.q_b_proj(q_resid).unflatten(-1, (heads, config.qk_head_dim)).transpose(1, 2)
        q_nope, q_rope = q.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        q = torch.cat((q_nope, rotary.rotate_interleaved(q_rope)), dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        k_rope = rotary.rotate_interleaved(k_rope).unsqueeze(1).expand(-1, heads, -1, -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (heads, -1)).transpose(1, 2)
        k_nope, v = kv.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        return q, torch.cat((k_nope, k_rope), dim=-1), v

    @torch.no_grad()
    def _select(self, x: Tensor, q_resid: Tensor, index_k: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
        """Mask [B, S, C] of the keys each query attends to: causal, and among the top index_topk scores."""
        scores = self.indexer.scores(self.indexer.query(q_resid, rotary), index_k, self.indexer.head_weights(x))
        causal = torch.arange(scores.shape[-1], device=x.device) <= positions[..., None]
        scores = scores.masked_fill(~causal, -math.inf)
        top = scores.topk(min(self.config.index_topk, scores.shape[-1]), dim=-1, sorted=False).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top, True) & causal

    def _index_loss(
        self, x: Tensor, q_resid: Tensor, q: Tensor, k: Tensor, rotary: Rotary, plan: ForwardPlan
    ) -> Tensor:
        """KL(mean attention over heads || softmax of index scores) on the sampled rows; trains only the indexer.

        NOTE(numerics): the target is the dense distribution, in sparse training too. Rows are sampled, so it is
        affordable, and it teaches the indexer about keys that it does not select yet.
        """
        rows = plan.kl_rows
        causal = torch.arange(x.shape[1], device=x.device) <= rows[:, None]  # [N, C]
        with torch.no_grad():
            logits = (q[:, :, rows] @ k.transpose(-1, -2)).float() * self.config.softmax_scale  # [B, H, N, C]
            target = logits.masked_fill(~causal, -math.inf).softmax(dim=-1).mean(dim=1)  # [B, N, C]
        with torch.enable_grad():
            x, q_resid = x.detach(), q_resid.detach()
            index_q = self.indexer.query(q_resid[:, rows], rotary.at_rows(rows))
            scores = self.indexer.scores(index_q, self.indexer.key(x, rotary), self.indexer.head_weights(x[:, rows]))
            log_share = scores.masked_fill(~causal, -math.inf).log_softmax(dim=-1).masked_fill(~causal, 0.0)
            divergence = (target * ((target + 1e-9).log() - log_share)).sum(dim=-1)  # [B, N]
            valid = plan.valid[:, rows].float()
            return (divergence * valid).sum() / valid.sum().clamp(min=1.0)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """noaux_tc: sigmoid scores, a bias for choosing only, the best groups, then the best experts; all in fp32."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.register_buffer("load", torch.zeros(config.n_routed_experts), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [T, D]; returns weights [T, E] fp32, zero where not chosen, and the choice [T, E] bool."""
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            scores = functional.linear(x.float(), self.weight.float()).sigmoid()
        choice = scores.detach() + self.e_score_correction_bias
        groups = choice.unflatten(-1, (config.n_group, -1))
        best = groups.topk(2, dim=-1).values.sum(dim=-1).topk(config.topk_group, dim=-1).indices
        keep = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, True)
        masked = groups.masked_fill(~keep.unsqueeze(-1), -math.inf).flatten(-2)
        chosen = torch.zeros_like(masked, dtype=torch.bool)
        chosen.scatter_(-1, masked.topk(config.num_experts_per_tok, dim=-1).indices, True)
        weights = scores * chosen
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * config.routed_scaling_factor, chosen


class Experts(nn.Module):
    """All routed experts as two matrices; every expert sees every token, the router's zeros silence the rest."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        experts, width = config.n_routed_experts, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, config.hidden_size, width))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x: [T, D]; weights: [T, E]"""
        hidden = functional.linear(x, self.gate_up_proj.flatten(0, 1))  # [T, E * 2F]
        gate, up = hidden.unflatten(-1, (weights.shape[-1], -1)).chunk(2, dim=-1)  # [T, E, F]
        hidden = functional.silu(gate) * up * weights.unsqueeze(-1).to(gate.dtype)
        return functional.linear(hidden.flatten(1), self.down_proj.transpose(0, 1).flatten(1))


class MoE(nn.Module):
    """Routed experts plus the shared one."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """x: [T, D]; valid: [T] tokens that count for the expert load."""
        weights, chosen = self.gate(x)
        if valid is not None:
            with torch.no_grad():
                self.gate.load += (chosen & valid.unsqueeze(-1)).sum(dim=0)
        return self.experts(x, weights) + self.shared_experts(x)


class DecoderLayer(nn.Module):
    """Pre-norm attention, then a dense MLP or the MoE."""

    def __init__(self, config: TinyConfig, layer_id: int) -> None:
        super().__init__()
        self.is_moe = layer_id >= config.first_k_dense_replace
        self.self_attn = Attention(config)
        self.mlp = MoE(config) if self.is_moe else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, positions: Tensor, rotary: Rotary, plan: ForwardPlan, cache: LayerCache | None, capacity: int
    ) -> Tensor:
        """x: [B, S, D], the residual stream in fp32."""
        x = x + self.self_attn(self.input_layernorm(x), positions, rotary, plan, cache, capacity)
        normed = self.post_attention_layernorm(x).flatten(0, 1)  # [T, D]
        valid = None if plan.valid is None else plan.valid.flatten()
        return x + (self.mlp(normed, valid) if self.is_moe else self.mlp(normed)).view_as(x)


class MTPLayer(DecoderLayer):
    """The multi-token prediction block; embedding and head are shared with the main model and copied on export."""

    def __init__(self, config: TinyConfig, layer_id: int) -> None:
        super().__init__(config, layer_id)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(width, eps)})


class Backbone(nn.Module):
    """Embedding, decoder layers (the MTP block last) and the final norm."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        count = config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers: list[nn.Module] = [DecoderLayer(config, i) for i in range(count)]
        self.layers = nn.ModuleList([*layers, MTPLayer(config, count)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class TinyModel(nn.Module):
    """`DeepseekV32ForCausalLM` with its MTP block."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("inverse_frequencies", build_inverse_frequencies(config), persistent=False)
        self._initialise()

    def hidden_states(
        self,
        ids: Tensor,
        positions: Tensor,
        plan: ForwardPlan,
        caches: list[LayerCache] | None = None,
        capacity: int = 0,
    ) -> Tensor:
        """ids: [B, S], positions: [B or 1, S]; returns [B, S, D] after the final norm, fp32."""
        x, rotary = self.model.embed_tokens(ids).float(), self._rotary(positions)
        for layer_id in range(self.config.num_hidden_layers):
            cache = None if caches is None else caches[layer_id]
            x = self.model.layers[layer_id](x, positions, rotary, plan, cache, capacity)
        return self.model.norm(x)

    def mtp_hidden_states(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        positions: Tensor,
        plan: ForwardPlan,
        cache: LayerCache | None = None,
        capacity: int = 0,
    ) -> Tensor:
        """hidden: [B, S, D] of `hidden_states`; next_ids: [B, S], the token after each; returns [B, S, D], normed."""
        layer = self.model.layers[self.config.num_hidden_layers]
        embedded = self.model.embed_tokens(next_ids).float() * (positions != 0).unsqueeze(-1)
        x = layer.eh_proj(torch.cat((layer.enorm(embedded), layer.hnorm(hidden)), dim=-1)).float()
        x = layer(x, positions, self._rotary(positions), plan, cache, capacity)
        return layer.shared_head["norm"](x)

    def _rotary(self, positions: Tensor) -> Rotary:
        angles = positions[..., None].float() * self.inverse_frequencies
        return Rotary(cos=angles.cos(), sin=angles.sin())

    @torch.no_grad()
    def _initialise(self) -> None:
        """Fan-in scaled normals; projections into the residual stream start smaller, the head smaller still."""
        depth_scale = (2 * self.config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            std = parameter.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                std *= depth_scale
            elif name == "lm_head.weight":
                std = 0.02
            elif name == "model.embed_tokens.weight":
                std = 0.5
            parameter.normal_(0.0, std)
