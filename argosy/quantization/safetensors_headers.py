"""What a checkpoint directory holds, told from its safetensors headers alone.

It reads the index and the JSON head of every shard, and never a tensor's data; it imports no torch and knows no model,
so a load plan can be made for a 640 GB checkpoint in seconds. It never reads pickle. Invariant: every header that is
returned lies inside its file, tensors tile the file without gap or overlap, and the shards agree with the index.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
MAX_NAMES_SHOWN = 3

_LENGTH_BYTES = 8  # a shard starts with the header's length, a little-endian u64
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What changes when a file is written to or replaced."""

    num_bytes: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Where one tensor lies and what it is."""

    shape: tuple[int, ...]
    dtype: str  # the format's own name: BF16, F32, F8_E4M3, ...
    file: Path
    start_byte: int  # from the beginning of the file
    stop_byte: int
    stamp: FileStamp | None = None  # of the file, when its header was read; None: there is no file

    @property
    def num_bytes(self) -> int:
        return self.stop_byte - self.start_byte


def read_headers(directory: Path) -> dict[str, TensorHeader]:
    """Every tensor of the checkpoint in ``directory``: sharded with an index, or a single ``model.safetensors``.

    Raises:
        ValueError: no checkpoint there, a corrupt or truncated file, or an index that disagrees with its shards.
        RuntimeError: a file that cannot be read.
    """
    index = _find_index(directory)
    if index is None:
        return read_shard_headers(directory / SINGLE_NAME)
    weight_map = _read_index(index)
    headers: dict[str, TensorHeader] = {}
    for shard_name in sorted(set(weight_map.values())):
        if not (directory / shard_name).is_file():
            raise ValueError(f"{index} names the shard {shard_name!r}, which is not in {directory}; copy it there")
        for name, header in read_shard_headers(directory / shard_name).items():
            if name in headers:
                raise ValueError(
                    f"tensor {name!r} is in two shards of {directory}, {headers[name].file.name!r} and {shard_name!r}; "
                    "a tensor must be in one shard"
                )
            headers[name] = header
    _check_index(index, weight_map, headers)
    return headers


def read_shard_headers(file: Path) -> dict[str, TensorHeader]:
    """Every tensor of one safetensors file."""
    try:
        with file.open("rb") as stream:
            stamp = stamp_of(stream.fileno())
            num_file_bytes = stamp.num_bytes
            prefix = stream.read(_LENGTH_BYTES)
            if len(prefix) < _LENGTH_BYTES:
                raise ValueError(
                    f"{file} is no safetensors file: it has {num_file_bytes} bytes, and the header's length alone "
                    f"takes {_LENGTH_BYTES}; download it again"
                )
            num_header_bytes = int.from_bytes(prefix, "little")
            if num_header_bytes > min(_MAX_HEADER_BYTES, num_file_bytes - _LENGTH_BYTES):
                raise ValueError(
                    f"{file} is corrupt or truncated: its header should have {num_header_bytes} bytes, but the file "
                    f"has {num_file_bytes} in all (limit {_MAX_HEADER_BYTES}); download it again"
                )
            raw_header = stream.read(num_header_bytes)
    except OSError as error:
        raise RuntimeError(f"cannot read {file}: {error.strerror}; check the path and its permissions") from error
    if len(raw_header) < num_header_bytes:
        raise RuntimeError(f"{file} became shorter while its header was read; load it when nothing writes to it")
    headers = _parse_header(file, raw_header, _LENGTH_BYTES + num_header_bytes, stamp)
    _check_layout(file, headers, _LENGTH_BYTES + num_header_bytes, num_file_bytes)
    return headers


def stamp_of(descriptor: int) -> FileStamp:
    """Of an open file."""
    status = os.fstat(descriptor)
    return FileStamp(status.st_size, status.st_mtime_ns)


def count_header_bytes(directory: Path, headers: Iterable[TensorHeader]) -> int:
    """What ``read_headers`` read to tell these: the index and the shards' heads. Tensors tile the rest of a shard."""
    first_byte: dict[Path, int] = {}
    for header in headers:
        first_byte[header.file] = min(header.start_byte, first_byte.get(header.file, header.start_byte))
    index = directory / INDEX_NAME
    return sum(first_byte.values()) + (index.stat().st_size if index.is_file() else 0)


def name_some(names: Iterable[str]) -> str:
    """The first few of ``names``, and how many more there are: for error messages."""
    ordered = sorted(names)
    shown = ", ".join(repr(name) for name in ordered[:MAX_NAMES_SHOWN])
    return shown if len(ordered) <= MAX_NAMES_SHOWN else f"{shown} and {len(ordered) - MAX_NAMES_SHOWN} more"


def _find_index(directory: Path) -> Path | None:
    """The index of a sharded checkpoint; None when there is a single file."""
    if not directory.is_dir():
        state = "is a file" if directory.exists() else "does not exist"
        raise ValueError(f"model directory {directory} {state}; give a directory with {INDEX_NAME} or {SINGLE_NAME}")
    if (directory / INDEX_NAME).is_file():
        return directory / INDEX_NAME
    if (directory / SINGLE_NAME).is_file():
        return None
    found = sorted(path.name for path in directory.iterdir())
    pickles = [name for name in found if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        raise ValueError(
            f"{directory} holds pickled weights ({name_some(pickles)}), which can run code when read and are refused; "
            "convert them to safetensors"
        )
    raise ValueError(
        f"no checkpoint in {directory}: looked for {INDEX_NAME} and {SINGLE_NAME}, "
        f"found {name_some(found) or 'an empty directory'}"
    )


def _read_index(index: Path) -> dict[str, str]:
    try:
        content: object = json.loads(index.read_bytes())
    except OSError as error:
        raise RuntimeError(f"cannot read {index}: {error.strerror}; check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index} is not JSON ({error}); download it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} must be an object with a 'weight_map' of tensor name -> shard file name")
    for shard_name in set(weight_map.values()):
        # A shard outside the directory would let a checkpoint point at any file of this machine.
        if Path(shard_name).name != shard_name or not shard_name.endswith(".safetensors"):
            raise ValueError(f"{index} names the shard {shard_name!r}; a shard must be a .safetensors file beside it")
    return cast(dict[str, str], weight_map)


def _check_index(index: Path, weight_map: dict[str, str], headers: dict[str, TensorHeader]) -> None:
    absent = weight_map.keys() - headers.keys()
    if absent:
        name = min(absent)
        raise ValueError(
            f"{index} lists {len(absent)} tensors that are in no shard: {name_some(absent)}; "
            f"{name!r} should be in {weight_map[name]!r}"
        )
    unlisted = headers.keys() - weight_map.keys()
    if unlisted:
        name = min(unlisted)
        raise ValueError(
            f"{index} does not list {len(unlisted)} tensors of its shards: {name_some(unlisted)}; "
            f"{name!r} is in {headers[name].file.name!r}"
        )
    for name, shard_name in weight_map.items():
        if headers[name].file.name != shard_name:
            raise ValueError(f"{index} says {name!r} is in {shard_name!r}, but it is in {headers[name].file.name!r}")


def _parse_header(file: Path, raw_header: bytes, data_start: int, stamp: FileStamp) -> dict[str, TensorHeader]:
    try:
        content: object = json.loads(raw_header)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is no safetensors file: its header is not JSON ({error}); download it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no safetensors file: its header is not a JSON object; download it again")
    return {
        name: _parse_entry(file, name, entry, data_start, stamp)
        for name, entry in content.items()
        if name != "__metadata__"
    }


def _parse_entry(file: Path, name: str, entry: object, data_start: int, stamp: FileStamp) -> TensorHeader:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(dtype, str) and _is_sizes(shape) and _is_sizes(offsets) and len(cast(list[int], offsets)) == 2):
        raise ValueError(f"{file}: the header of {name!r} must have dtype, shape and data_offsets, got {entry!r:.200}")
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"{file}: {name!r} has the unknown dtype {dtype!r}; known: {', '.join(DTYPE_BYTES)}")
    start, stop = cast(list[int], offsets)
    num_bytes = math.prod(cast(list[int], shape)) * DTYPE_BYTES[dtype]
    if stop - start != num_bytes:
        raise ValueError(
            f"{file}: {name!r} of shape {shape} and dtype {dtype} takes {num_bytes} bytes, but data_offsets {offsets} "
            f"hold {stop - start}"
        )
    return TensorHeader(tuple(cast(list[int], shape)), dtype, file, data_start + start, data_start + stop, stamp)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _check_layout(file: Path, headers: dict[str, TensorHeader], data_start: int, num_file_bytes: int) -> None:
    end = data_start
    for name, header in sorted(headers.items(), key=lambda item: (item[1].start_byte, item[1].stop_byte)):
        if header.start_byte != end:
            raise ValueError(
                f"{file} is corrupt: {name!r} starts at byte {header.start_byte}, but the one before ends at {end}; "
                "download it again"
            )
        end = header.stop_byte
    if end != num_file_bytes:
        raise ValueError(
            f"{file} is {'truncated' if num_file_bytes < end else 'corrupt'}: its header describes {end} bytes, "
            f"the file has {num_file_bytes}; download it again"
        )
