"""DeepSeek-V3.2: embed -> decoder layers -> norm -> head. Module attributes carry the checkpoint's names.

The forward pass takes a packed batch and the cache; it knows nothing of requests, sampling or scheduling. What ranks
share is in collaborators that are chosen when the model is built (``tp_comm.py``, ``ep_dispatch.py``); on one rank they
are null twins. Invariant: nothing here keeps state between steps except the cache it is handed.

Shape letters: T tokens of the batch, t tokens of this rank's slice (T on one rank), D hidden, N rows to sample.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import nn

from argosy.cache.mla_kv_cache import LayerKV, MLAKVCache
from argosy.config import EPPayload
from argosy.distributed.communicator import Communicator
from argosy.distributed.ep_arrange import sum_rows_in_torch
from argosy.distributed.ep_dispatch import build_dispatcher
from argosy.distributed.ep_local import spread_weights_on_host
from argosy.distributed.ep_symmetric import SymmetricTransport
from argosy.distributed.expert_load import ExpertLoad
from argosy.distributed.mesh import ParallelMesh
from argosy.distributed.tp_comm import build_token_slices, gather_vocabulary
from argosy.kernels.select import (
    select_expert_layout,
    select_max_whole_tokens,
    select_row_ops,
    select_spread_weights,
    select_sum_rows,
)
from argosy.layers.embedding import build_embedding
from argosy.layers.entrance import Entrance, WholeEntrance, build_entrance
from argosy.layers.forward_batch import ForwardBatch
from argosy.layers.linear import VocabParallelHead
from argosy.layers.mlp import GatedMLP
from argosy.layers.norm import RMSNorm
from argosy.models.deepseek.checkpoint import WeightShard
from argosy.models.deepseek.config import ModelConfig
from argosy.models.deepseek.mla import MLAAttention
from argosy.models.deepseek.moe_layer import MoELayer
from argosy.quantization.checkpoint_format import CheckpointQuantization
from argosy.quantization.preparation import NormedRows
from argosy.quantization.scheme import UNQUANTIZED, Schemes, build_schemes


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What every layer is built from."""

    config: ModelConfig
    dtype: torch.dtype
    schemes: Schemes  # by names below the model's
    mesh: ParallelMesh
    ep_payload: EPPayload
    symmetric: SymmetricTransport | None  # what low_latency travels by; None: collectives
    expert_load: ExpertLoad


class DenseMLP(GatedMLP):
    """The checkpoint's ``mlp`` of a dense layer: its width is split, so all tokens meet on every rank of tp."""

    def __init__(self, config: ModelConfig, schemes: Schemes, tp: Communicator) -> None:
        super().__init__(config.hidden_size, config.intermediate_size, schemes, tp.size)
        self._slices = build_token_slices(tp)

    def forward(self, normed: NormedRows, batch: ForwardBatch) -> torch.Tensor:
        """All T tokens -> [t, D]."""
        return self._slices.reduce_scatter(super().forward(normed.prepared))


class DecoderLayer(nn.Module):
    """Pre-norm attention, then pre-norm MLP or MoE, each added to this rank's slice of the residual stream."""

    def __init__(self, parts: ModelParts, layer_id: int) -> None:
        super().__init__()
        config, tp = parts.config, parts.mesh.tp
        schemes = parts.schemes.at(f"model.layers.{layer_id}")
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLAAttention(config, schemes.at("self_attn"), tp.size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        attention_tp, mlp_tp = tp.named(f"layer {layer_id} attention"), tp.named(f"layer {layer_id} mlp")
        self._enter_attention = build_entrance(self.input_layernorm, self.self_attn.preparation, attention_tp)
        self._slices = build_token_slices(attention_tp)
        self.mlp: nn.Module
        if config.is_moe_layer(layer_id):  # its tokens are this rank's own
            self.mlp = _build_moe(parts, schemes.at("mlp"), layer_id)
            self._enter_mlp: Entrance = WholeEntrance(self.post_attention_layernorm, self.mlp.preparation)
        else:
            self.mlp = DenseMLP(config, schemes.at("mlp"), mlp_tp)
            self._enter_mlp = build_entrance(self.post_attention_layernorm, self.mlp.preparation, mlp_tp)

    def forward(
        self, hidden_states: torch.Tensor, delta: torch.Tensor | None, batch: ForwardBatch, kv: LayerKV
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``hidden_states: [t, D]`` and ``delta: [t, D]``, which is still to be added to them, or None -> both for the
        next layer, whose norm adds them on its way."""
        entered = self._enter_attention(hidden_states, delta, batch.num_tokens)
        attended = self._slices.reduce_scatter(self.self_attn(entered, batch, kv))
        entered = self._enter_mlp(entered.total, attended, batch.num_tokens)
        return entered.total, self.mlp(entered, batch)


def _build_moe(parts: ModelParts, schemes: Schemes, layer_id: int) -> MoELayer:
    config, mesh, device_type = parts.config, parts.mesh, torch.get_default_device().type
    expert_ids = mesh.layout.local_expert_ids(mesh.coords.ep, config.n_routed_experts)
    is_plain = schemes.at("experts").has_plain_experts(expert_ids, config.hidden_size, config.moe_intermediate_size)
    dispatcher = build_dispatcher(
        mesh.ep.named(f"layer {layer_id} experts"),
        config.n_routed_experts,
        payload=parts.ep_payload,
        low_latency_layout=select_expert_layout(device_type),
        row_ops=select_row_ops(device_type),
        sum_rows=select_sum_rows(device_type, sum_rows_in_torch),
        max_whole_tokens=select_max_whole_tokens(device_type, parts.dtype) if is_plain else 0,
        spread_weights=select_spread_weights(device_type, spread_weights_on_host),
        symmetric=parts.symmetric,
    )
    return MoELayer(
        config,
        dispatcher,
        schemes,
        expert_ids,
        parts.expert_load.layer(layer_id - config.first_k_dense_replace),
    )


class Backbone(nn.Module):
    """The checkpoint's ``model``."""

    def __init__(self, parts: ModelParts) -> None:
        super().__init__()
        config, tp = parts.config, parts.mesh.tp.named("embedding")
        self.embed_tokens = build_embedding(
            config.vocab_size, config.hidden_size, parts.dtype, tp_rank=tp.rank, tp_size=tp.size
        )
        self.layers = nn.ModuleList(DecoderLayer(parts, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._slices = build_token_slices(tp)

    def forward(self, batch: ForwardBatch, cache: MLAKVCache, num_layers: int | None = None) -> torch.Tensor:
        """This rank's slice of the hidden states after the final norm: [t, D]."""
        hidden_states, delta = self._slices.reduce_scatter(self.embed_tokens(batch.input_ids)), None
        for layer_id, layer in enumerate(itertools.islice(self.layers, num_layers)):  # a slice would be a module
            hidden_states, delta = layer(hidden_states, delta, batch, cache.layer(layer_id))
        return self.norm(hidden_states) if delta is None else self.norm.add(hidden_states, delta)[0]


class DeepseekV32Model(nn.Module):
    """One rank's share of the whole model. ``state_dict`` keys are the checkpoint's, but for stacked experts and
    gate_up_proj; what of each tensor is here says ``checkpoint.py``.

    Building it communicates nothing. ``mesh`` None: one rank holds everything. ``quantization``: in which format which
    linears compute; the checkpoint's, or none to dequantise on load.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        mesh: ParallelMesh | None = None,
        *,
        ep_payload: EPPayload = "model",
        symmetric: SymmetricTransport | None = None,
        quantization: CheckpointQuantization = UNQUANTIZED,
    ) -> None:
        super().__init__()
        mesh = mesh or ParallelMesh.local()
        num_moe_layers = config.num_hidden_layers - config.first_k_dense_replace
        self.expert_load = ExpertLoad(num_moe_layers, config.n_routed_experts // mesh.ep.size)
        self._num_distinct_layers = min(config.first_k_dense_replace + 1, config.num_hidden_layers)
        self._head_tp = mesh.tp.named("head")
        self._slices = build_token_slices(self._head_tp)
        schemes = build_schemes(dtype, quantization)
        self.model = Backbone(ModelParts(config, dtype, schemes, mesh, ep_payload, symmetric, self.expert_load))
        self.lm_head = VocabParallelHead(config.hidden_size, config.vocab_size, dtype, mesh.tp.size)

    def forward(self, batch: ForwardBatch, cache: MLAKVCache, num_layers: int | None = None) -> torch.Tensor:
        """This rank's slice of the hidden states after the final norm: [t, D]. Collective, also without tokens.

        ``num_layers``: of the first ones, for trials; None: all."""
        return self.model(batch, cache, num_layers)

    @property
    def num_distinct_layers(self) -> int:
        """The first layers, up to one of each kind: the others run the same operations on the same shapes."""
        return self._num_distinct_layers

    def take_rows(self, hidden_states: torch.Tensor, rows: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """What ``forward`` returned for ``num_tokens`` tokens, ``rows: [N]`` int64 -> these rows on every rank of tp:
        [N, D]. Collective over tp."""
        return self._slices.take_rows(hidden_states, rows, num_tokens)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``hidden_states: [N, D]`` -> logits [N, vocab_size] float32, equal on all ranks of tp. Collective over tp."""
        return gather_vocabulary(self.lm_head(hidden_states), self._head_tp)


def weight_shard(config: ModelConfig, mesh: ParallelMesh) -> WeightShard:
    """What of a checkpoint the rank of ``mesh`` holds."""
    expert_ids = mesh.layout.local_expert_ids(mesh.coords.ep, config.n_routed_experts)
    return WeightShard(tp_rank=mesh.coords.tp, tp_size=mesh.layout.tp_size, expert_ids=expert_ids)
