"""What one rank sets up: its share of the model, its cache, its runner, and the scheduler where it leads.

A single process is a world of one rank and takes the same way. Nothing here runs in a step, and nothing here waits for
other ranks. Invariant: what two ranks of a replica set up from equal settings behaves equally.
"""

import secrets
import sys
from functools import partial
from pathlib import Path

import torch

from argosy.cache.block_manager import BlockManager
from argosy.cache.cache_format import build_cache_format
from argosy.cache.layer_settings import CacheDims
from argosy.cache.mla_kv_cache import MLAKVCache, kv_bytes_per_block
from argosy.cache.rope import RotarySettings, build_rotary_table
from argosy.config import DTypeName, EngineConfig
from argosy.distributed.communicator import Communicator
from argosy.distributed.dp_coord import ExchangePolicy, choose_mode, plan_recordings
from argosy.distributed.ep_symmetric import SymmetricTransport, connect_areas
from argosy.distributed.ep_types import (
    ROW_ALIGNMENT_WORDS,
    WORD_BYTES,
    ExchangeOf,
    ExchangePlan,
    exchange_nothing,
)
from argosy.distributed.mesh import GROUP_TIMEOUT_FACTOR, ParallelMesh
from argosy.distributed.recordings import NO_RECORDINGS, RecordingTable
from argosy.engine.model_directory import resolve_model_directory
from argosy.engine.scheduler import Scheduler
from argosy.engine.tokenizer import Tokenizer
from argosy.engine.weight_format import choose_quantization
from argosy.grammar.compiler import Vocabulary
from argosy.grammar.grammar_table import GrammarTable
from argosy.kernels.select import select_compilation_counter, select_one_sided_ops
from argosy.models.deepseek.checkpoint import build_weight_mapping, checkpoint_shapes
from argosy.models.deepseek.config import ModelConfig
from argosy.models.deepseek.model import DeepseekV32Model, weight_shard
from argosy.platforms import Platform
from argosy.quantization.checkpoint_format import CheckpointQuantization
from argosy.quantization.dummy_weights import fill_with_dummy_weights
from argosy.quantization.load_progress import ProgressCallback
from argosy.quantization.weight_loader import load_weights
from argosy.runner.graph_runner import GraphRunner, OnCapture, graph_batch_sizes, graph_lengths
from argosy.runner.model_runner import ModelRunner
from argosy.runner.row_table import RowTable
from argosy.runner.sampler import Sampler
from argosy.runner.warm_up import OnTrial, WarmUpSizes, plan_warm_up, warm_up
from argosy.runner.workspace import StepSizes, measure_workspace

DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DTYPE_NAMES: dict[torch.dtype, DTypeName] = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_CPU_CACHE_BYTES = 2**30  # the most that is taken unasked by a rank on a CPU
WORKSPACE_BYTES = 2**31  # left free on an accelerator for a step, where it was not measured
MAX_SYMMETRIC_TOKENS = 512  # of a rank: 28 MiB for each rank of the group, at 7,168 bf16 numbers
_GRAPH_BYTES = 2**29  # for device graphs, and for what a step takes that the measured one did not


def load_model(
    config: EngineConfig,
    directory: Path,
    model_config: ModelConfig,
    mesh: ParallelMesh,
    platform: Platform,
    device: torch.device,
    on_progress: ProgressCallback | None = None,
    symmetric: SymmetricTransport | None = None,
) -> DeepseekV32Model:
    """This rank's share, filled. ``config``: with ``dtype`` filled in."""
    quantization = choose_quantization(config, directory, platform)
    model = build_model(config, model_config, quantization, mesh, device, symmetric)
    mapping = build_weight_mapping(
        model_config.num_hidden_layers, model_config.num_nextn_predict_layers, weight_shard(model_config, mesh)
    )
    block_size = quantization.block_size
    if config.load_format == "dummy":
        shapes = checkpoint_shapes(model_config)
        fill_with_dummy_weights(model, shapes, mapping, block_size=block_size, on_progress=on_progress)
    else:
        load_weights(model, directory, mapping=mapping, block_size=block_size, on_progress=on_progress)
    return model.eval()


def build_model(
    config: EngineConfig,
    model_config: ModelConfig,
    quantization: CheckpointQuantization,
    mesh: ParallelMesh,
    device: torch.device,
    symmetric: SymmetricTransport | None = None,
) -> DeepseekV32Model:
    """This rank's share, with uninitialised parameters; on the meta device, with none."""
    with torch.device(device):
        return DeepseekV32Model(
            model_config,
            DTYPES[config.dtype],
            mesh,
            ep_payload=config.ep_payload,
            symmetric=symmetric,
            quantization=quantization,
        )


def connect_symmetric(
    config: EngineConfig, model_config: ModelConfig, ep: Communicator, device: torch.device
) -> SymmetricTransport | None:
    """What low_latency travels by; None for collectives, which also take steps of more than ``MAX_SYMMETRIC_TOKENS`` a
    rank. ``config``: with ``dtype`` filled in. Collective over ep.

    Raises:
        ValueError, RuntimeError: these devices cannot reach each other's memory.
    """
    if config.ll_transport == "collective" or ep.size == 1:
        return None
    ops = select_one_sided_ops(device.type)
    most = min(config.max_num_batched_tokens, MAX_SYMMETRIC_TOKENS)
    ids_bytes = 2 * WORD_BYTES * (model_config.num_experts_per_tok + ROW_ALIGNMENT_WORDS)
    row_bytes = model_config.hidden_size * DTYPES[config.dtype].itemsize + ids_bytes
    # As of gloo: the watchdog must speak first, for it can say who is missing.
    limit_s = config.collective_timeout_s * GROUP_TIMEOUT_FACTOR
    return SymmetricTransport(connect_areas(ep, device, most, row_bytes, limit_s), ops)


def measure_num_blocks(
    config: EngineConfig,
    model_config: ModelConfig,
    dtype: torch.dtype,
    platform: Platform,
    num_local_ranks: int,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> int:
    """Blocks of this rank's cache, the null block included: what was asked for, else what fits and can be used.

    ``workspace_bytes``: what steps and graphs take of an accelerator's memory beside it.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    # On no device: only its sizes are asked for.
    cache_format = build_cache_format(config.cache_dtypes, cache_dims(model_config), dtype, torch.device("meta"))
    block_bytes = kv_bytes_per_block(
        cache_format, num_layers=model_config.num_hidden_layers, block_size=config.block_size
    )
    cache_bytes = config.kv_cache_memory_bytes
    if cache_bytes is None:
        most_useful = config.max_num_seqs * _blocks_per_request(config) + 1
        free_bytes = _free_cache_bytes(config, platform, num_local_ranks, workspace_bytes)
        cache_bytes = min(free_bytes, most_useful * block_bytes)
    return max(cache_bytes, 0) // block_bytes


def measure_step(
    config: EngineConfig,
    model_config: ModelConfig,
    model: DeepseekV32Model,
    platform: Platform,
    device: torch.device,
    exchange_of: ExchangeOf = exchange_nothing,
) -> int:
    """Bytes that steps and graphs take beside weights and cache; measured on an accelerator. Collective over world."""
    if platform.peak_bytes() is None:
        return WORKSPACE_BYTES
    assert config.max_model_len is not None
    measured = measure_workspace(
        model,
        build_cache_format(config.cache_dtypes, cache_dims(model_config), DTYPES[config.dtype], device),
        build_rotary_table(rotary_settings(model_config), device),
        StepSizes(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
        ),
        platform,
        num_layers=model_config.num_hidden_layers,
        exchange_of=exchange_of,
    )
    platform.reset_peak()
    assert measured is not None
    return measured + _GRAPH_BYTES


def choose_recordings(
    config: EngineConfig,
    model_config: ModelConfig,
    platform: Platform,
    policy: ExchangePolicy | None = None,
    ep_size: int = 1,
) -> RecordingTable:
    """What this engine's ranks can record; nothing where it was refused, or would not be recordings. ``policy`` None:
    one rank."""
    if config.enforce_eager or not (platform.records_steps or config.emulate_graphs):
        return NO_RECORDINGS
    assert config.max_model_len is not None
    sizes = graph_batch_sizes(config.max_num_seqs)
    lengths = graph_lengths(model_config.index_topk, config.max_model_len)
    return (
        RecordingTable(sizes, lengths) if policy is None else plan_recordings(sizes, lengths, policy, ep_size=ep_size)
    )


def exchange_under(policy: ExchangePolicy) -> ExchangeOf:
    """What all agree on for steps of as many tokens a replica."""

    def exchange_of(num_tokens: int) -> ExchangePlan:
        max_tokens_per_rank = -(-num_tokens // policy.ranks_per_replica)
        return ExchangePlan(choose_mode(max_tokens_per_rank, policy), max_tokens_per_rank)

    return exchange_of


def build_graphs(
    runner: ModelRunner,
    platform: Platform,
    table: RecordingTable,
    *,
    exchange_of: ExchangeOf = exchange_nothing,
    world: Communicator | None = None,
    on_capture: OnCapture | None = None,
) -> GraphRunner | None:
    """Recordings of decode steps; None where there are to be none. Collective over ``world``."""
    if not table.sizes:
        return None
    return GraphRunner.capture(
        runner.model,
        runner.cache,
        runner.rotary,
        platform,
        table=table,
        exchange_of=exchange_of,
        world=world,
        on_capture=on_capture,
    )


def check_num_blocks(config: EngineConfig, num_blocks: int) -> None:
    """Raises ValueError if a cache of ``num_blocks``, with the null block, cannot hold one request."""
    num_usable_tokens = max(num_blocks - 1, 0) * config.block_size
    if num_blocks - 1 < _blocks_per_request(config):
        shorter = f"lower --max-model-len to {num_usable_tokens} or less, or " if num_usable_tokens >= 2 else ""
        raise ValueError(
            f"the cache of {max(num_blocks - 1, 0)} blocks x {config.block_size} tokens cannot hold one request of "
            f"max_model_len ({config.max_model_len}) tokens, which takes {_blocks_per_request(config)} blocks and the "
            f"null block; {shorter}raise --num-blocks or --kv-cache-memory-bytes"
        )


def build_runner(
    config: EngineConfig,
    model_config: ModelConfig,
    model: DeepseekV32Model,
    num_valid_tokens: int,
    platform: Platform,
    device: torch.device,
) -> ModelRunner:
    """``config``: with ``max_model_len``, ``num_blocks`` and ``dtype`` filled in."""
    assert config.num_blocks is not None and config.max_model_len is not None
    cache = MLAKVCache(
        build_cache_format(config.cache_dtypes, cache_dims(model_config), DTYPES[config.dtype], device),
        num_layers=model_config.num_hidden_layers,
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        device=device,
    )
    row_table = RowTable(
        max_num_seqs=config.max_num_seqs, max_model_len=config.max_model_len, block_size=config.block_size
    )
    sampler = Sampler(
        vocab_size=model_config.vocab_size,
        num_valid_tokens=num_valid_tokens,
        max_num_seqs=config.max_num_seqs,
        device=device,
        engine_seed=config.seed,
        grammars=GrammarTable(partial(load_vocabulary, config, model_config)),
    )
    return ModelRunner(
        model=model,
        cache=cache,
        rotary=build_rotary_table(rotary_settings(model_config), device),
        sampler=sampler,
        row_table=row_table,
        eos_token_ids=model_config.eos_token_ids,
        platform=platform,
        device=device,
        compilations=select_compilation_counter(platform.device_type, _report_compilation),
    )


def load_vocabulary(config: EngineConfig, model_config: ModelConfig) -> Vocabulary:
    """What grammars are followed in."""
    directory = Path(config.tokenizer).expanduser() if config.tokenizer else resolve_model_directory(config.model)
    tokenizer = Tokenizer.from_directory(directory)
    return tokenizer.vocabulary(model_config.eos_token_ids)


def warm_up_kernels(
    config: EngineConfig,
    model_config: ModelConfig,
    runner: ModelRunner,
    platform: Platform,
    exchange_of: ExchangeOf = exchange_nothing,
    on_trial: OnTrial | None = None,
) -> None:
    """Every kernel that a step may need is compiled, where they are compiled at all. Collective, see ``warm_up``."""
    if not runner.compilations.is_needed:
        return
    assert config.max_model_len is not None
    trials = plan_warm_up(
        WarmUpSizes(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            index_topk=model_config.index_topk,
        )
    )
    warm_up(
        runner.model,
        runner.cache.format,
        runner.rotary,
        trials,
        block_size=config.block_size,
        vocab_size=model_config.vocab_size,
        exchange_of=exchange_of,
        on_trial=on_trial,
    )
    runner.model.expert_load.reset()
    platform.reset_peak()


def build_scheduler(config: EngineConfig) -> Scheduler:
    """``config``: with ``max_model_len``, ``num_blocks`` and ``async_scheduling`` filled in."""
    assert config.num_blocks is not None and config.max_model_len is not None
    block_manager = BlockManager(
        config.num_blocks,
        config.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
        # Secret, so that nobody can craft a prompt whose hash collides with another user's.
        hash_key=secrets.token_bytes(32),
    )
    return Scheduler(
        block_manager,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        async_scheduling=bool(config.async_scheduling),
    )


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


def cache_dims(model_config: ModelConfig) -> CacheDims:
    return CacheDims(
        kv_lora_rank=model_config.kv_lora_rank,
        qk_rope_head_dim=model_config.qk_rope_head_dim,
        index_head_dim=model_config.index_head_dim,
    )


def _report_compilation(line: str) -> None:
    sys.stderr.write(f"argosy: {line}\n")
    sys.stderr.flush()


def _blocks_per_request(config: EngineConfig) -> int:
    assert config.max_model_len is not None
    return -(-config.max_model_len // config.block_size)


def _free_cache_bytes(config: EngineConfig, platform: Platform, num_local_ranks: int, workspace_bytes: int) -> int:
    """Memory that the cache may take unasked, after the weights are loaded."""
    memory = platform.memory_info()
    if platform.device_type == "cpu":
        return min(_CPU_CACHE_BYTES, memory.free_bytes // 2 // num_local_ranks)
    kept_bytes = int((1.0 - config.device_memory_utilization) * memory.total_bytes)
    return memory.free_bytes - kept_bytes - workspace_bytes
