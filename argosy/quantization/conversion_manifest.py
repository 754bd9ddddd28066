"""The record of a conversion, kept in its destination: what is converted, how, and which shards are done.

The first line says what and how; every further line is one finished shard with its tensors' errors, written before the
shard appears. Invariant: a shard is done exactly when its line is there *and* its file begins with the planned header,
so a kill at any moment loses at most the shards that were being written.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from argosy.quantization.convert_rows import ErrorSums
from argosy.quantization.file_pieces import write_file

MANIFEST_NAME = "argosy-quantize.jsonl"

ShardErrors = Mapping[str, ErrorSums]  # tensor name -> its error; quantised tensors only


def fingerprint_source(files: Iterable[Path]) -> str:
    """Of names, sizes and times of change: a checkpoint that was touched is another one; its bits are not read."""
    digest = hashlib.sha256()
    for file in sorted(files):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class Manifest:
    """One conversion's record in ``directory``. Not for several threads at once."""

    def __init__(self, directory: Path, task: Mapping[str, object]) -> None:
        """``task``: all that the result depends on."""
        self._path = directory / MANIFEST_NAME
        self._task = json.loads(json.dumps(task))
        self._shards: dict[str, ShardErrors] = {}

    def open(self) -> None:
        """Begin, or go on where a killed run of the same task stopped.

        Raises:
            ValueError: the directory's record is of another task.
            RuntimeError: a file that cannot be read or written.
        """
        if not self._path.is_file():
            self._write()
            return
        try:
            found, *shards = [json.loads(line) for line in self._path.read_bytes().splitlines()]
        except ValueError:
            found, shards = None, []
        if found != self._task:
            raise ValueError(
                f"{self._path.parent} holds a conversion of another source or with other options "
                f"({_describe_difference(found, self._task)}); name another directory, or start it again with "
                "--overwrite, which deletes it"
            )
        for shard in shards:
            self._shards[shard["shard"]] = {name: ErrorSums(*sums) for name, sums in shard["tensors"].items()}

    def finished_errors(self, file_name: str) -> ShardErrors | None:
        """None: no line of this shard is there."""
        return self._shards.get(file_name)

    def add(self, file_name: str, errors: ShardErrors) -> None:
        """Raises RuntimeError when the disk takes no more."""
        self._shards[file_name] = errors
        self._write()

    def _write(self) -> None:
        """All of it, sorted: the same conversion leaves the same bytes, whoever finished first."""
        lines: list[object] = [self._task]
        for file_name in sorted(self._shards):
            errors = self._shards[file_name]
            tensors = {name: [sums.weight_sq, sums.error_sq] for name, sums in errors.items()}
            lines.append({"shard": file_name, "tensors": tensors})
        write_file(self._path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _describe_difference(found: object, wanted: Mapping[str, object]) -> str:
    if not isinstance(found, dict):
        return "its record cannot be read"
    names = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    return "different: " + ", ".join(names)
