"""Small checkpoints to convert, and what a conversion wrote, for tests.

Names are those of a DeepSeek-V3.2 layer; shapes are odd, so that pieces, blocks and chunks do not end where tensors do.
Invariant: seeded, so that two calls make the same files.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from argosy.quantization.checkpoint_format import CheckpointQuantization
from argosy.quantization.convert import ConversionOptions, TensorReport, convert_checkpoint
from tests.helpers.checkpoints import quantize_fp8_block, write_checkpoint

LAYER = "model.layers.0"
Q_A, O_PROJ, KV_B = (f"{LAYER}.self_attn.{name}.weight" for name in ("q_a_proj", "o_proj", "kv_b_proj"))
DOWN = f"{LAYER}.mlp.experts.3.down_proj.weight"
NORM = f"{LAYER}.input_layernorm.weight"
SHAPES = {Q_A: (48, 200), O_PROJ: (200, 131), DOWN: (300, 260), KV_B: (192, 72)}
TARGET = CheckpointQuantization(kind="w8a8", ignored=("lm_head", r"re:.*\.kv_b_proj$"))
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}


def make_weights(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    weights["lm_head.weight"] = torch.randn(64, 33, generator=generator).to(dtype)
    weights[NORM] = torch.rand(33, generator=generator)
    return weights


def write_source(directory: Path, *shards: dict[str, torch.Tensor], **settings: object) -> Path:
    """With a tokenizer, and a file in a folder."""
    write_checkpoint(directory, *shards)
    (directory / "config.json").write_text(json.dumps({"model_type": "deepseek_v32", **settings}))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "encoding").mkdir()
    (directory / "encoding" / "notes.txt").write_bytes(bytes(range(256)))
    return directory


def split_weights(weights: dict[str, torch.Tensor], num_shards: int) -> list[dict[str, torch.Tensor]]:
    names = list(weights)
    return [{name: weights[name] for name in names[start::num_shards]} for start in range(num_shards)]


def make_fp8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As DeepSeek publishes it: linears in FP8 with ue8m0 scales, all else as it is."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if name in SHAPES:
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_fp8_block(weight.float())
        else:
            tensors[name] = weight
    return tensors


def convert(
    source: Path,
    destination: Path,
    *,
    target: CheckpointQuantization = TARGET,
    num_threads: int = 2,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
) -> tuple[TensorReport, ...]:
    options = ConversionOptions(
        source=source,
        destination=destination,
        target=target,
        num_threads=num_threads,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )
    return convert_checkpoint(options, lambda progress: None)


def load_converted(directory: Path) -> dict[str, torch.Tensor]:
    index: dict[str, str] = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(index.values())):
        tensors |= load_file(directory / shard)
    assert tensors.keys() == index.keys()
    return tensors


def read_tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def run_in_child(action: Callable[[], None]) -> int:
    """Fork, run, and return the child's wait status: a place for limits and deaths. Errors go to stderr."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    exit_code = 1
    try:
        action()
        exit_code = 0
    finally:
        os._exit(exit_code)
    raise AssertionError("not reached")
