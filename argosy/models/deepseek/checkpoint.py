"""Where each tensor of a published DeepSeek-V3.2 checkpoint goes in our modules, and which part of it a rank holds.

Module attributes carry the checkpoint's names; there are two exceptions, and this file is them: ``gate_proj`` and
``up_proj`` are halves of ``gate_up_proj``, and experts are stacked. ``TP_SHARD_DIMS`` is the whole specification of
tensor parallelism; experts are split by number, and everything else is on every rank. Invariant: a pure function of the
name and the rank's place.
"""

import re
from dataclasses import dataclass

from argosy.models.deepseek.config import ModelConfig
from argosy.quantization.tensor_boxes import Index, Part
from argosy.quantization.weight_plan import Destination, WeightMapping

# The dim that tensor parallelism splits: heads, MLP widths, vocabulary. By the end of the name, first match wins.
TP_SHARD_DIMS: tuple[tuple[str, int | None], ...] = (
    (".shared_experts.gate_proj.weight", None),  # whole on every rank, like the router: tokens are split there
    (".shared_experts.up_proj.weight", None),
    (".shared_experts.down_proj.weight", None),
    ("embed_tokens.weight", 0),
    ("lm_head.weight", 0),
    (".q_b_proj.weight", 0),
    (".kv_b_proj.weight", 0),
    (".o_proj.weight", 1),
    (".mlp.gate_proj.weight", 0),
    (".mlp.up_proj.weight", 0),
    (".mlp.down_proj.weight", 1),
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_EXPERT_ID = re.compile(r"\.mlp\.experts\.(\d+)\.")
_GATE_UP = re.compile(r"(.*)\.(gate|up)_proj\.weight")
_HALF = {"gate": Part(0, 2), "up": Part(1, 2)}
_WHOLE = Part(0, 1)


@dataclass(frozen=True, slots=True)
class WeightShard:
    """What one rank holds: its part of the split tensors, and its experts. The default is everything."""

    tp_rank: int = 0
    tp_size: int = 1
    expert_ids: range | None = None  # None: all


def build_weight_mapping(
    num_hidden_layers: int, num_nextn_predict_layers: int, shard: WeightShard = WeightShard()
) -> WeightMapping:
    """The mapping for a model with ``num_hidden_layers`` layers; the MTP layers behind them are left out.

    Layers behind those are not: the loader refuses them, because they mean that config.json is another model's.
    """
    mtp_layers = range(num_hidden_layers, num_hidden_layers + num_nextn_predict_layers)

    def map_tensor(name: str) -> Destination | None:
        layer = _LAYER.match(name)
        if layer is not None and int(layer[1]) in mtp_layers:
            return None
        expert = _EXPERT.fullmatch(name)
        if expert is not None:
            return _map_expert(expert, shard.expert_ids)
        source = _source(name, shard)
        gate_up = _GATE_UP.fullmatch(name)
        if gate_up is not None:
            return Destination(f"{gate_up[1]}.gate_up_proj.weight", (_HALF[gate_up[2]],), source)
        return Destination(name, (), source)

    return map_tensor


def find_expert_id(name: str) -> int | None:
    """Of a routed expert's tensor or its companions; None for all others."""
    expert = _EXPERT_ID.search(name)
    return None if expert is None else int(expert[1])


def _map_expert(match: re.Match[str], expert_ids: range | None) -> Destination | None:
    experts, expert_id, kind = match[1], int(match[2]), match[3]
    if expert_ids is not None:
        if expert_id not in expert_ids:
            return None
        expert_id -= expert_ids.start
    if kind == "down":
        return Destination(f"{experts}.down_proj", (expert_id,))
    return Destination(f"{experts}.gate_up_proj", (expert_id, _HALF[kind]))


def _source(name: str, shard: WeightShard) -> Index:
    """The part of the tensor that this rank reads; () = all of it."""
    if shard.tp_size == 1:
        return ()
    dim = next((dim for suffix, dim in TP_SHARD_DIMS if name.endswith(suffix)), None)
    return () if dim is None else (*[_WHOLE] * dim, Part(shard.tp_rank, shard.tp_size))


def checkpoint_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this shape holds, but for MTP layers and scales: name -> shape."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer_id in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer_id}"
        shapes |= {f"{prefix}.{name}": shape for name, shape in _attention_shapes(config).items()}
        shapes |= {f"{prefix}.mlp.{name}": shape for name, shape in _mlp_shapes(config, layer_id).items()}
    return shapes


def mtp_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What the MTP layers add to ``checkpoint_shapes``: each is a MoE layer with a projection, norms and a head."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {}
    for layer_id in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        own: dict[str, tuple[int, ...]] = {
            "enorm.weight": (hidden,),
            "hnorm.weight": (hidden,),
            "eh_proj.weight": (hidden, 2 * hidden),
            "embed_tokens.weight": (vocab, hidden),
            "shared_head.norm.weight": (hidden,),
            "shared_head.head.weight": (vocab, hidden),
        }
        own |= _attention_shapes(config)
        own |= {f"mlp.{name}": shape for name, shape in _mlp_shapes(config, layer_id).items()}
        shapes |= {f"model.layers.{layer_id}.{name}": shape for name, shape in own.items()}
    return shapes


def _attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, q_rank, kv_rank = config.hidden_size, config.q_lora_rank, config.kv_lora_rank
    heads, v_width = config.num_attention_heads, config.num_attention_heads * config.v_head_dim
    return {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_a_proj.weight": (q_rank, hidden),
        "self_attn.q_a_layernorm.weight": (q_rank,),
        "self_attn.q_b_proj.weight": (heads * config.qk_head_dim, q_rank),
        "self_attn.kv_a_proj_with_mqa.weight": (config.latent_dim, hidden),
        "self_attn.kv_a_layernorm.weight": (kv_rank,),
        "self_attn.kv_b_proj.weight": (heads * config.qk_nope_head_dim + v_width, kv_rank),
        "self_attn.o_proj.weight": (hidden, v_width),
        "self_attn.indexer.wq_b.weight": (config.index_n_heads * config.index_head_dim, q_rank),
        "self_attn.indexer.wk.weight": (config.index_head_dim, hidden),
        "self_attn.indexer.k_norm.weight": (config.index_head_dim,),
        "self_attn.indexer.k_norm.bias": (config.index_head_dim,),
        "self_attn.indexer.weights_proj.weight": (config.index_n_heads, hidden),
    }


def _mlp_shapes(config: ModelConfig, layer_id: int) -> dict[str, tuple[int, ...]]:
    if not config.is_moe_layer(layer_id):
        return _gated_mlp_shapes("", config.hidden_size, config.intermediate_size)
    experts = config.n_routed_experts
    shapes: dict[str, tuple[int, ...]] = {
        "gate.weight": (experts, config.hidden_size),
        "gate.e_score_correction_bias": (experts,),
    }
    shared_width = config.n_shared_experts * config.moe_intermediate_size
    shapes |= _gated_mlp_shapes("shared_experts.", config.hidden_size, shared_width)
    for expert_id in range(experts):
        shapes |= _gated_mlp_shapes(f"experts.{expert_id}.", config.hidden_size, config.moe_intermediate_size)
    return shapes


def _gated_mlp_shapes(prefix: str, hidden_size: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (width, hidden_size),
        f"{prefix}up_proj.weight": (width, hidden_size),
        f"{prefix}down_proj.weight": (hidden_size, width),
    }
