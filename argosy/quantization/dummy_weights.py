"""Random weights of a checkpoint's shapes, for measuring a model that is not at hand (``--load-format dummy``).

It draws them in chunks of rows where they are wanted, so a rank that holds a 16th of a 671B model needs no more memory
than its share. Which number formats they have, the model's parameters say. Invariant: a number depends on the seed, the
tensor's name, its place and its format alone, so every topology holds parts of the same model (on devices of one kind:
random streams differ between kinds).
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from argosy.quantization.fp8_block import DEFAULT_BLOCK_SIZE
from argosy.quantization.load_progress import ProgressCallback, ProgressCounter
from argosy.quantization.placement import spec_of
from argosy.quantization.safetensors_headers import TensorHeader
from argosy.quantization.stored_tensors import (
    FP8_DTYPE,
    INT8_DTYPE,
    SCALE_INV_SUFFIX,
    SCALE_SUFFIX,
    ScaleBlocks,
    companion_suffix,
)
from argosy.quantization.weight_plan import ParameterSpec, TensorPart, WeightMapping, plan_weights

CHUNK_NUMBERS = 1 << 22  # drawn at once

_INT8_LIMIT = 127  # INT8 weights are uniform in [-127, 127] ...
_INT8_STD = math.sqrt(_INT8_LIMIT * (_INT8_LIMIT + 1) / 3)  # ... and this is their standard deviation


@torch.inference_mode()
def fill_with_dummy_weights(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    mapping: WeightMapping,
    *,
    block_size: tuple[int, int] = DEFAULT_BLOCK_SIZE,
    seed: int = 0,
    on_progress: ProgressCallback | None = None,
) -> None:
    """Fill every parameter of ``model`` in place. ``shapes``: of the checkpoint's tensors, by their names there,
    without scales.

    Matrices have variance 1 / in_features, so that activations keep their size and routing spreads; of quantised ones
    the product with their scale has. Norms are 1, biases 0.

    Raises:
        ValueError: shapes that do not fill the model.
    """
    parameters = model.state_dict()
    specs = {name: spec_of(parameter) for name, parameter in parameters.items()}
    headers = dummy_headers(shapes, specs, mapping, block_size)
    plan = plan_weights(headers, specs, mapping, block_size)
    progress = ProgressCounter(plan, on_progress)
    for copy in plan:
        target, name = parameters[copy.parameter_name][copy.index], copy.part.tensor_name
        if copy.is_scale:
            suffix = companion_suffix(name)
            assert suffix is not None
            weight = headers[name.removesuffix(suffix)]
            target.fill_(_std(weight.shape) / (_INT8_STD if weight.dtype == INT8_DTYPE else 1.0))
        elif len(copy.part.header.shape) == 1:
            target.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            _fill_matrix(target, copy.part, seed)
        progress.advance(copy)


def dummy_headers(
    shapes: Mapping[str, tuple[int, ...]],
    parameters: Mapping[str, ParameterSpec],
    mapping: WeightMapping,
    block_size: tuple[int, int] = DEFAULT_BLOCK_SIZE,
) -> dict[str, TensorHeader]:
    """The headers that a checkpoint of ``shapes`` would have if it were stored as ``parameters`` hold it."""
    headers: dict[str, TensorHeader] = {}
    for name, shape in shapes.items():
        destination = mapping(name)
        parameter = None if destination is None else parameters.get(destination.parameter_name)
        dtype = "BF16" if parameter is None else parameter.dtype
        headers[name] = _header(shape, dtype)
        if dtype == INT8_DTYPE:
            headers[name + SCALE_SUFFIX] = _header((shape[0], 1), "F32")
        elif dtype == FP8_DTYPE:
            headers[name + SCALE_INV_SUFFIX] = _header(ScaleBlocks(*block_size).scale_shape(shape), "F32")
    return headers


def _header(shape: tuple[int, ...], dtype: str) -> TensorHeader:
    return TensorHeader(shape, dtype, Path("dummy"), 0, 0)


def _fill_matrix(target: torch.Tensor, part: TensorPart, seed: int) -> None:
    """``target``: [rows, columns] of ``part``. Chunks are of the whole tensor, wherever a rank's part begins."""
    num_rows, num_columns = part.header.shape
    (first, last), columns = part.box
    rows_per_chunk = max(1, CHUNK_NUMBERS // num_columns)
    generator = torch.Generator(target.device)
    for start in range(first // rows_per_chunk * rows_per_chunk, last, rows_per_chunk):
        shape = (min(rows_per_chunk, num_rows - start), num_columns)
        generator.manual_seed(_hash(f"{seed} {part.tensor_name} {start}"))
        chunk = _draw(shape, target, generator, _std(part.header.shape))
        low, high = max(first, start), min(last, start + shape[0])
        target[low - first : high - first].copy_(chunk[low - start : high - start, slice(*columns)])


def _draw(shape: tuple[int, int], like: torch.Tensor, generator: torch.Generator, std: float) -> torch.Tensor:
    """Numbers as ``like`` holds them; of quantised formats, before their scale."""
    if like.dtype == torch.int8:
        numbers = torch.empty(shape, dtype=torch.int8, device=like.device)
        return numbers.random_(-_INT8_LIMIT, _INT8_LIMIT + 1, generator=generator)
    if like.dtype == torch.float8_e4m3fn:
        normal = torch.empty(shape, dtype=torch.bfloat16, device=like.device).normal_(generator=generator)
        return normal.to(torch.float8_e4m3fn)
    return torch.empty(shape, dtype=like.dtype, device=like.device).normal_(std=std, generator=generator)


def _std(shape: tuple[int, ...]) -> float:
    return 1.0 / math.sqrt(shape[-1])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
