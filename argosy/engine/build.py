"""From an ``EngineConfig`` to a running engine: every choice of implementation is made here, once.

Nothing here runs in a step. Invariant: settings and configuration that cannot work are refused before the first byte of
weights is read; only the size of the cache is checked after, because what is left for it is known then.
"""

import dataclasses
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from argosy.assets import BUILTIN_MODELS, builtin_model_directory
from argosy.cache.block_manager import BlockManager
from argosy.cache.mla_kv_cache import MLAKVCache, kv_bytes_per_block
from argosy.cache.rope import RotarySettings, build_rotary_table
from argosy.config import DTypeName, EngineConfig
from argosy.engine.engine_core import EngineCore
from argosy.engine.scheduler import Scheduler
from argosy.engine.tokenizer import Tokenizer
from argosy.models.deepseek.checkpoint import build_weight_mapping
from argosy.models.deepseek.config import ModelConfig, load_model_config
from argosy.models.deepseek.model import DeepseekV32Model
from argosy.platforms import Platform, select_platform
from argosy.quantization.weight_loader import ProgressCallback, load_weights
from argosy.runner.model_runner import ModelRunner
from argosy.runner.row_table import RowTable
from argosy.runner.sampler import Sampler

_DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_DTYPE_NAMES: dict[torch.dtype, DTypeName] = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_CPU_CACHE_BYTES = 2**30  # the most that is taken unasked on a CPU
_WORKSPACE_BYTES = 2**30  # left free on an accelerator for activations


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltEngine:
    """An engine and what its callers need beside it."""

    config: EngineConfig  # as given, with max_model_len, num_blocks and dtype filled in
    model_config: ModelConfig
    tokenizer: Tokenizer
    platform: Platform
    device: torch.device
    core: EngineCore
    load_s: float


def resolve_model_directory(model: str) -> Path:
    """The directory of a built-in model's name or of a path.

    Raises:
        ValueError: neither.
    """
    if model in BUILTIN_MODELS:
        return builtin_model_directory(model)
    directory = Path(model).expanduser()
    if not directory.is_dir():
        raise ValueError(
            f"no such model: {model!r} is neither a directory nor built in ({', '.join(BUILTIN_MODELS)}); "
            "give a directory with config.json, tokenizer.json and *.safetensors"
        )
    return directory


def build_engine(config: EngineConfig, *, on_progress: ProgressCallback | None = None) -> BuiltEngine:
    """Load the model and set up the engine.

    Raises:
        ValueError: the settings or the checkpoint cannot work; the message names values, rule and remedy.
        RuntimeError: a file or the device failed.
    """
    started_s = time.monotonic()
    directory = resolve_model_directory(config.model)
    model_config = load_model_config(directory)
    config = dataclasses.replace(config, max_model_len=_resolve_max_model_len(config, model_config))
    tokenizer = Tokenizer.from_directory(Path(config.tokenizer).expanduser() if config.tokenizer else directory)
    tokenizer.check_matches(model_config.vocab_size)
    platform = select_platform(config.device)
    device = platform.device(0)
    dtype = _resolve_dtype(config, model_config, platform)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)

    model = _load_model(directory, model_config, dtype, device, on_progress)
    num_blocks = _resolve_num_blocks(config, model_config, dtype, platform)
    core = _build_core(
        dataclasses.replace(config, num_blocks=num_blocks), model_config, model, tokenizer, dtype, device
    )
    return BuiltEngine(
        config=dataclasses.replace(config, num_blocks=num_blocks, dtype=_DTYPE_NAMES[dtype]),
        model_config=model_config,
        tokenizer=tokenizer,
        platform=platform,
        device=device,
        core=core,
        load_s=time.monotonic() - started_s,
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


def _resolve_dtype(config: EngineConfig, model_config: ModelConfig, platform: Platform) -> torch.dtype:
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    if model_config.torch_dtype not in _DTYPES:
        raise ValueError(
            f"config.json: torch_dtype {model_config.torch_dtype!r} is not one of {', '.join(_DTYPES)}; set --dtype"
        )
    return platform.default_dtype(_DTYPES[model_config.torch_dtype])


def _load_model(
    directory: Path,
    model_config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: ProgressCallback | None,
) -> DeepseekV32Model:
    with torch.device(device):
        model = DeepseekV32Model(model_config, dtype)
    load_weights(
        model,
        directory,
        mapping=build_weight_mapping(model_config.num_hidden_layers, model_config.num_nextn_predict_layers),
        block_size=model_config.weight_block_size,
        on_progress=on_progress,
    )
    return model.eval()


def _resolve_num_blocks(config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype, platform: Platform) -> int:
    """Blocks of the cache, the null block included: what was asked for, else what fits and can be used."""
    assert config.max_model_len is not None
    blocks_per_request = -(-config.max_model_len // config.block_size)
    num_blocks = config.num_blocks
    if num_blocks is None:
        block_bytes = kv_bytes_per_block(
            num_layers=model_config.num_hidden_layers,
            block_size=config.block_size,
            latent_dim=model_config.latent_dim,
            index_head_dim=model_config.index_head_dim,
            dtype=dtype,
        )
        cache_bytes = config.kv_cache_memory_bytes
        most_useful = config.max_num_seqs * blocks_per_request + 1
        if cache_bytes is None:
            cache_bytes = min(_free_cache_bytes(config, platform), most_useful * block_bytes)
        num_blocks = max(cache_bytes, 0) // block_bytes
    num_usable_tokens = max(num_blocks - 1, 0) * config.block_size
    if num_blocks - 1 < blocks_per_request:
        shorter = f"lower --max-model-len to {num_usable_tokens} or less, or " if num_usable_tokens >= 2 else ""
        raise ValueError(
            f"the cache of {max(num_blocks - 1, 0)} blocks x {config.block_size} tokens cannot hold one request of "
            f"max_model_len ({config.max_model_len}) tokens, which takes {blocks_per_request} blocks and the null "
            f"block; {shorter}raise --num-blocks or --kv-cache-memory-bytes"
        )
    return num_blocks


def _free_cache_bytes(config: EngineConfig, platform: Platform) -> int:
    """Memory that the cache may take unasked, after the weights are loaded."""
    memory = platform.memory_info()
    if platform.device_type == "cpu":
        return min(_CPU_CACHE_BYTES, memory.free_bytes // 2)
    kept_bytes = int((1.0 - config.device_memory_utilization) * memory.total_bytes)
    return memory.free_bytes - kept_bytes - _WORKSPACE_BYTES


def _build_core(
    config: EngineConfig,
    model_config: ModelConfig,
    model: DeepseekV32Model,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    device: torch.device,
) -> EngineCore:
    assert config.num_blocks is not None and config.max_model_len is not None
    cache = MLAKVCache(
        num_layers=model_config.num_hidden_layers,
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        latent_dim=model_config.latent_dim,
        index_head_dim=model_config.index_head_dim,
        dtype=dtype,
        device=device,
    )
    row_table = RowTable(
        max_num_seqs=config.max_num_seqs, max_model_len=config.max_model_len, block_size=config.block_size
    )
    sampler = Sampler(
        vocab_size=model_config.vocab_size,
        num_valid_tokens=tokenizer.vocab_size,
        max_num_seqs=config.max_num_seqs,
        device=device,
        engine_seed=config.seed,
    )
    runner = ModelRunner(
        model=model,
        cache=cache,
        rotary=build_rotary_table(rotary_settings(model_config), device),
        sampler=sampler,
        row_table=row_table,
        eos_token_ids=model_config.eos_token_ids,
        device=device,
    )
    block_manager = BlockManager(
        config.num_blocks,
        config.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
        # Secret, so that nobody can craft a prompt whose hash collides with another user's.
        hash_key=secrets.token_bytes(32),
    )
    scheduler = Scheduler(
        block_manager,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
    )
    return EngineCore(scheduler, runner)


def rotary_settings(model_config: ModelConfig) -> RotarySettings:
    yarn = model_config.yarn
    return RotarySettings(
        rotary_dim=model_config.qk_rope_head_dim,
        max_positions=model_config.max_position_embeddings,
        theta=model_config.rope_theta,
        factor=yarn.factor,
        original_max_positions=yarn.original_max_position_embeddings,
        beta_fast=yarn.beta_fast,
        beta_slow=yarn.beta_slow,
    )
