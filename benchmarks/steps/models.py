"""DeepSeek-V3.2 at its real dimensions, or tiny ones to try a script on a CPU, as an engine or as one rank of many.

Weights are dummies (``quantization/dummy_weights.py``). Invariant: what is built is what the engine builds; only the
recordings of device graphs are fewer: the sizes and the length that are measured.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from argosy.assets import builtin_model_directory
from argosy.config import EngineConfig
from argosy.distributed.recordings import RecordingTable
from argosy.engine.build import BuiltEngine, build_engine
from argosy.models.deepseek.config import ModelConfig
from argosy.platforms import Platform
from argosy.runner.graph_runner import GraphRunner, graph_lengths
from argosy.runner.model_runner import ModelRunner
from benchmarks.steps.plans import longest_row
from tests.helpers.published import PUBLISHED_CONFIG

BLOCK_SIZE = 64
MAX_STEPS = 64  # that a plan may have
TINY = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128,
    "num_attention_heads": 16, "n_routed_experts": 64, "q_lora_rank": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "index_n_heads": 32, "index_head_dim": 32, "index_topk": 64,
    "max_position_embeddings": 8192,
}  # fmt: skip


PUBLISHED_FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


def model_settings(
    num_layers: int, num_dense_layers: int, *, is_tiny: bool, quantization: str = "none"
) -> dict[str, object]:
    """``config.json``; in FP8 blocks with the published checkpoint's scales, which are powers of two."""
    settings = PUBLISHED_CONFIG | (TINY if is_tiny else {})
    if quantization == "fp8_block":
        settings = settings | {"quantization_config": PUBLISHED_FP8}
    return settings | {"num_hidden_layers": num_layers, "first_k_dense_replace": num_dense_layers}


def write_config(settings: dict[str, object]) -> Path:
    directory = Path(tempfile.mkdtemp(prefix="argosy-step-"))
    (directory / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every script takes."""
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="reduced dimensions, to try the script on a CPU")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a prefill step")
    parser.add_argument("--steps", type=int, default=30, help="decode steps that are timed")
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "int8", "fp8"))
    parser.add_argument("--index-cache-dtype", default="auto", choices=("auto", "model", "int8", "fp8"))


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def engine_config(
    options: argparse.Namespace, directory: Path, quantization: str, decodes: list[int], prefills: list[int]
) -> EngineConfig:
    return EngineConfig(
        model=str(directory),
        tokenizer=str(builtin_model_directory("argosy-tiny")),
        device=options.device,
        load_format="dummy",
        quantization=quantization,  # type: ignore[arg-type]
        kv_cache_dtype=options.kv_cache_dtype,
        index_cache_dtype=options.index_cache_dtype,
        dtype="bfloat16" if options.device == "cuda" else "float32",
        max_model_len=longest_row(options.context, MAX_STEPS, prefills),
        max_num_seqs=max([1, *decodes]),
        max_num_batched_tokens=max([options.chunk, *decodes]),
        block_size=BLOCK_SIZE,
        enforce_eager=True,  # recorded when routing has been spread
    )


def build(
    options: argparse.Namespace,
    settings: dict[str, object],
    quantization: str,
    decodes: list[int],
    prefills: list[int],
) -> BuiltEngine:
    return build_engine(engine_config(options, write_config(settings), quantization, decodes, prefills))


def record_graphs(
    runner: ModelRunner,
    config: ModelConfig,
    platform: Platform,
    decodes: list[int],
    context: int,
    *,
    model: object = None,
) -> GraphRunner | None:
    """Recordings of ``decodes`` at the length that the engine has for ``context``; None without decodes.

    ``model``: what is recorded in place of the runner's own.
    """
    if not decodes:
        return None
    lengths = graph_lengths(config.index_topk, config.max_position_embeddings)
    length = next(length for length in lengths if length >= context + MAX_STEPS)
    return GraphRunner.capture(
        runner.model if model is None else model,  # type: ignore[arg-type]
        runner.cache,
        runner.rotary,
        platform,
        table=RecordingTable(tuple(sorted(set(decodes))), (length,)),
    )


def fill_cache(runner: ModelRunner) -> None:
    """Small numbers in every format: equal ones would make top-k another problem. A CPU's cache stays empty pages."""
    for tensor in (runner.cache.latent, runner.cache.index_k):
        if not tensor.is_cpu:
            tensor.view(torch.uint8).random_(0, 64)


def describe_memory(runner: ModelRunner, platform: Platform) -> str:
    memory = platform.memory_info()
    weights = sum(parameter.nbytes for parameter in runner.model.parameters())
    return (
        f"weights {weights / 2**30:.1f} GiB, cache {runner.cache.num_bytes / 2**30:.1f} GiB, "
        f"free {memory.free_bytes / 2**30:.1f} of {memory.total_bytes / 2**30:.1f} GiB"
    )
