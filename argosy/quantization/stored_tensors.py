"""How one tensor is stored in a checkpoint: plain, or quantised with companion tensors beside it.

The companions are told by their names: ``X_scale_inv`` holds the scales of DeepSeek's FP8 blocks, ``X_scale`` those of
INT8 rows (compressed-tensors, ModelSlim), ``X_offset`` ModelSlim's zero points, which must be zero. It reads headers
alone and imports no torch. Invariant: a ``StoredTensor`` that was returned has every companion that its dtype needs, in
a shape and dtype that can be read.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from argosy.quantization.safetensors_headers import TensorHeader
from argosy.quantization.tensor_boxes import Box, Span

PLAIN_DTYPES = ("BF16", "F16", "F32")
FP8_DTYPE = "F8_E4M3"
INT8_DTYPE = "I8"
SCALE_INV_SUFFIX = "_scale_inv"  # DeepSeek's FP8 weights: X.weight has its scales in X.weight_scale_inv
SCALE_SUFFIX = "_scale"  # INT8 weights: one scale per output channel
OFFSET_SUFFIX = "_offset"

_SCALE_DTYPES = {FP8_DTYPE: ("F32", "F8_E8M0"), INT8_DTYPE: ("F32", "BF16")}
_SCALE_SUFFIXES = {FP8_DTYPE: SCALE_INV_SUFFIX, INT8_DTYPE: SCALE_SUFFIX}
_OFFSET_DTYPES = (*PLAIN_DTYPES, "I8", "I32")
_COMPANIONS = {SCALE_INV_SUFFIX: FP8_DTYPE, SCALE_SUFFIX: INT8_DTYPE, OFFSET_SUFFIX: INT8_DTYPE}
_COMPANION_SUFFIXES = tuple(_COMPANIONS)


@dataclass(frozen=True, slots=True)
class ScaleBlocks:
    """The blocks of a matrix that share a scale: ``num_columns`` None means whole rows."""

    num_rows: int
    num_columns: int | None

    def scale_shape(self, weight_shape: tuple[int, ...]) -> tuple[int, int]:
        """One scale for every block that a matrix starts, so a ragged last block has one too."""
        num_rows, num_columns = weight_shape
        return -(-num_rows // self.num_rows), 1 if self.num_columns is None else -(-num_columns // self.num_columns)

    def covering(self, box: Box) -> Box:
        """The scales that the part ``box`` of a matrix needs."""
        rows, columns = box
        return _covering(rows, self.num_rows), (0, 1) if self.num_columns is None else _covering(
            columns, self.num_columns
        )


@dataclass(frozen=True, slots=True)
class Companion:
    name: str
    header: TensorHeader


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A weight and what belongs to it."""

    name: str
    header: TensorHeader
    blocks: ScaleBlocks | None = None  # of ``scale``
    scale: Companion | None = None  # None: a plain tensor
    offset: Companion | None = None


def scale_inv_shape(weight_shape: tuple[int, ...], block_size: tuple[int, int]) -> tuple[int, int]:
    """The shape of an FP8 weight's scales."""
    return ScaleBlocks(*block_size).scale_shape(weight_shape)


def companion_suffix(name: str) -> str | None:
    """What makes ``name`` the companion of another tensor; None for a weight."""
    if not name.endswith(_COMPANION_SUFFIXES):  # nearly every name, among a hundred thousand
        return None
    return next(suffix for suffix in _COMPANIONS if name.endswith(suffix))


def check_companions(headers: Mapping[str, TensorHeader]) -> None:
    """Every companion has its weight.

    Raises:
        ValueError: one that has none, or one of another dtype.
    """
    for name in headers:
        suffix = companion_suffix(name)
        if suffix is None:
            continue
        weight_name, dtype = name.removesuffix(suffix), _COMPANIONS[suffix]
        found = headers[weight_name].dtype if weight_name in headers else "no such tensor"
        if found != dtype:
            kind = "offset" if suffix == OFFSET_SUFFIX else "scale"
            raise ValueError(f"{kind} {name!r} belongs to an {dtype} tensor {weight_name!r}, but found {found}")


def find_stored_tensor(name: str, headers: Mapping[str, TensorHeader], block_size: tuple[int, int]) -> StoredTensor:
    """The weight ``name`` with its companions. ``block_size``: of FP8 weights.

    Raises:
        ValueError: a dtype that cannot be read, a scale that is missing, or one of the wrong shape or dtype.
    """
    header = headers[name]
    if header.dtype in PLAIN_DTYPES:
        return StoredTensor(name, header)
    if header.dtype not in _SCALE_SUFFIXES:
        raise ValueError(
            f"tensor {name!r} has dtype {header.dtype}; expected {', '.join(PLAIN_DTYPES)}, {INT8_DTYPE} with "
            f"{name + SCALE_SUFFIX!r}, or {FP8_DTYPE} with {name + SCALE_INV_SUFFIX!r}"
        )
    blocks = ScaleBlocks(*block_size) if header.dtype == FP8_DTYPE else ScaleBlocks(1, None)
    scale = _find_scale(name, headers, blocks)
    offset_name = name + OFFSET_SUFFIX
    if offset_name not in headers:
        return StoredTensor(name, header, blocks, scale)
    offset = headers[offset_name]
    if offset.shape != scale.header.shape or offset.dtype not in _OFFSET_DTYPES:
        raise ValueError(
            f"offset {offset_name!r} must be {list(scale.header.shape)} {' or '.join(_OFFSET_DTYPES)}, as its scale, "
            f"found {list(offset.shape)} {offset.dtype}"
        )
    return StoredTensor(name, header, blocks, scale, Companion(offset_name, offset))


def _find_scale(name: str, headers: Mapping[str, TensorHeader], blocks: ScaleBlocks) -> Companion:
    header = headers[name]
    scale_name = name + _SCALE_SUFFIXES[header.dtype]
    scale = headers.get(scale_name)
    if scale is None:
        raise ValueError(f"{header.dtype} tensor {name!r} has no scale: expected {scale_name!r} beside it")
    if len(header.shape) != 2:
        raise ValueError(f"{header.dtype} tensor {name!r} must have 2 dims to be scaled, found {list(header.shape)}")
    expected, dtypes = blocks.scale_shape(header.shape), _SCALE_DTYPES[header.dtype]
    if scale.shape != expected or scale.dtype not in dtypes:
        size = (
            "one for each row" if blocks.num_columns is None else f"blocks of {[blocks.num_rows, blocks.num_columns]}"
        )
        raise ValueError(
            f"scale {scale_name!r} must be {list(expected)} {' or '.join(dtypes)} ({size} on {list(header.shape)}), "
            f"found {list(scale.shape)} {scale.dtype}"
        )
    return Companion(scale_name, scale)


def _covering(span: Span, block: int) -> Span:
    start, stop = span
    return start // block, -(-stop // block)
