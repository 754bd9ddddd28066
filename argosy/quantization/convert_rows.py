"""The arithmetic of a conversion, on a few rows at a time: bytes of the source in, bytes of the output out.

It reads and writes no files; rows are independent, so any split of a tensor into pieces gives the same bytes.
Invariant: what it makes equals ``quantize_per_channel`` of the dequantised rows bit by bit.
"""

from dataclasses import dataclass

import numpy as np
import torch

from argosy.quantization.quantize_weight import INT8_MAX, MIN_AMAX, check_amax

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Numbers that are worked on at once. Fewer would stay in a smaller cache, but Python's share of the time grows: 128 Ki
# take a quarter more time than 384 Ki on a Xeon with 2 MiB of second cache a core.
CHUNK_ELEMENTS = 384 * 1024

# e4m3 and IEEE half have the same order of sign, exponent and mantissa: shifted into place, a code reads as a half that
# is 2^-8 of its value (the exponents' biases are 7 and 15). Exact for all codes, subnormals included.
_E4M3_SHIFT = 128  # 2^7, as a product: torch's shifts are not vectorised everywhere
_E4M3_WITHOUT_COPIED_SIGN = -0x4001  # 0xBFFF: widening to 16 bits copied the sign into the bit below it
_E4M3_RESCALE = 256.0
_E4M3_NAN = 0x7F  # with either sign


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """Of a tensor or a part of it: sums of squares, in float64."""

    weight_sq: float
    error_sq: float


class RowQuantizer:
    """Rows of one tensor, added a few at a time, quantised exactly as ``quantize_per_channel`` does.

    A few rows are a few hundred microseconds of arithmetic, so what is small is done once, in ``finish``, and memory
    that is warm in a cache is used again.
    """

    def __init__(self, num_rows: int, num_columns: int) -> None:
        self.quantized = torch.empty(num_rows, num_columns, dtype=torch.int8)
        self.scale = torch.empty(num_rows, 1)
        # Per row; the norms are in units of scale.
        self._amax, self._weight_norm, self._error_norm = (torch.empty(num_rows, 1) for _ in range(3))
        self._scratch = torch.empty(0)

    def add(self, start: int, numbers: torch.Tensor, known_amax: torch.Tensor | None = None) -> None:
        """``numbers: [n, K]`` f32, destroyed: rows from ``start`` on. ``known_amax: [n, 1]``, if it is known."""
        rows = slice(start, start + numbers.shape[0])
        if self._scratch.shape[:1] < numbers.shape[:1]:
            self._scratch = torch.empty_like(numbers)
        scratch, amax, scale = self._scratch[: numbers.shape[0]], self._amax[rows], self.scale[rows]
        if known_amax is None:
            # On a CPU, amax and amin together take a tenth of aminmax's time. A NaN survives both.
            torch.amin(numbers, dim=1, keepdim=True, out=scale)
            torch.amax(numbers, dim=1, keepdim=True, out=amax)
            torch.maximum(amax, scale.neg_(), out=amax)
        else:
            amax.copy_(known_amax)
        torch.clamp(amax, min=MIN_AMAX, out=scale).div_(INT8_MAX)
        numbers.div_(scale)  # NOTE(numerics): a division, as in quantize_per_channel
        torch.round(numbers, out=scratch)
        self.quantized[rows].copy_(scratch)
        torch.linalg.vector_norm(numbers, dim=1, keepdim=True, out=self._weight_norm[rows])
        torch.linalg.vector_norm(scratch.sub_(numbers), dim=1, keepdim=True, out=self._error_norm[rows])

    def finish(self, first_row: int) -> ErrorSums:
        """When all rows were added. ``first_row``: the number of row 0 in its tensor, for the message.

        Raises:
            ValueError: a NaN or an infinity.
        """
        check_amax(self._amax, first_row)
        scale = self.scale.double()
        weight_sq = (self._weight_norm.double() * scale).square().sum()
        error_sq = (self._error_norm.double() * scale).square().sum()
        return ErrorSums(float(weight_sq), float(error_sq))


def round_rows(numbers: torch.Tensor, out: torch.Tensor, first_row: int) -> None:
    """``numbers: [n, K]`` f32 are rounded once into ``out``.

    Raises:
        ValueError: a NaN or an infinity; rows are counted from ``first_row``.
    """
    if numbers.numel():
        check_amax(numbers.abs().amax(dim=1, keepdim=True), first_row)
    out.copy_(numbers)


def decode_float(source: np.ndarray, dtype: str, out: torch.Tensor) -> None:
    """The bytes of BF16, F16 or F32 rows -> ``out: [n, K]`` f32."""
    out.copy_(torch.from_numpy(source).view(TORCH_DTYPES[dtype]).view(out.shape))


class FP8Decoder:
    """Decodes e4m3 rows, a few at a time, through memory that it keeps.

    Forty times faster on a CPU than torch's own conversion, and equal to it.
    """

    def __init__(self, max_rows: int, num_columns: int) -> None:
        self._halves = torch.empty(max_rows, num_columns, dtype=torch.int16)
        self._magnitudes = np.empty(max_rows * num_columns, dtype=np.uint8)

    def decode(
        self, source: np.ndarray, out: torch.Tensor, scale_row: torch.Tensor, block_columns: int
    ) -> torch.Tensor:
        """The bytes of rows that lie in one row of blocks -> ``out: [n, K]`` f32: code * scale in float32.

        Args:
            scale_row: [ceil(K / block_columns)] f32.

        Returns:
            The largest absolute value of each row, [n, 1]. Codes without their sign have the order of their values, so
            it is found among bytes, a block at a time.

        Raises:
            ValueError: a NaN code; it would decode as a number.
        """
        if source.size == 0:
            return out.new_zeros(out.shape[0], 1)
        magnitudes = np.bitwise_and(source, _E4M3_NAN, out=self._magnitudes[: source.size]).reshape(out.shape)
        largest = _max_of_blocks(magnitudes, block_columns)  # [n, blocks]
        if int(largest.max()) == _E4M3_NAN:
            raise ValueError("a weight is NaN; weights must be finite")
        halves = self._halves[: out.shape[0]]
        halves.copy_(torch.from_numpy(source).view(torch.int8).view(out.shape))
        halves.mul_(_E4M3_SHIFT).bitwise_and_(_E4M3_WITHOUT_COPIED_SIGN)
        out.copy_(halves.view(torch.float16))
        _scale_blocks(out, scale_row * _E4M3_RESCALE, block_columns)  # a power of two, so one rounding is left
        values = largest.view(torch.float8_e4m3fn).float()
        return values.mul_(scale_row).amax(dim=1, keepdim=True)


def check_finite(source: np.ndarray, dtype: str) -> None:
    """Raises ValueError for a NaN or an infinity among the bytes of BF16, F16 or F32 numbers."""
    numbers = torch.from_numpy(source).view(TORCH_DTYPES[dtype])
    is_finite = torch.isfinite(numbers)
    if not bool(is_finite.all()):
        raise ValueError(f"a number is {numbers[int((~is_finite).nonzero()[0])].item()}; weights must be finite")


def _max_of_blocks(rows: np.ndarray, block_columns: int) -> torch.Tensor:
    """``rows: [n, K]`` -> [n, ceil(K / block_columns)] uint8."""
    num_rows, num_columns = rows.shape
    if num_columns % block_columns:
        return torch.from_numpy(np.maximum.reduceat(rows, range(0, num_columns, block_columns), axis=1))
    # A quarter of numpy's time.
    return torch.from_numpy(rows).view(num_rows, num_columns // block_columns, block_columns).amax(dim=2)


def _scale_blocks(out: torch.Tensor, scale: torch.Tensor, block_columns: int) -> None:
    num_rows, num_columns = out.shape
    num_blocks = scale.shape[0]
    if num_blocks * block_columns == num_columns:
        out.view(num_rows, num_blocks, block_columns).mul_(scale[:, None])
    else:
        out.mul_(scale.repeat_interleave(block_columns)[:num_columns])
