"""Converts one piece of one tensor: reads its bytes, converts them, writes them to their place in the output file.

A piece is as many rows as fit into a fixed number of bytes, so memory does not grow with the model. Invariant: the
output is the same bytes however a tensor is cut into pieces and whichever thread takes which.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from argosy.quantization.conversion_plan import Action, Conversion
from argosy.quantization.convert_rows import (
    CHUNK_ELEMENTS,
    TORCH_DTYPES,
    ErrorSums,
    FP8Decoder,
    RowQuantizer,
    check_finite,
    decode_float,
    round_rows,
)
from argosy.quantization.file_pieces import NewFile, SourceFiles
from argosy.quantization.safetensors_headers import DTYPE_BYTES

PIECE_BYTES = 8 * 2**20  # read at once by a thread: large enough for any disk, small beside torch itself

# The number of the first row, rows [n, K] f32, and where it is known already the amax of each [n, 1].
Chunk = tuple[int, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a 2-dimensional tensor, or bytes of one that is copied."""

    conversion: Conversion
    start: int
    stop: int

    @property
    def num_source_bytes(self) -> int:
        if self.conversion.action is Action.COPY:
            return self.stop - self.start
        return (self.stop - self.start) * _row_bytes(self.conversion)


def split(conversion: Conversion) -> Iterator[Piece]:
    """At least one piece, also of an empty tensor."""
    if conversion.action is Action.COPY:
        total, step = conversion.source.num_bytes, PIECE_BYTES
    else:
        total, step = conversion.source.shape[0], max(1, PIECE_BYTES // max(1, _row_bytes(conversion)))
    for start in range(0, max(total, 1), step):
        yield Piece(conversion, start, min(start + step, total))


def convert_piece(
    piece: Piece, block_size: tuple[int, int], source: SourceFiles, destination: NewFile
) -> ErrorSums | None:
    """The errors made, of a quantised piece.

    Raises:
        ValueError: a NaN or an infinity, or an FP8 scale that is not a positive finite number; naming the tensor.
        RuntimeError: a file that cannot be read or written.
    """
    conversion = piece.conversion
    if piece.start == piece.stop:  # an empty tensor
        return ErrorSums(0.0, 0.0) if conversion.action is Action.QUANTIZE else None
    header = conversion.source
    stride = 1 if conversion.action is Action.COPY else _row_bytes(conversion)
    data = source.read(header.file, header.start_byte + piece.start * stride, piece.num_source_bytes)
    try:
        if conversion.action is Action.COPY:
            if header.dtype in TORCH_DTYPES:
                check_finite(data, header.dtype)
            destination.write(data, conversion.start_byte + piece.start)
            return None
        scales = _read_scales(piece, block_size, source)
        if conversion.action is Action.DEQUANTIZE:
            _write_dequantized(piece, _decode_chunks(piece, data, scales, block_size), destination)
            return None
        return _write_quantized(piece, _decode_chunks(piece, data, scales, block_size), destination)
    except ValueError as error:
        raise ValueError(f"tensor {conversion.name!r} in {header.file}: {error}") from error


def _read_scales(piece: Piece, block_size: tuple[int, int], source: SourceFiles) -> torch.Tensor | None:
    """The rows of blocks that the piece meets, [blocks, ceil(K / block)] f32."""
    header = piece.conversion.source_scale
    if header is None:
        return None
    first, last = piece.start // block_size[0], (piece.stop - 1) // block_size[0]
    width = header.shape[1]
    data = source.read(header.file, header.start_byte + 4 * first * width, 4 * (last + 1 - first) * width)
    scales = torch.from_numpy(data).view(torch.float32).view(last + 1 - first, width)
    is_bad = ~(torch.isfinite(scales) & (scales > 0))
    if bool(is_bad.any()):
        row, column = is_bad.nonzero()[0].tolist()
        raise ValueError(
            f"weight_scale_inv[{first + row}, {column}] is {scales[row, column].item()}; every scale must be positive "
            "and finite"
        )
    return scales


def _decode_chunks(
    piece: Piece, data: np.ndarray, scales: torch.Tensor | None, block_size: tuple[int, int]
) -> Iterator[Chunk]:
    """The piece's rows in float32, a few at a time.

    Every next chunk takes the memory of the one before.
    """
    header = piece.conversion.source
    num_columns, row_bytes = header.shape[1], _row_bytes(piece.conversion)
    step = max(1, CHUNK_ELEMENTS // max(1, num_columns))
    if scales is not None:  # equal parts of a block's rows, for a chunk of two rows costs as much as one of twenty
        step = -(-block_size[0] // -(-block_size[0] // step))
    max_rows = min(step, piece.stop - piece.start)
    buffer = torch.empty(max_rows, num_columns)
    fp8 = FP8Decoder(0 if scales is None else max_rows, num_columns)
    start = piece.start
    while start < piece.stop:
        stop = min(start + step, piece.stop)
        if scales is not None:  # a chunk has one row of scales
            stop = min(stop, (start // block_size[0] + 1) * block_size[0])
        data_rows = data[(start - piece.start) * row_bytes : (stop - piece.start) * row_bytes]
        numbers = buffer[: stop - start]
        amax = None
        if scales is None:
            decode_float(data_rows, header.dtype, numbers)
        else:
            scale_row = scales[start // block_size[0] - piece.start // block_size[0]]
            amax = fp8.decode(data_rows, numbers, scale_row, block_size[1])
        yield start, numbers, amax
        start = stop


def _write_quantized(piece: Piece, chunks: Iterator[Chunk], destination: NewFile) -> ErrorSums:
    conversion = piece.conversion
    assert conversion.scale_start_byte is not None
    num_columns = conversion.source.shape[1]
    rows = RowQuantizer(piece.stop - piece.start, num_columns)
    for first_row, numbers, amax in chunks:
        rows.add(first_row - piece.start, numbers, amax)
    errors = rows.finish(piece.start)
    destination.write(rows.quantized.numpy(), conversion.start_byte + piece.start * num_columns)
    destination.write(rows.scale.numpy(), conversion.scale_start_byte + 4 * piece.start)
    return errors


def _write_dequantized(piece: Piece, chunks: Iterator[Chunk], destination: NewFile) -> None:
    conversion = piece.conversion
    num_columns = conversion.source.shape[1]
    out = torch.empty(piece.stop - piece.start, num_columns, dtype=torch.bfloat16)
    for first_row, numbers, _ in chunks:
        start = first_row - piece.start
        round_rows(numbers, out[start : start + numbers.shape[0]], first_row)
    data = out.view(torch.uint8).numpy()
    destination.write(data, conversion.start_byte + piece.start * num_columns * out.element_size())


def add_errors(parts: list[ErrorSums]) -> ErrorSums:
    """Rounded once, so that the order in which threads finish does not show."""
    return ErrorSums(math.fsum(part.weight_sq for part in parts), math.fsum(part.error_sq for part in parts))


def _row_bytes(conversion: Conversion) -> int:
    return conversion.source.shape[1] * DTYPE_BYTES[conversion.source.dtype]
