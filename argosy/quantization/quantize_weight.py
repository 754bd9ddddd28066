"""Symmetric INT8 for weights: one float32 scale per output channel, the spec that every device follows.

It knows tensors and no files; activations are quantised by the kernels, by the same formula per token. Invariant:
``scale = max(amax(|row|), MIN_AMAX) / 127`` and ``q = round_half_even(row / scale)``, both in float32, so |q| <= 127
and ``|q * scale - w| <= scale / 2`` up to float32's own rounding.
"""

import torch

INT8_MAX = 127.0
# A row of zeros has this amax, so that its scale divides; its weights become exact zeros. Smaller rows round to zero.
MIN_AMAX = 1e-12


def quantize_per_channel(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight: [N, K]`` of any float dtype -> int8 [N, K] and the scales, f32 [N, 1], as new tensors.

    Raises:
        ValueError: a NaN or an infinity, naming its row; no columns to take a scale from.
    """
    if weight.shape[1] == 0:
        raise ValueError(f"a weight of shape {list(weight.shape)} has no columns to take a scale from")
    numbers = weight.float()
    amax = numbers.abs().amax(dim=1, keepdim=True)
    check_amax(amax)
    scale = amax.clamp_(min=MIN_AMAX) / INT8_MAX
    # NOTE(numerics): a division, not a product with 1 / scale, which would round twice. amax / scale cannot exceed
    # 127 by more than two float32 roundings, so rounding lands in [-127, 127] without a clamp.
    return (numbers / scale).round_().to(torch.int8), scale


def check_amax(amax: torch.Tensor, first_row: int = 0) -> None:
    """``amax: [N, 1]``, the largest absolute values of rows that are counted from ``first_row``.

    Raises:
        ValueError: one of them is a NaN or infinite, as it is when any number of its row is.
    """
    is_bad = ~torch.isfinite(amax)
    if bool(is_bad.any()):  # NOTE(sync): at conversion time only
        row = int(is_bad[:, 0].nonzero()[0])
        raise ValueError(f"row {first_row + row} holds {amax[row].item()}; weights must be finite")


def dequantize_per_channel(quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int8 [N, K] and [N, 1] -> [N, K] ``dtype``: the product in float32, one rounding."""
    return (quantized.float() * scale.float()).to(dtype)
