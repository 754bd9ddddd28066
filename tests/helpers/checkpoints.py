"""Writes tiny checkpoints, whole or broken, for tests.

It makes files in Hugging Face's layout from tensors; it builds no model. Invariant: ``read_headers`` accepts what it
writes, unless it was asked to break it.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

INDEX_NAME = "model.safetensors.index.json"
FP8_MAX = 448.0


def write_checkpoint(directory: Path, *shards: dict[str, torch.Tensor]) -> Path:
    """One shard: ``model.safetensors``. Several: numbered files with an index. Returns ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors")
        return directory
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        shard_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, directory / shard_name)
        weight_map |= dict.fromkeys(tensors, shard_name)
    write_index(directory, weight_map)
    return directory


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_index(directory: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((directory / INDEX_NAME).read_text())["weight_map"]
    return weight_map


def write_raw_shard(file: Path, header: dict[str, object] | bytes, data: bytes = b"") -> None:
    """A safetensors file byte by byte, so that its header can lie."""
    raw_header = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(raw_header).to_bytes(8, "little") + raw_header + data)


def quantize_fp8_block(weight: torch.Tensor, block: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight: [N, K]`` as DeepSeek stores it: float8_e4m3fn, and ue8m0 scales [ceil(N/128), ceil(K/128)] in f32."""
    num_rows, num_columns = weight.shape
    scale_inv = torch.empty(-(-num_rows // block), -(-num_columns // block))
    quantized = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scale_inv.shape[0]):
        for j in range(scale_inv.shape[1]):
            rows, columns = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            amax = weight[rows, columns].abs().max().clamp(min=1e-4)
            scale_inv[i, j] = torch.exp2(torch.ceil(torch.log2(amax / FP8_MAX)))
            quantized[rows, columns] = (weight[rows, columns] / scale_inv[i, j]).to(torch.float8_e4m3fn)
    return quantized, scale_inv
