"""DeepSeek's FP8 block format: float8_e4m3fn weights with one fp32 scale per block of 128 x 128.

It turns such a weight back into bf16 or fp32, on the device where the weight lies. It does not compute in FP8 and reads
no files. Invariant: ``out[r, c] = weight[r, c] * scale_inv[r // 128, c // 128]``, the product taken in fp32; the last
block of a row or column may be ragged (``kv_a_proj_with_mqa`` has 576 rows: four blocks and a half).
"""

import torch

from argosy.quantization.stored_tensors import scale_inv_shape

DEFAULT_BLOCK_SIZE = (128, 128)


def dequantize_fp8_block(
    weight: torch.Tensor,
    scale_inv: torch.Tensor,
    dtype: torch.dtype,
    block_size: tuple[int, int] = DEFAULT_BLOCK_SIZE,
) -> torch.Tensor:
    """The weight as a new ``dtype`` tensor.

    Args:
        weight: [N, K] float8_e4m3fn.
        scale_inv: [ceil(N / 128), ceil(K / 128)] f32, same device; positive and finite.

    Raises:
        ValueError: a wrong dtype or shape, or a scale that is not a positive finite number.
    """
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    dequantize_fp8_block_into(out, weight, scale_inv, block_size)
    return out


def dequantize_fp8_block_into(
    out: torch.Tensor,
    weight: torch.Tensor,
    scale_inv: torch.Tensor,
    block_size: tuple[int, int] = DEFAULT_BLOCK_SIZE,
    origin: tuple[int, int] = (0, 0),
) -> None:
    """As ``dequantize_fp8_block``, but written to ``out`` [N, K], which may be a view and have any float dtype.

    Temporary memory is one row of blocks in fp32, not a second copy of the weight. A part of a weight that begins
    inside a block says where: ``origin`` is its corner's place in its first block, and ``scale_inv`` holds the scales
    of the blocks that it touches.
    """
    _check(weight, scale_inv, block_size, origin)
    num_rows, num_columns = weight.shape
    # One scale per row block and *column*: repeating only the columns costs 1/32 of the weight and fits ragged blocks.
    column_scale = scale_inv.repeat_interleave(block_size[1], dim=1)[:, origin[1] : origin[1] + num_columns]
    for block, start in enumerate(range(-origin[0], num_rows, block_size[0])):
        rows = slice(max(start, 0), min(start + block_size[0], num_rows))
        out[rows] = (
            weight[rows].float() * column_scale[block]
        )  # NOTE(numerics): fp32 product, one rounding to out.dtype


def _check(weight: torch.Tensor, scale_inv: torch.Tensor, block_size: tuple[int, int], origin: tuple[int, int]) -> None:
    if weight.dtype != torch.float8_e4m3fn or weight.dim() != 2:
        raise ValueError(
            f"an FP8 block weight must be 2-dimensional float8_e4m3fn, got {list(weight.shape)} {weight.dtype}"
        )
    expected = scale_inv_shape((weight.shape[0] + origin[0], weight.shape[1] + origin[1]), block_size)
    if scale_inv.dtype != torch.float32 or tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"weight_scale_inv of a {list(weight.shape)} weight in blocks of {list(block_size)} must be "
            f"{list(expected)} float32, got {list(scale_inv.shape)} {scale_inv.dtype}"
        )
    is_bad = ~(torch.isfinite(scale_inv) & (scale_inv > 0))
    if bool(is_bad.any()):  # NOTE(sync): at load time only
        row, column = is_bad.nonzero()[0].tolist()
        raise ValueError(
            f"weight_scale_inv[{row}, {column}] is {scale_inv[row, column].item()}; "
            "every scale must be positive and finite"
        )
