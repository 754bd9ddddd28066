"""Every rank's share of a model, in one process and without process groups: for tests of what a rank holds."""

import torch

from argosy.assets import builtin_model_directory
from argosy.distributed.layout import ParallelLayout
from argosy.distributed.mesh import ParallelMesh
from argosy.models.deepseek.checkpoint import build_weight_mapping, checkpoint_shapes
from argosy.models.deepseek.config import ModelConfig
from argosy.models.deepseek.model import DeepseekV32Model, weight_shard
from argosy.quantization.checkpoint_format import CheckpointQuantization, WeightFormat
from argosy.quantization.dummy_weights import fill_with_dummy_weights
from argosy.quantization.weight_loader import load_weights


def build_shares(
    config: ModelConfig, layout: ParallelLayout, *, dummy: bool = False, weight_format: WeightFormat = "none"
) -> list[dict[str, torch.Tensor]]:
    """``state_dict`` of every rank of ``layout``, filled from the built-in checkpoint or with dummy weights."""
    return [
        _build_share(config, ParallelMesh.unconnected(layout, rank), dummy, weight_format)
        for rank in range(layout.world_size)
    ]


def _build_share(
    config: ModelConfig, mesh: ParallelMesh, dummy: bool, weight_format: WeightFormat
) -> dict[str, torch.Tensor]:
    quantization = CheckpointQuantization(kind=weight_format)
    model = DeepseekV32Model(config, torch.float32, mesh, quantization=quantization)
    mapping = build_weight_mapping(
        config.num_hidden_layers, config.num_nextn_predict_layers, weight_shard(config, mesh)
    )
    if dummy:
        fill_with_dummy_weights(model, checkpoint_shapes(config), mapping)
    else:
        load_weights(model, builtin_model_directory("argosy-tiny"), mapping=mapping)
    return model.state_dict()
