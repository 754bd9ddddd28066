"""Reads this rank's part of a safetensors checkpoint straight into a model's parameters.

The plan (``weight_plan.py``) decides and checks where everything goes before a byte of data is read; this file only
moves bytes. It knows no model and never unpickles. Invariant: of the files' data only what the plan names is read;
beside the model, memory holds one staging buffer and its conversion; and when ``load_weights`` returns, every parameter
was filled exactly once.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from argosy.quantization.fp8_block import DEFAULT_BLOCK_SIZE
from argosy.quantization.load_progress import ProgressCallback, ProgressCounter
from argosy.quantization.placement import TORCH_DTYPES, check_scales, check_zeros, memory_of, place, spec_of
from argosy.quantization.safetensors_headers import DTYPE_BYTES, count_header_bytes, read_headers
from argosy.quantization.tensor_boxes import Box, find_byte_runs, volume, widths
from argosy.quantization.weight_plan import TensorPart, WeightCopy, WeightMapping, map_to_same_name, plan_weights
from argosy.quantization.weight_reader import CheckpointReader, Request

STAGING_BYTES = 16 << 20
_ALIGNMENT = 64  # of pieces in the staging buffer; a dtype's items must not straddle


@dataclass(frozen=True, slots=True)
class LoadStats:
    """What a load has read, as the reader counted it."""

    num_tensors: int
    read_bytes: int  # of tensors' data
    header_bytes: int  # of the index and the shards' heads
    num_reads: int  # system calls for tensors' data


@torch.inference_mode()  # parameters may have been made in inference mode, and may be filled in it only
def load_weights(
    model: nn.Module,
    directory: Path,
    *,
    mapping: WeightMapping = map_to_same_name,
    block_size: tuple[int, int] = DEFAULT_BLOCK_SIZE,
    on_progress: ProgressCallback | None = None,
    staging_bytes: int = STAGING_BYTES,
) -> LoadStats:
    """Fill every parameter and persistent buffer of ``model`` in place, converting to the dtype and device it has.

    Args:
        mapping: where each tensor goes; None from it means that the tensor is left alone.
        block_size: of FP8 weights, ``quantization_config.weight_block_size``.
        on_progress: called once before the first tensor and after every tensor.
        staging_bytes: memory for what cannot be read straight into its place; larger tensors pass through in pieces.

    Raises:
        ValueError: anything wrong with the checkpoint, naming tensor, expected and found. Headers, names, shapes and
            dtypes are checked before the first parameter is written; scale values only when they are read.
        RuntimeError: a file that cannot be read, or that changed since its header was read.
    """
    parameters = model.state_dict()  # shares memory with the model
    on_meta = [name for name, parameter in parameters.items() if parameter.is_meta]
    assert not on_meta, f"parameters without memory cannot be filled: {on_meta[:3]}"
    headers = read_headers(directory)
    plan = plan_weights(
        headers, {name: spec_of(parameter) for name, parameter in parameters.items()}, mapping, block_size
    )
    with CheckpointReader() as reader:
        filler = _Filler(parameters, reader, ProgressCounter(plan, on_progress), staging_bytes)
        for copy in plan:
            filler.add(copy)
        filler.flush()
    header_bytes = count_header_bytes(directory, headers.values())
    return LoadStats(len(plan), reader.read_bytes, header_bytes, reader.num_reads)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a copy, small enough for the staging buffer, that waits for its bytes."""

    copy: WeightCopy
    box: Box  # of the checkpoint's tensor
    target: torch.Tensor
    stored: torch.Tensor | None  # where the bytes go first; None: into ``target`` itself
    requests: list[Request]
    scale: torch.Tensor | None
    is_last: bool  # of its copy


class _Filler:
    """Carries out copies in batches: what lies side by side in a file is read in one call."""

    def __init__(
        self,
        parameters: dict[str, torch.Tensor],
        reader: CheckpointReader,
        progress: ProgressCounter,
        staging_bytes: int,
    ) -> None:
        self._parameters = parameters
        self._reader = reader
        self._progress = progress
        self._staging_bytes = staging_bytes
        is_pinned = any(parameter.device.type != "cpu" for parameter in parameters.values())
        self._staging = torch.empty(staging_bytes, dtype=torch.uint8, device="cpu", pin_memory=is_pinned)
        self._staging_memory = memory_of(self._staging)
        self._num_staged_bytes = 0
        self._num_batch_bytes = 0
        self._batch: list[_Piece] = []  # of one file

    def add(self, copy: WeightCopy) -> None:
        parameter = self._parameters[copy.parameter_name]
        target = parameter[copy.index] if copy.index else parameter
        if self._batch and self._batch[-1].copy.part.header.file != copy.part.header.file:
            self.flush()
        if copy.offset is not None:
            check_zeros(self._read_whole(copy.offset), copy.offset)
        if not target.numel():
            self._progress.advance(copy)
            return
        scale = None
        if copy.scale is not None:
            numbers = self._read_whole(copy.scale).float()
            check_scales(numbers, copy.scale)
            scale = numbers.to(target.device)
        if _fits_directly(copy, target):
            self._enqueue_direct(copy, target)
        else:
            self._enqueue_staged(copy, target, scale)

    def flush(self) -> None:
        """Read what waits, and put it in its place."""
        if not self._batch:
            return
        requests = (request for piece in self._batch for request in piece.requests)
        self._reader.read(self._batch[0].copy.part.header, requests)
        for piece in self._batch:
            if piece.copy.is_scale:
                check_scales(piece.target if piece.stored is None else piece.stored, piece.copy.part)
            if piece.stored is not None:
                place(piece.target, piece.stored, piece.copy, piece.box, piece.scale)
            if piece.is_last:
                self._progress.advance(piece.copy)
        self._batch.clear()
        self._num_staged_bytes = self._num_batch_bytes = 0

    def _enqueue_direct(self, copy: WeightCopy, target: torch.Tensor) -> None:
        requests = _requests(copy.part, memory_of(target))
        self._enqueue(_Piece(copy, copy.part.box, target, None, requests, None, is_last=True))

    def _enqueue_staged(self, copy: WeightCopy, target: torch.Tensor, scale: torch.Tensor | None) -> None:
        boxes = _cut_rows(copy.part, self._staging_bytes)
        first_row = copy.part.box[0][0] if len(boxes) > 1 else 0
        for number, box in enumerate(boxes, start=1):
            part = TensorPart(copy.part.tensor_name, copy.part.header, box)
            stored, memory = self._stage(part.num_bytes)
            self._enqueue(
                _Piece(
                    copy,
                    box,
                    target if len(boxes) == 1 else target[box[0][0] - first_row : box[0][1] - first_row],
                    stored.view(TORCH_DTYPES[part.header.dtype]).view(widths(box)),
                    _requests(part, memory),
                    scale,
                    is_last=number == len(boxes),
                )
            )

    def _stage(self, num_bytes: int) -> tuple[torch.Tensor, memoryview]:
        """Room in the staging buffer, after making some if need be; memory of its own for a row that is larger."""
        if num_bytes > self._staging_bytes:
            room = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
            return room, memory_of(room)
        if self._num_staged_bytes + num_bytes > self._staging_bytes:
            self.flush()
        start = self._num_staged_bytes
        self._num_staged_bytes += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return self._staging[start : start + num_bytes], self._staging_memory[start : start + num_bytes]

    def _enqueue(self, piece: _Piece) -> None:
        self._batch.append(piece)
        self._num_batch_bytes += volume(piece.box) * DTYPE_BYTES[piece.copy.part.header.dtype]
        if self._num_batch_bytes >= self._staging_bytes:
            self.flush()

    def _read_whole(self, part: TensorPart) -> torch.Tensor:
        """A companion, at once: it is small, and its weight waits for it."""
        stored = torch.empty(widths(part.box), dtype=TORCH_DTYPES[part.header.dtype], device="cpu")
        if stored.numel():
            self._reader.read(part.header, _requests(part, memory_of(stored)))
        return stored


def _fits_directly(copy: WeightCopy, target: torch.Tensor) -> bool:
    """Whether the file's bytes are the parameter's."""
    return (
        copy.scale is None
        and target.device.type == "cpu"
        and target.dtype == TORCH_DTYPES[copy.part.header.dtype]
        and target.is_contiguous()
    )


def _cut_rows(part: TensorPart, max_bytes: int) -> list[Box]:
    """``part`` in pieces of whole rows that take ``max_bytes`` at most, or single rows where those take more."""
    if not part.box or part.num_bytes <= max_bytes:
        return [part.box]
    (start, stop), *others = part.box
    num_rows = max(1, max_bytes * (stop - start) // part.num_bytes)
    return [((first, min(first + num_rows, stop)), *others) for first in range(start, stop, num_rows)]


def _requests(part: TensorPart, memory: memoryview) -> list[Request]:
    """Where the bytes of ``part`` lie in its file, and where each run goes in ``memory``, which holds them in order."""
    runs = find_byte_runs(part.header.shape, part.box, DTYPE_BYTES[part.header.dtype])
    first, size = part.header.start_byte, runs.run_bytes
    if len(runs.starts) == 1:
        return [(first + runs.starts[0], memory)]
    return [(first + start, memory[idx * size : (idx + 1) * size]) for idx, start in enumerate(runs.starts)]
