"""The dry run of a load: what every rank would read and hold, from settings, ``config.json`` and headers.

The share of a rank is built on the meta device, so its number formats are those of the model itself. Nothing is loaded
and no process is started. Invariant: settings that an engine would refuse are refused here too.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from argosy.config import EngineConfig
from argosy.distributed.layout import ParallelLayout
from argosy.distributed.mesh import ParallelMesh
from argosy.engine.build import prepare
from argosy.engine.build_rank import build_model
from argosy.engine.weight_format import choose_quantization
from argosy.models.deepseek.checkpoint import build_weight_mapping, checkpoint_shapes
from argosy.models.deepseek.config import ModelConfig
from argosy.models.deepseek.load_plan import RankLoadPlan, plan_load
from argosy.quantization.checkpoint_format import CheckpointQuantization
from argosy.quantization.dummy_weights import dummy_headers
from argosy.quantization.placement import spec_of
from argosy.quantization.safetensors_headers import count_header_bytes, read_headers
from argosy.quantization.weight_plan import ParameterSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPlan:
    """A whole deployment's load."""

    config: EngineConfig  # with max_model_len and dtype filled in
    layout: ParallelLayout
    directory: Path
    quantization: CheckpointQuantization  # that linears compute in
    num_files: int
    tensor_bytes: int  # of the checkpoint
    header_bytes: int  # that every rank reads
    num_mtp_layers: int
    ranks: list[RankLoadPlan]


def make_load_plan(config: EngineConfig) -> LoadPlan:
    """
    Raises:
        ValueError: what the engine would refuse before it reads a byte of weights.
        RuntimeError: a file that cannot be read.
    """
    prepared = prepare(config)
    config, model_config, layout = prepared.config, prepared.model_config, prepared.layout
    quantization = choose_quantization(config, prepared.directory, prepared.platform)
    parameters = parameters_of_share(config, model_config, quantization, layout)
    is_dummy, block_size = config.load_format == "dummy", quantization.block_size
    if is_dummy:
        mapping = build_weight_mapping(model_config.num_hidden_layers, 0)
        headers = dummy_headers(checkpoint_shapes(model_config), parameters, mapping, block_size)
    else:
        headers = read_headers(prepared.directory)
    return LoadPlan(
        config=config,
        layout=layout,
        directory=prepared.directory,
        quantization=quantization,
        num_files=0 if is_dummy else len({header.file for header in headers.values()}),
        tensor_bytes=sum(header.num_bytes for header in headers.values()),
        header_bytes=0 if is_dummy else count_header_bytes(prepared.directory, headers.values()),
        num_mtp_layers=0 if is_dummy else model_config.num_nextn_predict_layers,
        ranks=plan_load(headers, model_config, layout, parameters, block_size),
    )


def parameters_of_share(
    config: EngineConfig, model_config: ModelConfig, quantization: CheckpointQuantization, layout: ParallelLayout
) -> dict[str, ParameterSpec]:
    """Of a rank's share of the model: every rank's has equal shapes."""
    mesh = ParallelMesh.unconnected(layout, 0)
    model = build_model(config, model_config, quantization, mesh, torch.device("meta"))
    return {name: spec_of(parameter) for name, parameter in model.state_dict().items()}
