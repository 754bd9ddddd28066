"""``transformers``' DeepSeek-V3.2 with this project's dummy weights, and steps of it over a cache that is full at once.

Greedy decoding by a plain loop, which costs less than ``generate``. Invariant: parameters that both programs hold are
the same numbers (those that this project keeps in float32 are float32 here too).

Shape letters: B requests, S cached positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, DeepseekV32Config, DeepseekV32ForCausalLM, DynamicCache, StaticCache
from transformers.utils import logging

from argosy.models.deepseek.checkpoint import build_weight_mapping, checkpoint_shapes
from argosy.models.deepseek.config import parse_model_config
from argosy.quantization.dummy_weights import fill_with_dummy_weights
from argosy.quantization.weight_plan import Destination

CACHE_STD = 0.1
# What ``config.json`` says for this project alone, or for no model of transformers.
_NOT_THEIRS = ("architectures", "model_type", "torch_dtype", "num_nextn_predict_layers")


@dataclass(frozen=True, slots=True)
class Choice:
    """How transformers runs a step."""

    experts: str  # of its ``experts_implementation``
    is_static: bool  # cache

    def __str__(self) -> str:
        return f"{self.experts}, {'static' if self.is_static else 'dynamic'} cache"


def build_theirs(settings: dict[str, object], dtype: torch.dtype, device: torch.device) -> DeepseekV32ForCausalLM:
    """On ``device`` from the start; scaled-dot-product attention, which is the fastest that the model supports."""
    logging.set_verbosity_error()
    known = {name: value for name, value in settings.items() if name not in _NOT_THEIRS}
    config = DeepseekV32Config(**known, num_key_value_heads=settings["num_attention_heads"])
    with device:
        model = DeepseekV32ForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    for name, module in model.named_modules():
        if name.endswith((".mlp.gate", ".indexer.weights_proj")):
            module.weight = nn.Parameter(module.weight.float(), requires_grad=False)
    ours = parse_model_config(settings)
    our_mapping = build_weight_mapping(ours.num_hidden_layers, ours.num_nextn_predict_layers)

    def map_tensor(name: str) -> Destination | None:
        """Experts are stacked alike; gate and up are apart there."""
        return our_mapping(name) if ".mlp.experts." in name else Destination(name, ())

    fill_with_dummy_weights(model, checkpoint_shapes(ours), map_tensor)
    return model.eval()


class SpreadTheirRouter(nn.Module):
    """Runs their router, and hands out a drawn choice with its weights."""

    def __init__(self, router: nn.Module, topk_ids: torch.Tensor) -> None:
        super().__init__()
        self._router, self._topk_ids = router, topk_ids.long()

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, topk_weights, _ = self._router(hidden_states)
        return logits, topk_weights, self._topk_ids[: topk_weights.shape[0]]


def spread_their_routing(model: DeepseekV32ForCausalLM, topk_ids_by_layer: Sequence[torch.Tensor]) -> None:
    choices = iter(topk_ids_by_layer)
    for layer in model.model.layers:
        if "gate" in dict(layer.mlp.named_children()):
            layer.mlp.gate = SpreadTheirRouter(layer.mlp.gate, next(choices))


class TheirSteps:
    """Steps of one batch whose cache holds ``context`` positions, of random numbers."""

    def __init__(self, model: DeepseekV32ForCausalLM, choice: Choice, batch_size: int, context: int, room: int) -> None:
        model.set_experts_implementation(choice.experts)
        self._model = model
        self._cache = self._build_cache(choice.is_static, batch_size, context, room)
        self._ids = torch.randint(10, model.config.vocab_size, (batch_size, 1), device=model.device)

    @torch.inference_mode()
    def decode(self, num_steps: int) -> None:
        """Greedily; the host waits for nothing."""
        for _ in range(num_steps):
            logits = self._model(self._ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
            self._ids = logits.argmax(dim=-1)

    def _build_cache(self, is_static: bool, batch_size: int, context: int, room: int) -> Cache:
        model, config = self._model, self._model.config
        cache = StaticCache(config=config, max_cache_len=context + room) if is_static else DynamicCache(config=config)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=model.device, dtype=model.dtype) * CACHE_STD

        for layer in range(config.num_hidden_layers):
            latent = draw(batch_size, 1, context, config.kv_lora_rank)
            cache.update(latent, draw(batch_size, 1, context, config.qk_rope_head_dim), layer)
            cache.update_indexer(draw(batch_size, context, config.index_head_dim), layer)
        return cache


@torch.inference_mode()
def prefill_theirs(model: DeepseekV32ForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    """``input_ids: [B, S]`` -> the sampled tokens [B]; the cache is filled and dropped."""
    cache = DynamicCache(config=model.config)
    logits: torch.Tensor = model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1].argmax(dim=-1)
