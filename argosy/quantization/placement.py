"""Turns a tensor's bytes, as a checkpoint stores them, into a parameter's numbers.

It converts, dequantises and checks scales; it reads no files and decides nothing (``weight_plan.py`` has). Invariant:
what a parameter gets does not depend on the pieces in which a tensor arrived, nor on how many ranks share it.
"""

import torch

from argosy.quantization.fp8_block import dequantize_fp8_block_into
from argosy.quantization.quantize_weight import dequantize_per_channel
from argosy.quantization.tensor_boxes import Box, Span
from argosy.quantization.weight_plan import ParameterSpec, TensorPart, WeightCopy

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def spec_of(parameter: torch.Tensor) -> ParameterSpec:
    return ParameterSpec(tuple(parameter.shape), _DTYPE_NAMES[parameter.dtype])


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, to be written to."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def place(
    target: torch.Tensor, stored: torch.Tensor, copy: WeightCopy, box: Box, scale: torch.Tensor | None = None
) -> None:
    """Write one piece of ``copy`` to its place.

    Args:
        target: the piece's place in the parameter; any strides, any device.
        stored: the piece in the checkpoint's dtype, on the CPU.
        box: what of the checkpoint's tensor the piece is.
        scale: f32, of all of ``copy``, on ``target``'s device; None: nothing to dequantise.
    """
    arrived = stored.to(target.device)  # as it is stored, which is the smallest; it is widened there
    if scale is None:
        target.copy_(arrived if arrived.shape == target.shape else arrived.view(target.shape))
        return
    assert copy.scale is not None and copy.blocks is not None
    (first_row, _), (first_column, _) = box
    needed = [_inside(span, whole) for span, whole in zip(copy.blocks.covering(box), copy.scale.box, strict=True)]
    scale = scale[tuple(needed)]
    blocks = copy.blocks
    if blocks.num_columns is None:
        target.copy_(dequantize_per_channel(arrived, scale, target.dtype).view(target.shape))
        return
    origin = (first_row % blocks.num_rows, first_column % blocks.num_columns)
    out = target.view(arrived.shape) if target.shape != arrived.shape else target
    dequantize_fp8_block_into(out, arrived, scale, (blocks.num_rows, blocks.num_columns), origin)


def check_scales(scale: torch.Tensor, part: TensorPart) -> None:
    """``scale``: the numbers of ``part``, on the CPU.

    Raises:
        ValueError: one that is not a positive finite number, by its place in the checkpoint's tensor.
    """
    if not scale.numel():
        return
    numbers = scale.float()
    low, high = torch.aminmax(numbers)
    if low.item() > 0.0 and high.item() < float("inf"):  # a NaN is neither
        return
    is_bad = ~(torch.isfinite(numbers) & (numbers > 0))
    place = is_bad.nonzero()[0].tolist()
    shown = ", ".join(str(start + idx) for (start, _), idx in zip(part.box, place, strict=True))
    weight_name, _, suffix = part.tensor_name.rpartition("_scale")
    raise ValueError(
        f"tensor {weight_name!r} in {part.header.file.name}: weight_scale{suffix}[{shown}] is "
        f"{numbers[tuple(place)].item()}; every scale must be positive and finite"
    )


def check_zeros(offset: torch.Tensor, part: TensorPart) -> None:
    """Raises ValueError for an offset that is not 0: weights are symmetric here."""
    is_bad = offset != 0
    if bool(is_bad.any()):
        place = is_bad.nonzero()[0].tolist()
        shown = ", ".join(str(start + idx) for (start, _), idx in zip(part.box, place, strict=True))
        raise ValueError(
            f"tensor {part.tensor_name!r} in {part.header.file.name}: [{shown}] is {offset[tuple(place)].item()}, but "
            "offsets must be 0: weights are quantised symmetrically here; convert the original checkpoint again with "
            "symmetric weights, or with `argosy quantize`"
        )


def _inside(span: Span, whole: Span) -> slice:
    return slice(span[0] - whole[0], span[1] - whole[0])
