"""Reads a safetensors checkpoint straight into a model's parameters.

The plan (``weight_plan.py``) decides and checks where everything goes before a byte of data is read; this file only
copies. It knows no model and never unpickles. Invariant: beside the model, memory holds one tensor at a time (shards
are mapped, not read), and when ``load_weights`` returns, every parameter was filled exactly once.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from argosy.quantization.fp8_block import DEFAULT_BLOCK_SIZE, dequantize_fp8_block, dequantize_fp8_block_into
from argosy.quantization.safetensors_headers import TensorHeader, read_headers
from argosy.quantization.weight_plan import SCALE_SUFFIX, WeightCopy, WeightMapping, map_to_same_name, plan_weights


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far a load is; bytes as they lie in the files, without those of scales."""

    num_tensors: int
    num_bytes: int
    total_tensors: int
    total_bytes: int


ProgressCallback = Callable[[LoadProgress], None]


@torch.inference_mode()  # parameters may have been made in inference mode, and may be filled in it only
def load_weights(
    model: nn.Module,
    directory: Path,
    *,
    mapping: WeightMapping = map_to_same_name,
    block_size: tuple[int, int] = DEFAULT_BLOCK_SIZE,
    on_progress: ProgressCallback | None = None,
) -> None:
    """Fill every parameter and persistent buffer of ``model`` in place, converting to the dtype and device it has.

    Args:
        mapping: where each tensor goes; None from it means that the tensor is left alone.
        block_size: of FP8 weights, ``quantization_config.weight_block_size``.
        on_progress: called once before the first tensor and after every tensor.

    Raises:
        ValueError: anything wrong with the checkpoint, naming tensor, expected and found. Headers, names, shapes and
            dtypes are checked before the first parameter is written; scale values only when they are read.
        RuntimeError: a file that cannot be read.
    """
    parameters = model.state_dict()  # shares memory with the model
    on_meta = [name for name, parameter in parameters.items() if parameter.is_meta]
    assert not on_meta, f"parameters without memory cannot be filled: {on_meta[:3]}"
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    headers = read_headers(directory)
    plan = plan_weights(headers, shapes, mapping, block_size)
    total_bytes = sum(copy.header.num_bytes for copy in plan)
    progress = LoadProgress(0, 0, len(plan), total_bytes)
    report = on_progress or _ignore_progress
    report(progress)
    for file, copies in itertools.groupby(plan, key=lambda copy: copy.header.file):
        with _ShardReader(file) as shard:
            for copy in copies:
                _fill(parameters[copy.parameter_name], copy, shard, block_size)
                progress = LoadProgress(
                    progress.num_tensors + 1, progress.num_bytes + copy.header.num_bytes, len(plan), total_bytes
                )
                report(progress)


class _ShardReader:
    """One mapped shard; tensors are views of its pages, so their bytes are read when they are copied."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._handle = safe_open(file, framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise RuntimeError(f"cannot read {file}: {error}; download it again") from error

    def __enter__(self) -> "_ShardReader":
        self._handle.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.__exit__(*exception)

    def read(self, name: str, header: TensorHeader) -> torch.Tensor:
        """Tensor ``name``; from another shard too, for a weight whose scales were written there."""
        if header.file == self._file:
            tensor: torch.Tensor = self._handle.get_tensor(name)
            return tensor
        with _ShardReader(header.file) as other:
            return other.read(name, header).clone()


def _fill(parameter: torch.Tensor, copy: WeightCopy, shard: _ShardReader, block_size: tuple[int, int]) -> None:
    target = parameter[copy.index]
    tensor = shard.read(copy.tensor_name, copy.header)
    if copy.scale is None:
        target.copy_(tensor[copy.source])
        return
    scale_name = copy.tensor_name + SCALE_SUFFIX
    # One byte per weight goes to the device, and is widened there.
    weight = tensor.to(target.device)
    scale_inv = shard.read(scale_name, copy.scale).to(target.device)
    try:
        if copy.source:
            # Blocks are counted from the whole tensor's corner, so it is dequantised before it is cut.
            target.copy_(dequantize_fp8_block(weight, scale_inv, target.dtype, block_size)[copy.source])
        else:
            dequantize_fp8_block_into(target, weight, scale_inv, block_size)
    except ValueError as error:
        raise ValueError(f"tensor {copy.tensor_name!r} in {copy.header.file.name}: {error}") from error


def _ignore_progress(progress: LoadProgress) -> None:
    """The null twin of a progress bar."""
