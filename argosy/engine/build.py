"""From an ``EngineConfig`` to a running engine: every choice of implementation is made here, once.

``prepare`` resolves what was left to the engine; ``build_engine`` makes an engine in this process, which has one rank.
Engines of many ranks are started by ``deployment.py`` and built by ``worker.py`` from the same pieces. Nothing here
runs in a step. Invariant: settings and configuration that cannot work are refused before the first byte of weights is
read; only the size of the cache is checked after, because what is left for it is known then.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from argosy.cache.cache_format import check_cache_format
from argosy.config import DTypeName, EngineConfig
from argosy.distributed.layout import ModelSizes, ParallelLayout
from argosy.distributed.mesh import ParallelMesh
from argosy.engine.build_rank import (
    DTYPE_NAMES,
    DTYPES,
    build_graphs,
    build_runner,
    build_scheduler,
    cache_dims,
    check_num_blocks,
    choose_recordings,
    load_model,
    measure_num_blocks,
    measure_step,
    warm_up_kernels,
)
from argosy.engine.engine_core import EngineCore
from argosy.engine.memory_use import MemoryUse
from argosy.engine.model_directory import resolve_model_directory
from argosy.engine.tokenizer import Tokenizer
from argosy.engine.weight_format import choose_quantization
from argosy.models.deepseek.config import ModelConfig, load_model_config
from argosy.platforms import Platform, select_platform
from argosy.quantization.load_progress import LoadProgress, ProgressCallback
from argosy.runner.graph_runner import OnCapture
from argosy.runner.model_runner import ModelRunner
from argosy.runner.warm_up import OnTrial

StartProgress = Callable[[str, int, int], None]  # the stage's name, how much of it is done, and of how much


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """What is known before any process is started or any weight is read."""

    config: EngineConfig  # as given, with what was left to the engine filled in, but for num_blocks
    layout: ParallelLayout
    directory: Path
    model_config: ModelConfig
    tokenizer: Tokenizer
    platform: Platform


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltEngine:
    """An engine in this process and what its callers need beside it."""

    config: EngineConfig  # as given, with max_model_len, num_blocks, dtype and quantization filled in
    model_config: ModelConfig
    tokenizer: Tokenizer
    platform: Platform
    device: torch.device
    core: EngineCore
    load_s: float
    memory_use: MemoryUse | None  # of an accelerator


def prepare(config: EngineConfig) -> Preparation:
    """Resolve the settings against the model and the machine.

    Raises:
        ValueError: settings, or a model's configuration, that cannot work; the message names values, rule and remedy.
    """
    layout = ParallelLayout(dp_size=config.dp_size, tp_size=config.tp_size, ep_size=config.ep_size)
    directory = resolve_model_directory(config.model)
    model_config = load_model_config(directory)
    layout.check_model(_model_sizes(model_config))
    check_cache_format(config.cache_dtypes, cache_dims(model_config))
    tokenizer = Tokenizer.from_directory(Path(config.tokenizer).expanduser() if config.tokenizer else directory)
    tokenizer.check_matches(model_config.vocab_size)
    platform = select_platform(config.device)
    if config.emulate_graphs and platform.device_type != "cpu":
        raise ValueError(f"emulate_graphs is for a CPU; {platform.device_type} records steps without being told to")
    resolved = dataclasses.replace(
        config,
        max_model_len=_resolve_max_model_len(config, model_config),
        dtype=_resolve_dtype(config, model_config, platform),
        quantization=choose_quantization(config, directory, platform).kind,
        async_scheduling=_resolve_async_scheduling(config, platform),
    )
    return Preparation(
        config=resolved,
        layout=layout,
        directory=directory,
        model_config=model_config,
        tokenizer=tokenizer,
        platform=platform,
    )


def build_engine(config: EngineConfig | Preparation, *, on_progress: StartProgress | None = None) -> BuiltEngine:
    """Load the model and set up the engine in this process.

    ``on_progress``: told of each stage of the start that takes long, again and again.

    Raises:
        ValueError: the settings or the checkpoint cannot work, or ask for more than one rank; the message names
            values, rule and remedy.
        RuntimeError: a file or the device failed.
    """
    started_s = time.monotonic()
    prepared = config if isinstance(config, Preparation) else prepare(config)
    config, model_config = prepared.config, prepared.model_config
    if config.world_size > 1:
        raise ValueError(
            f"one process holds one rank, but dp_size ({config.dp_size}) x tp_size ({config.tp_size}) is "
            f"{config.world_size}; set --dp 1 --tp 1"
        )
    num_devices = prepared.platform.num_devices()
    if num_devices is not None and config.first_device >= num_devices:
        raise ValueError(
            f"first_device ({config.first_device}) must be below the number of devices ({num_devices}); "
            "lower --first-device, or --dp in a server of independent replicas"
        )
    device, dtype = prepared.platform.device(config.first_device), DTYPES[config.dtype]
    prepared.platform.make_current(config.first_device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    on_load, on_trial, on_capture = _split_progress(on_progress)
    model = load_model(
        config, prepared.directory, model_config, ParallelMesh.local(), prepared.platform, device, on_load
    )
    workspace_bytes = measure_step(config, model_config, model, prepared.platform, device)
    num_blocks = measure_num_blocks(config, model_config, dtype, prepared.platform, 1, workspace_bytes)
    check_num_blocks(config, num_blocks)
    config = dataclasses.replace(config, num_blocks=num_blocks)
    runner = build_runner(config, model_config, model, prepared.tokenizer.vocab_size, prepared.platform, device)
    warm_up_kernels(config, model_config, runner, prepared.platform, on_trial=on_trial)
    free_bytes = prepared.platform.memory_info().free_bytes
    recordings = choose_recordings(config, model_config, prepared.platform)
    runner.graphs = build_graphs(runner, prepared.platform, recordings, on_capture=on_capture)
    runner.try_graphs()
    runner.compilations.start_counting()
    return BuiltEngine(
        config=config,
        model_config=model_config,
        tokenizer=prepared.tokenizer,
        platform=prepared.platform,
        device=device,
        core=EngineCore(build_scheduler(config), runner),
        load_s=time.monotonic() - started_s,
        memory_use=_describe_memory(config, runner, prepared.platform, free_bytes, workspace_bytes),
    )


def _split_progress(
    on_progress: StartProgress | None,
) -> tuple[ProgressCallback | None, OnTrial | None, OnCapture | None]:
    if on_progress is None:
        return None, None, None

    def on_load(progress: LoadProgress) -> None:
        on_progress("loading weights", progress.num_tensors, progress.total_tensors)

    return on_load, partial(on_progress, "compiling kernels"), partial(on_progress, "recording device graphs")


def _describe_memory(
    config: EngineConfig, runner: ModelRunner, platform: Platform, free_before_graphs: int, workspace_bytes: int
) -> MemoryUse | None:
    if platform.device_type == "cpu":
        return None
    memory = platform.memory_info()
    cache = runner.cache
    return MemoryUse(
        total=memory.total_bytes,
        weights=sum(parameter.nbytes for parameter in runner.model.parameters()),
        cache=cache.num_bytes,
        num_cache_tokens=(cache.num_blocks - 1) * config.block_size,
        graphs=max(0, free_before_graphs - memory.free_bytes),
        num_graphs=runner.graphs.num_graphs if runner.graphs is not None else 0,
        workspace=workspace_bytes,
        free=memory.free_bytes,
    )


def _resolve_max_model_len(config: EngineConfig, model_config: ModelConfig) -> int:
    limit = model_config.max_position_embeddings
    if config.max_model_len is None:
        return limit
    if not 2 <= config.max_model_len <= limit:
        raise ValueError(
            f"max_model_len ({config.max_model_len}) must be in [2, {limit}], the model's max_position_embeddings; "
            "set --max-model-len"
        )
    return config.max_model_len


def _resolve_dtype(config: EngineConfig, model_config: ModelConfig, platform: Platform) -> DTypeName:
    if config.dtype != "auto":
        return config.dtype
    if model_config.torch_dtype not in DTYPES:
        raise ValueError(
            f"config.json: torch_dtype {model_config.torch_dtype!r} is not one of {', '.join(DTYPES)}; set --dtype"
        )
    return DTYPE_NAMES[platform.default_dtype(DTYPES[model_config.torch_dtype])]


def _resolve_async_scheduling(config: EngineConfig, platform: Platform) -> bool:
    """On a CPU nothing overlaps: its work is done when a step has been started."""
    return platform.device_type != "cpu" if config.async_scheduling is None else config.async_scheduling


def _model_sizes(model_config: ModelConfig) -> ModelSizes:
    return ModelSizes(
        num_attention_heads=model_config.num_attention_heads,
        intermediate_size=model_config.intermediate_size,
        moe_intermediate_size=model_config.moe_intermediate_size,
        vocab_size=model_config.vocab_size,
        n_routed_experts=model_config.n_routed_experts,
    )
