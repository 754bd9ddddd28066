"""What becomes of every tensor of a checkpoint that is converted, and where in which output file it lands.

It reads no file and touches no tensor: headers and the two formats go in, and the exact bytes of every output header
come out, so that a shard can be written in any order and a finished one can be recognised. Invariant: a pure function;
equal inputs give equal files.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from argosy.quantization.checkpoint_format import CheckpointQuantization
from argosy.quantization.safetensors_headers import DTYPE_BYTES, TensorHeader, name_some

WEIGHT_SUFFIX = ".weight"
SCALE_SUFFIX = "_scale"  # X.weight has its scales in X.weight_scale
FP8_DTYPE = "F8_E4M3"
FP8_SCALE_SUFFIX = "_scale_inv"
FLOAT_DTYPES = ("BF16", "F16", "F32")
KEPT_FP8_DTYPE = "BF16"  # what FP8 tensors become that are not quantised: a checkpoint has one quantised format

_HEADER_ALIGNMENT = 8  # safetensors pads its JSON with spaces, so that tensors lie aligned


class Action(StrEnum):
    QUANTIZE = "quantize"
    DEQUANTIZE = "dequantize"
    COPY = "copy"


@dataclass(frozen=True, slots=True)
class Conversion:
    """One source tensor on its way. Output positions are bytes from the beginning of the output file."""

    name: str
    action: Action
    source: TensorHeader
    source_scale: TensorHeader | None  # of an FP8 tensor
    start_byte: int
    num_bytes: int
    scale_start_byte: int | None  # of a quantised tensor

    @property
    def num_output_bytes(self) -> int:
        return self.num_bytes + (0 if self.scale_start_byte is None else 4 * self.source.shape[0])


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file: ``header`` is everything before the first tensor."""

    file_name: str
    header: bytes
    conversions: tuple[Conversion, ...]
    num_bytes: int  # of the file
    tensor_names: tuple[str, ...]

    @property
    def num_source_bytes(self) -> int:
        return sum(conversion.source.num_bytes for conversion in self.conversions)


def plan_conversion(
    headers: Mapping[str, TensorHeader],
    source: CheckpointQuantization,
    target: CheckpointQuantization,
    max_shard_bytes: int | None = None,
) -> tuple[ShardPlan, ...]:
    """The output files that hold all of ``headers`` in format ``target``.

    Args:
        max_shard_bytes: of tensors in one output file; None: one output file for each of the source's.

    Raises:
        ValueError: a tensor of a dtype or shape that cannot be quantised, FP8 without its scales or the reverse,
            tensors that are quantised already.
    """
    _check_not_quantized(headers, source)
    actions = {name: _choose_action(name, header, target) for name, header in headers.items()}
    scales = _find_fp8_scales(headers, source)
    ordered = sorted(
        (name for name in headers if not name.endswith(FP8_SCALE_SUFFIX)),
        key=lambda name: (headers[name].file.name, headers[name].start_byte, name),
    )
    groups = _group(ordered, headers, actions, max_shard_bytes)
    return tuple(
        _plan_shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group, headers, actions, scales)
        for number, group in enumerate(groups, start=1)
    )


def _check_not_quantized(headers: Mapping[str, TensorHeader], source: CheckpointQuantization) -> None:
    scaled = [name for name in headers if name.endswith(WEIGHT_SUFFIX + SCALE_SUFFIX)]
    integers = [name for name, header in headers.items() if name.endswith(WEIGHT_SUFFIX) and header.dtype == "I8"]
    if source.kind == "w8a8" or scaled or integers:
        found = name_some(scaled or integers) if scaled or integers else "its config.json says so"
        raise ValueError(
            f"the source is quantised to INT8 already ({found}); it can be served as it is, and converting it again "
            "would only lose accuracy: give the original checkpoint"
        )


def _choose_action(name: str, header: TensorHeader, target: CheckpointQuantization) -> Action:
    is_weight = name.endswith(WEIGHT_SUFFIX)
    if is_weight and len(header.shape) == 2 and target.is_quantized(name.removesuffix(WEIGHT_SUFFIX)):
        if header.dtype not in (*FLOAT_DTYPES, FP8_DTYPE):
            raise ValueError(
                f"tensor {name!r} in {header.file.name} is {header.dtype}; {', '.join(FLOAT_DTYPES)} and {FP8_DTYPE} "
                "can be quantised"
            )
        if header.shape[1] == 0:
            raise ValueError(f"tensor {name!r} of shape {list(header.shape)} has no columns to take a scale from")
        return Action.QUANTIZE
    return Action.DEQUANTIZE if header.dtype == FP8_DTYPE else Action.COPY


def _find_fp8_scales(headers: Mapping[str, TensorHeader], source: CheckpointQuantization) -> Mapping[str, TensorHeader]:
    """The scale of every FP8 tensor, by the tensor's name."""
    rows, columns = source.block_size
    for name in headers:
        owner = headers.get(name.removesuffix(FP8_SCALE_SUFFIX))
        if name.endswith(FP8_SCALE_SUFFIX) and (owner is None or owner.dtype != FP8_DTYPE):
            found = "no such tensor" if owner is None else owner.dtype
            raise ValueError(f"scale {name!r} belongs to an {FP8_DTYPE} tensor of its name, but found {found}")
    scales: dict[str, TensorHeader] = {}
    for name, header in headers.items():
        if header.dtype != FP8_DTYPE:
            continue
        scale = headers.get(name + FP8_SCALE_SUFFIX)
        if scale is None or len(header.shape) != 2:
            found = "no scale" if scale is None else f"shape {list(header.shape)}"
            raise ValueError(f"FP8 tensor {name!r} must have 2 dims and {name + FP8_SCALE_SUFFIX!r} beside it; {found}")
        expected = (-(-header.shape[0] // rows), -(-header.shape[1] // columns))
        if scale.dtype != "F32" or scale.shape != expected:
            raise ValueError(
                f"scale {name + FP8_SCALE_SUFFIX!r} of a {list(header.shape)} weight in blocks of {rows} x {columns} "
                f"must be F32 {list(expected)}, found {scale.dtype} {list(scale.shape)}"
            )
        scales[name] = scale
    return scales


def _group(
    ordered: list[str],
    headers: Mapping[str, TensorHeader],
    actions: Mapping[str, Action],
    max_shard_bytes: int | None,
) -> list[list[str]]:
    groups: list[list[str]] = []
    num_bytes, last_file = 0, Path()
    for name in ordered:
        size = sum(size for _, _, size in _outputs(name, headers[name], actions[name]))
        is_full = headers[name].file != last_file if max_shard_bytes is None else num_bytes + size > max_shard_bytes
        if not groups or is_full:
            groups.append([])
            num_bytes = 0
        groups[-1].append(name)
        num_bytes += size
        last_file = headers[name].file
    return groups


def _outputs(name: str, header: TensorHeader, action: Action) -> list[tuple[str, str, int]]:
    """Names, dtypes and bytes of what a source tensor becomes."""
    num_elements = math.prod(header.shape)
    if action is Action.QUANTIZE:
        return [(name, "I8", num_elements), (name + SCALE_SUFFIX, "F32", 4 * header.shape[0])]
    dtype = KEPT_FP8_DTYPE if action is Action.DEQUANTIZE else header.dtype
    return [(name, dtype, num_elements * DTYPE_BYTES[dtype])]


def _plan_shard(
    file_name: str,
    names: Iterable[str],
    headers: Mapping[str, TensorHeader],
    actions: Mapping[str, Action],
    scales: Mapping[str, TensorHeader],
) -> ShardPlan:
    outputs = [(output, name) for name in names for output in _outputs(name, headers[name], actions[name])]
    # Wide dtypes first: every tensor then lies at a multiple of its own item size.
    outputs.sort(key=lambda entry: -DTYPE_BYTES[entry[0][1]])
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for (output_name, dtype, size), name in outputs:
        source_shape = headers[name].shape
        shape = [source_shape[0], 1] if output_name != name else list(source_shape)
        entries[output_name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        starts[output_name] = end
        end += size
    header = _encode_header(entries)
    conversions = [
        Conversion(
            name=name,
            action=actions[name],
            source=headers[name],
            source_scale=scales.get(name),
            start_byte=len(header) + starts[name],
            num_bytes=_outputs(name, headers[name], actions[name])[0][2],
            scale_start_byte=len(header) + starts[name + SCALE_SUFFIX] if actions[name] is Action.QUANTIZE else None,
        )
        for name in names
    ]
    return ShardPlan(file_name, header, tuple(conversions), len(header) + end, tuple(starts))


def _encode_header(entries: Mapping[str, object]) -> bytes:
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
