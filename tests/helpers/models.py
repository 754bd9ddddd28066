"""Loads a checkpoint into our model, without an engine around it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from argosy.cache.rope import build_rotary_table
from argosy.engine.build_rank import rotary_settings
from argosy.models.deepseek.checkpoint import build_weight_mapping
from argosy.models.deepseek.config import ModelConfig, load_model_config
from argosy.models.deepseek.model import DeepseekV32Model
from argosy.quantization.weight_loader import load_weights
from argosy.validation.probe import ModelProbe


@dataclass(frozen=True, slots=True)
class LoadedModel:
    config: ModelConfig
    model: DeepseekV32Model
    probe: ModelProbe


def load_model(directory: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LoadedModel:
    config = load_model_config(directory)
    with torch.device(device):
        model = DeepseekV32Model(config, dtype)
    mapping = build_weight_mapping(config.num_hidden_layers, config.num_nextn_predict_layers)
    load_weights(model, directory, mapping=mapping)
    rotary = build_rotary_table(rotary_settings(config), torch.device(device))
    return LoadedModel(config, model, ModelProbe(model, config, rotary))
