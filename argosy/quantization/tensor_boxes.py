"""Boxes of tensors: which part of a tensor an index names, and where the part's bytes lie in a row-major tensor.

Arithmetic on sizes alone; it reads no file and imports no torch. Invariant: the byte runs of a box are disjoint, in
ascending order, and hold the box's elements and no other.
"""

import math
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True, slots=True)
class Part:
    """The ``idx``-th of ``num_parts`` equal parts of a dim, whatever its size: a half of gate_up, a rank's share."""

    idx: int
    num_parts: int


Index = tuple[int | slice | Part, ...]  # leading dims; those not named are taken whole
ResolvedIndex = tuple[int | slice, ...]
Span = tuple[int, int]  # (start, stop) of one dim
Box = tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class ByteRuns:
    """Equal stretches of bytes; offsets count from the tensor's first byte."""

    run_bytes: int
    starts: list[int]


def resolve_index(index: Index, shape: tuple[int, ...], what: str) -> tuple[ResolvedIndex, Box]:
    """``index`` with its parts turned to slices, and the box that it covers.

    Raises:
        ValueError: it leaves ``shape``, or a dim cannot be cut into equal parts; the message begins with ``what``.
    """
    if not index:  # nearly every tensor, among a hundred thousand
        return (), tuple([(0, size) for size in shape])
    if len(index) > len(shape):
        raise ValueError(f"{what} has shape {list(shape)}, found {len(index)} indices: {list(index)}")
    resolved: list[int | slice] = []
    box: list[Span] = []
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


def shape_of(index: ResolvedIndex, box: Box) -> tuple[int, ...]:
    """The shape that indexing gives: a dim with an int is gone."""
    kept = [span for span, entry in zip(box, index, strict=False) if not isinstance(entry, int)]
    return widths((*kept, *box[len(index) :]))


def show_index(index: ResolvedIndex) -> str:
    shown = [str(entry) if isinstance(entry, int) else f"{entry.start}:{entry.stop}" for entry in index]
    return f"[{', '.join(shown)}]" if shown else ""


def widths(box: Box) -> tuple[int, ...]:
    return tuple([stop - start for start, stop in box])


def volume(box: Box) -> int:
    product = 1
    for start, stop in box:
        product *= stop - start
    return product


def find_byte_runs(shape: tuple[int, ...], box: Box, item_bytes: int) -> ByteRuns:
    """Where ``box`` lies in a row-major tensor of ``shape``: as few runs as hold nothing else."""
    if not volume(box):
        return ByteRuns(0, [])
    num_outer = len(shape)  # dims before those that are taken whole, whose elements are neighbours
    while num_outer and box[num_outer - 1] == (0, shape[num_outer - 1]):
        num_outer -= 1
    if not num_outer:
        return ByteRuns(item_bytes * math.prod(shape), [0])
    strides = [item_bytes * math.prod(shape[dim + 1 :]) for dim in range(num_outer)]
    *outer, (start, stop) = box[:num_outer]
    stride = strides[num_outer - 1]
    offsets = [range(first * step, last * step, step) for (first, last), step in zip(outer, strides, strict=False)]
    starts = [start * stride + sum(place) for place in product(*offsets)]
    return ByteRuns((stop - start) * stride, starts)


def find_first_gap(shape: tuple[int, ...], boxes: list[Box]) -> int:
    """The first index of dim 0 that ``boxes``, which do not overlap, leave open."""
    full = math.prod(shape[1:])
    for index in range(shape[0]):
        if sum(volume(box[1:]) for box in boxes if box[0][0] <= index < box[0][1]) != full:
            return index
    raise AssertionError(f"boxes fill {shape}")
