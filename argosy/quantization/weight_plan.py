"""Where every tensor of a checkpoint goes: a load plan made and checked from names, shapes and dtypes alone.

It reads no file, touches no tensor and knows no model: the model brings a ``WeightMapping``, a pure function from a
tensor's name to its ``Destination``. Invariant: a plan that was returned fills every parameter exactly once, with no
element missing and none written twice, and every FP8 weight in it has its scales.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from argosy.quantization.safetensors_headers import TensorHeader, name_some

SCALE_SUFFIX = "_scale_inv"  # DeepSeek's FP8 weights: X.weight has its scales in X.weight_scale_inv
FP8_DTYPE = "F8_E4M3"
SCALE_DTYPE = "F32"
PLAIN_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class Part:
    """The ``idx``-th of ``num_parts`` equal parts of a dim, whatever its size: a half of gate_up, a rank's share."""

    idx: int
    num_parts: int


Index = tuple[int | slice | Part, ...]  # leading dims; those not named are taken whole
ResolvedIndex = tuple[int | slice, ...]
Box = tuple[tuple[int, int], ...]  # (start, stop) of every dim


@dataclass(frozen=True, slots=True)
class Destination:
    """Where (a part of) a checkpoint tensor is copied to: ``parameter[index] = tensor[source]``."""

    parameter_name: str
    index: Index = ()
    source: Index = ()


WeightMapping = Callable[[str], Destination | None]  # None: this rank has no use for the tensor


@dataclass(frozen=True, slots=True)
class WeightCopy:
    """One line of a plan."""

    tensor_name: str
    header: TensorHeader
    scale: TensorHeader | None  # of an FP8 weight
    parameter_name: str
    index: ResolvedIndex
    source: ResolvedIndex
    box: Box  # what ``index`` covers of the parameter


def map_to_same_name(tensor_name: str) -> Destination:
    """The mapping of a model whose parameters are named as in the checkpoint."""
    return Destination(tensor_name)


def scale_inv_shape(weight_shape: tuple[int, ...], block_size: tuple[int, int]) -> tuple[int, int]:
    """The shape of an FP8 weight's scales: one for every block that it starts, so a ragged last block has one too."""
    num_rows, num_columns = weight_shape
    return -(-num_rows // block_size[0]), -(-num_columns // block_size[1])


def plan_weights(
    headers: Mapping[str, TensorHeader],
    parameter_shapes: Mapping[str, tuple[int, ...]],
    mapping: WeightMapping,
    block_size: tuple[int, int],
) -> list[WeightCopy]:
    """The copies that fill all of ``parameter_shapes`` from ``headers``, in the order of the files' bytes.

    Raises:
        ValueError: naming tensor, expected and found: unknown, missing, mis-shaped or doubly filled tensors, dtypes
            that cannot be read, FP8 weights without scales and scales without weights.
    """
    _check_scales_have_weights(headers)
    destinations = {name: mapping(name) for name in headers if not name.endswith(SCALE_SUFFIX)}
    wanted = {name: destination for name, destination in destinations.items() if destination is not None}
    unknown = [name for name, destination in wanted.items() if destination.parameter_name not in parameter_shapes]
    if unknown:
        target = wanted[min(unknown)].parameter_name
        raise ValueError(
            f"the checkpoint has {len(unknown)} unknown tensors: {name_some(unknown)}; the model has no parameter "
            f"{target!r}; check that config.json belongs to this checkpoint"
        )
    copies = [
        _plan_copy(name, headers, destination, parameter_shapes[destination.parameter_name], block_size)
        for name, destination in wanted.items()
    ]
    _check_filled_once(copies, parameter_shapes)
    return sorted(copies, key=lambda copy: (copy.header.file, copy.header.start_byte))


def _check_scales_have_weights(headers: Mapping[str, TensorHeader]) -> None:
    for name in headers:
        if not name.endswith(SCALE_SUFFIX):
            continue
        weight_name = name.removesuffix(SCALE_SUFFIX)
        found = headers[weight_name].dtype if weight_name in headers else "no such tensor"
        if found != FP8_DTYPE:
            raise ValueError(f"scale {name!r} belongs to an {FP8_DTYPE} tensor {weight_name!r}, but found {found}")


def _plan_copy(
    name: str,
    headers: Mapping[str, TensorHeader],
    destination: Destination,
    parameter_shape: tuple[int, ...],
    block_size: tuple[int, int],
) -> WeightCopy:
    header = headers[name]
    scale = _find_scale(name, headers, block_size)
    index, box = _resolve(destination.index, parameter_shape, f"{destination.parameter_name!r}, where {name!r} goes,")
    source, source_box = _resolve(destination.source, header.shape, f"{name!r}")
    expected = _shape_of(index, box)
    found = _shape_of(source, source_box)
    if expected != found:
        raise ValueError(
            f"tensor {name!r} must give shape {list(expected)} to {destination.parameter_name!r}{_show(index)}, "
            f"found {list(found)}{f' (part of {list(header.shape)})' if source else ''}; "
            "check that config.json belongs to this checkpoint"
        )
    return WeightCopy(name, header, scale, destination.parameter_name, index, source, box)


def _find_scale(name: str, headers: Mapping[str, TensorHeader], block_size: tuple[int, int]) -> TensorHeader | None:
    header = headers[name]
    if header.dtype in PLAIN_DTYPES:
        return None
    if header.dtype != FP8_DTYPE:
        raise ValueError(
            f"tensor {name!r} has dtype {header.dtype}; expected {', '.join(PLAIN_DTYPES)}, or {FP8_DTYPE} with "
            f"{name + SCALE_SUFFIX!r}"
        )
    scale = headers.get(name + SCALE_SUFFIX)
    if scale is None:
        raise ValueError(f"{FP8_DTYPE} tensor {name!r} has no scale: expected {name + SCALE_SUFFIX!r} beside it")
    if len(header.shape) != 2:
        raise ValueError(
            f"{FP8_DTYPE} tensor {name!r} must have 2 dims to be scaled in blocks, found {list(header.shape)}"
        )
    expected = scale_inv_shape(header.shape, block_size)
    if scale.shape != expected or scale.dtype != SCALE_DTYPE:
        raise ValueError(
            f"scale {name + SCALE_SUFFIX!r} must be {list(expected)} {SCALE_DTYPE} (blocks of {list(block_size)} on "
            f"{list(header.shape)}), found {list(scale.shape)} {scale.dtype}"
        )
    return scale


def _resolve(index: Index, shape: tuple[int, ...], what: str) -> tuple[ResolvedIndex, Box]:
    """``index`` with its parts turned to slices, and the box that it covers; refused when it leaves ``shape``."""
    if len(index) > len(shape):
        raise ValueError(f"{what} has shape {list(shape)}, found {len(index)} indices: {list(index)}")
    resolved: list[int | slice] = []
    box: list[tuple[int, int]] = []
    for entry, size in zip(index, shape, strict=False):
        if isinstance(entry, Part):
            if size % entry.num_parts:
                raise ValueError(f"{what} has a dim of {size} in {list(shape)}, not divisible by {entry.num_parts}")
            width = size // entry.num_parts
            entry = slice(entry.idx * width, (entry.idx + 1) * width)
        start, stop = (entry, entry + 1) if isinstance(entry, int) else (entry.start, entry.stop)
        if not 0 <= start <= stop <= size:
            raise ValueError(f"{what} has shape {list(shape)}, but index [{start}:{stop}] leaves its dim of {size}")
        resolved.append(entry)
        box.append((start, stop))
    return tuple(resolved), (*box, *((0, size) for size in shape[len(index) :]))


def _shape_of(index: ResolvedIndex, box: Box) -> tuple[int, ...]:
    is_kept = [not isinstance(entry, int) for entry in index] + [True] * (len(box) - len(index))
    return tuple(stop - start for (start, stop), kept in zip(box, is_kept, strict=True) if kept)


def _show(index: ResolvedIndex) -> str:
    shown = [str(entry) if isinstance(entry, int) else f"{entry.start}:{entry.stop}" for entry in index]
    return f"[{', '.join(shown)}]" if shown else ""


def _check_filled_once(copies: Iterable[WeightCopy], parameter_shapes: Mapping[str, tuple[int, ...]]) -> None:
    by_parameter: dict[str, list[WeightCopy]] = {name: [] for name in parameter_shapes}
    for copy in copies:
        by_parameter[copy.parameter_name].append(copy)
    missing: list[str] = []
    for name, shape in parameter_shapes.items():
        parts = sorted(by_parameter[name], key=lambda copy: copy.box)
        _check_disjoint(name, parts)
        # Boxes that do not overlap fill the parameter exactly when their volumes add up to its own.
        if sum(_volume(copy.box) for copy in parts) != math.prod(shape):
            missing.append(f"{name}[{_first_gap(shape, [copy.box for copy in parts])}]" if parts else name)
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of the model's {len(parameter_shapes)} tensors: "
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
                    f"tensors {other.tensor_name!r} and {copy.tensor_name!r} both fill {parameter_name!r} at "
                    f"{[f'{start}:{stop}' for start, stop in copy.box]}; each element must be filled once"
                )
        still_open.append(copy)


def _volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def _first_gap(shape: tuple[int, ...], boxes: list[Box]) -> int:
    """The first index of dim 0 that ``boxes`` do not fill."""
    full = math.prod(shape[1:])
    for index in range(shape[0]):
        if sum(_volume(box[1:]) for box in boxes if box[0][0] <= index < box[0][1]) != full:
            return index
    raise AssertionError(f"boxes fill {shape}")
