"""Where every tensor of a checkpoint goes: a load plan made and checked from names, shapes and dtypes alone.

It reads no file, touches no tensor and knows no model: the model brings a ``WeightMapping``, a pure function from a
tensor's name to its ``Destination``. The *parameter's* dtype decides what becomes of a quantised tensor: a float
parameter gets it dequantised; one of the stored dtype gets its bytes, and the parameter with the scales' suffix gets
the scales. Invariant: a plan that was returned fills every parameter exactly once, with no element missing and none
written twice, and every quantised weight in it has its scales.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from argosy.quantization.safetensors_headers import DTYPE_BYTES, TensorHeader, name_some
from argosy.quantization.stored_tensors import (
    PLAIN_DTYPES,
    ScaleBlocks,
    StoredTensor,
    check_companions,
    companion_suffix,
    find_stored_tensor,
)
from argosy.quantization.tensor_boxes import (
    Box,
    Index,
    ResolvedIndex,
    find_first_gap,
    resolve_index,
    shape_of,
    show_index,
    volume,
    widths,
)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where (a part of) a checkpoint tensor is copied to: ``parameter[index] = tensor[source]``."""

    parameter_name: str
    index: Index = ()
    source: Index = ()


WeightMapping = Callable[[str], Destination | None]  # None: this rank has no use for the tensor


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """What the plan knows of a parameter."""

    shape: tuple[int, ...]
    dtype: str  # by the file format's name: BF16, I8, ...


@dataclass(frozen=True, slots=True)
class TensorPart:
    """Elements of one tensor of the checkpoint: what is read, and nothing beside it."""

    tensor_name: str
    header: TensorHeader
    box: Box

    @property
    def num_bytes(self) -> int:
        return volume(self.box) * DTYPE_BYTES[self.header.dtype]


@dataclass(frozen=True, slots=True)
class WeightCopy:
    """One line of a plan."""

    part: TensorPart
    parameter_name: str
    index: ResolvedIndex
    box: Box  # what ``index`` covers of the parameter
    scale: TensorPart | None = None  # the weight is multiplied by it: dequantised on load
    blocks: ScaleBlocks | None = None  # of ``scale``
    offset: TensorPart | None = None  # must hold zeros; it goes nowhere
    is_scale: bool = False  # its numbers must be positive and finite

    @property
    def read_bytes(self) -> int:
        scale_bytes = 0 if self.scale is None else self.scale.num_bytes
        return self.part.num_bytes + scale_bytes + (0 if self.offset is None else self.offset.num_bytes)


def map_to_same_name(tensor_name: str) -> Destination:
    """The mapping of a model whose parameters are named as in the checkpoint."""
    return Destination(tensor_name)


def plan_weights(
    headers: Mapping[str, TensorHeader],
    parameters: Mapping[str, ParameterSpec],
    mapping: WeightMapping,
    block_size: tuple[int, int],
) -> list[WeightCopy]:
    """The copies that fill all of ``parameters`` from ``headers``, in the order of the files' bytes.

    Raises:
        ValueError: naming tensor, expected and found: unknown, missing, mis-shaped or doubly filled tensors, dtypes
            that cannot be read or do not suit their parameter, weights without scales and scales without weights.
    """
    check_companions(headers)
    destinations = {name: mapping(name) for name in headers if companion_suffix(name) is None}
    wanted = {name: destination for name, destination in destinations.items() if destination is not None}
    unknown = [name for name, destination in wanted.items() if destination.parameter_name not in parameters]
    if unknown:
        target = wanted[min(unknown)].parameter_name
        raise ValueError(
            f"the checkpoint has {len(unknown)} unknown tensors: {name_some(unknown)}; the model has no parameter "
            f"{target!r}; check that config.json belongs to this checkpoint"
        )
    copies: list[WeightCopy] = []
    for name, destination in wanted.items():
        stored = find_stored_tensor(name, headers, block_size)
        copies += _plan_tensor(stored, destination, parameters)
    _check_filled_once(copies, parameters)
    return sorted(copies, key=lambda copy: (str(copy.part.header.file), copy.part.header.start_byte))


def parts_to_read(stored: StoredTensor, box: Box) -> list[TensorPart]:
    """What a rank reads that takes ``box`` of a tensor: of the tensor itself first, then of its companions."""
    parts = [TensorPart(stored.name, stored.header, box)]
    for companion in (stored.scale, stored.offset):
        if companion is not None:
            assert stored.blocks is not None
            parts.append(TensorPart(companion.name, companion.header, stored.blocks.covering(box)))
    return parts


def _plan_tensor(
    stored: StoredTensor, destination: Destination, parameters: Mapping[str, ParameterSpec]
) -> list[WeightCopy]:
    """The weight's copy; where the parameter keeps the stored format, the scales' copy too."""
    name, parameter = stored.name, parameters[destination.parameter_name]
    index, box = resolve_index(
        destination.index, parameter.shape, f"{destination.parameter_name!r}, where {name!r} goes,"
    )
    source, source_box = resolve_index(destination.source, stored.header.shape, repr(name))
    expected, found = shape_of(index, box), shape_of(source, source_box)
    if expected != found:
        of_what = f" (part of {list(stored.header.shape)})" if destination.source else ""
        raise ValueError(
            f"tensor {name!r} must give shape {list(expected)} to {destination.parameter_name!r}{show_index(index)}, "
            f"found {list(found)}{of_what}; check that config.json belongs to this checkpoint"
        )
    _check_dtype(stored, destination.parameter_name, parameter)
    part, *companions = parts_to_read(stored, source_box)
    scale = companions[0] if companions else None
    offset = companions[1] if len(companions) > 1 else None
    if scale is None or parameter.dtype in PLAIN_DTYPES:
        return [WeightCopy(part, destination.parameter_name, index, box, scale, stored.blocks, offset)]
    return [
        WeightCopy(part, destination.parameter_name, index, box, offset=offset),
        _plan_scale(stored, part, scale, destination.parameter_name, index, parameters),
    ]


def _check_dtype(stored: StoredTensor, parameter_name: str, parameter: ParameterSpec) -> None:
    if parameter.dtype in (*PLAIN_DTYPES, stored.header.dtype):
        return
    raise ValueError(
        f"tensor {stored.name!r} has dtype {stored.header.dtype}, but {parameter_name!r}, where it goes, holds "
        f"{parameter.dtype}; convert the checkpoint with `argosy quantize`, or set --quantization auto"
    )


def _plan_scale(
    stored: StoredTensor,
    weight: TensorPart,
    scale: TensorPart,
    weight_parameter: str,
    index: ResolvedIndex,
    parameters: Mapping[str, ParameterSpec],
) -> WeightCopy:
    """The copy of a kept weight's scales: the weight's own, counted in blocks, on both sides."""
    suffix = scale.tensor_name.removeprefix(stored.name)
    parameter_name, blocks = weight_parameter + suffix, stored.blocks
    assert blocks is not None
    if parameter_name not in parameters:
        raise ValueError(f"scale {scale.tensor_name!r} has no place: the model has no parameter {parameter_name!r}")
    parameter_shape = parameters[weight_parameter].shape
    target = resolve_index(index, parameter_shape, repr(weight_parameter))[1]
    assert shape_of(index, target) == widths(weight.box), f"{weight_parameter} takes whole rows of {stored.name}"
    for what, box, shape in (
        (repr(stored.name), weight.box, stored.header.shape),
        (repr(weight_parameter), target[-2:], parameter_shape[-2:]),
    ):
        _check_whole_blocks(what, box, shape, blocks)
    rows, columns = blocks.covering(target[-2:])
    scale_index = (*index[: len(target) - 2], slice(*rows), slice(*columns))
    resolved, box = resolve_index(scale_index, parameters[parameter_name].shape, repr(parameter_name))
    if shape_of(resolved, box) != widths(scale.box):
        raise ValueError(
            f"scale {scale.tensor_name!r} must give shape {list(shape_of(resolved, box))} to {parameter_name!r}"
            f"{show_index(resolved)}, found {list(widths(scale.box))}"
        )
    return WeightCopy(scale, parameter_name, resolved, box, is_scale=True)


def _check_whole_blocks(what: str, box: Box, shape: tuple[int, ...], blocks: ScaleBlocks) -> None:
    for (start, stop), size, block in zip(box, shape, (blocks.num_rows, blocks.num_columns), strict=True):
        if block is not None and (start % block or (stop % block and stop != size)):
            raise ValueError(
                f"{what} of shape {list(shape)} is cut at {start}:{stop}, inside a block of {block} that shares a "
                "scale; set --quantization none, or a --tp-size whose shares are whole blocks"
            )


def _check_filled_once(copies: Iterable[WeightCopy], parameters: Mapping[str, ParameterSpec]) -> None:
    by_parameter: dict[str, list[WeightCopy]] = {name: [] for name in parameters}
    for copy in copies:
        by_parameter[copy.parameter_name].append(copy)
    missing: list[str] = []
    for name, parameter in parameters.items():
        parts = by_parameter[name]
        if len(parts) > 1:
            parts.sort(key=lambda copy: copy.box)
            _check_disjoint(name, parts)
        # Boxes that do not overlap fill the parameter exactly when their volumes add up to its own.
        if sum(volume(copy.box) for copy in parts) != math.prod(parameter.shape):
            gap = find_first_gap(parameter.shape, [copy.box for copy in parts]) if parts else None
            missing.append(name if gap is None else f"{name}[{gap}]")
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of the model's {len(parameters)} tensors: "
            f"{name_some(missing)}; the download may be incomplete, or config.json belongs to another checkpoint"
        )


def _check_disjoint(parameter_name: str, parts: list[WeightCopy]) -> None:
    """``parts`` are sorted by box, so only those whose first dim is still open can meet the next one."""
    still_open: list[WeightCopy] = []
    for copy in parts:
        if copy.box:
            still_open = [other for other in still_open if other.box[0][1] > copy.box[0][0]]
        for other in still_open:
            if all(a < d and c < b for (a, b), (c, d) in zip(copy.box, other.box, strict=True)):
                raise ValueError(
                    f"tensors {other.part.tensor_name!r} and {copy.part.tensor_name!r} both fill {parameter_name!r} at "
                    f"{[f'{start}:{stop}' for start, stop in copy.box]}; each element must be filled once"
                )
        still_open.append(copy)
