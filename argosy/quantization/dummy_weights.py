"""Random weights of a checkpoint's shapes, for measuring a model that is not at hand.

It makes them tensor by tensor where they are wanted, so a 671B model's share of a rank is there in seconds. Invariant:
a number depends on the seed, the tensor's name and its place alone, so every topology holds parts of the same model
(on devices of one kind: random streams differ between kinds).
"""

import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from argosy.quantization.fp8_block import DEFAULT_BLOCK_SIZE
from argosy.quantization.safetensors_headers import TensorHeader
from argosy.quantization.weight_plan import WeightMapping, plan_weights


@torch.inference_mode()
def fill_with_dummy_weights(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], mapping: WeightMapping, *, seed: int = 0
) -> None:
    """Fill every parameter of ``model`` in place. ``shapes``: of the checkpoint's tensors, by their names there.

    Matrices are normal with variance 1 / in_features, so that activations keep their size and routing spreads; norms
    are 1, biases 0.

    Raises:
        ValueError: shapes that do not fill the model.
    """
    parameters = model.state_dict()
    headers = {name: TensorHeader(shape, "BF16", Path("dummy"), 0, 0) for name, shape in shapes.items()}
    parameter_shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for copy in plan_weights(headers, parameter_shapes, mapping, DEFAULT_BLOCK_SIZE):
        target = parameters[copy.parameter_name][copy.index]
        if len(copy.header.shape) == 1:
            target.fill_(0.0 if copy.tensor_name.endswith("bias") else 1.0)
            continue
        generator = torch.Generator(target.device).manual_seed(zlib.crc32(f"{seed} {copy.tensor_name}".encode()))
        whole = torch.empty(copy.header.shape, dtype=target.dtype, device=target.device)
        whole.normal_(std=1.0 / math.sqrt(copy.header.shape[-1]), generator=generator)
        target.copy_(whole[copy.source])
