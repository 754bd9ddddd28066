"""DeepSeek-V3.2: embed -> decoder layers -> norm -> head. Module attributes carry the checkpoint's names.

The forward pass takes a packed batch and the cache; it knows nothing of requests, sampling or scheduling. Invariant:
nothing here keeps state between steps except the cache it is handed.

Shape letters: T tokens, D hidden.
"""

import torch
from torch import nn

from argosy.cache.mla_kv_cache import LayerKV, MLAKVCache
from argosy.distributed.ep_dispatch import LocalDispatcher
from argosy.layers.embedding import Embedding
from argosy.layers.forward_batch import ForwardBatch
from argosy.layers.linear import Fp32Linear
from argosy.layers.mlp import GatedMLP
from argosy.layers.norm import RMSNorm
from argosy.models.deepseek.config import ModelConfig
from argosy.models.deepseek.mla import MLAAttention
from argosy.models.deepseek.moe_layer import MoELayer


class DecoderLayer(nn.Module):
    """Pre-norm attention, then pre-norm MLP or MoE, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer_id: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLAAttention(config, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: nn.Module
        if config.is_moe_layer(layer_id):
            self.mlp = MoELayer(config, LocalDispatcher(config.n_routed_experts), dtype)
        else:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, dtype)

    def forward(self, hidden_states: torch.Tensor, batch: ForwardBatch, kv: LayerKV) -> torch.Tensor:
        """``hidden_states: [T, D]`` -> [T, D]."""
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), batch, kv)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Backbone(nn.Module):
    """The checkpoint's ``model``."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = nn.ModuleList(DecoderLayer(config, i, dtype) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, batch: ForwardBatch, cache: MLAKVCache) -> torch.Tensor:
        """The hidden states after the final norm: [T, D]."""
        hidden_states = self.embed_tokens(batch.input_ids)
        for layer_id, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, batch, cache.layer(layer_id))
        return self.norm(hidden_states)


class DeepseekV32Model(nn.Module):
    """The whole model; its ``state_dict`` keys are the checkpoint's, but for stacked experts and gate_up_proj."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = Backbone(config, dtype)
        self.lm_head = Fp32Linear(config.hidden_size, config.vocab_size, dtype)

    def forward(self, batch: ForwardBatch, cache: MLAKVCache) -> torch.Tensor:
        """Hidden states after the final norm: [T, D]."""
        return self.model(batch, cache)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``hidden_states: [N, D]``, the rows to sample -> logits [N, vocab_size] float32."""
        return self.lm_head(hidden_states)
