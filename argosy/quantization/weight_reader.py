"""Reads chosen bytes of a checkpoint's files into memory that exists already, and counts them.

``preadv`` into the place itself: files are not mapped, so what was read is counted as neither this process's memory nor
as anything that a file replaced later could break. It knows no tensors' meaning. Invariant: a buffer that was handed in
is full when ``read`` returns, from the file whose header was read, and no byte beside the asked ones was read.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from argosy.quantization.safetensors_headers import FileStamp, TensorHeader, stamp_of

Request = tuple[int, memoryview]  # the offset in the file, and where the bytes go: as many as it holds

_MAX_BUFFERS = 1024  # of one preadv: Linux's IOV_MAX
_MAX_OPEN_FILES = 32  # a checkpoint may have more shards than a process may open files


class CheckpointReader:
    """The files of one checkpoint, opened when first asked for. A context manager: leaving it closes them."""

    def __init__(self) -> None:
        self.read_bytes = 0
        self.num_reads = 0  # system calls
        self._files: dict[Path, _OpenFile] = {}  # oldest first

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises RuntimeError if a file has changed since its header was read, unless an error is on its way."""
        files, self._files = self._files, {}
        try:
            if error is None:
                for file in files.values():
                    file.check_unchanged()
        finally:
            for file in files.values():
                file.close()

    def read(self, header: TensorHeader, requests: Iterable[Request]) -> None:
        """Fill the buffers from the file of ``header``; neighbours in ascending order are read in one call.

        Raises:
            RuntimeError: a file that cannot be read, ends too early, or has changed since its header was read.
        """
        file = self._open(header)
        buffers: list[memoryview] = []
        start = stop = 0
        for offset, buffer in requests:
            if offset != stop or len(buffers) == _MAX_BUFFERS:
                self._fill(file, start, buffers)
                start = stop = offset
                buffers = []
            buffers.append(buffer)
            stop += len(buffer)
        self._fill(file, start, buffers)

    def _fill(self, file: "_OpenFile", offset: int, buffers: list[memoryview]) -> None:
        """One call, but where the system gives less than was asked for: it gives 2 GiB at most."""
        while buffers:
            count = file.read_into(offset, buffers)
            self.num_reads += 1
            self.read_bytes += count
            offset += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if count:
                buffers[0] = buffers[0][count:]

    def _open(self, header: TensorHeader) -> "_OpenFile":
        file = self._files.get(header.file)
        if file is None:
            if len(self._files) == _MAX_OPEN_FILES:
                oldest = self._files.pop(next(iter(self._files)))
                try:
                    oldest.check_unchanged()
                finally:
                    oldest.close()
            file = self._files[header.file] = _OpenFile(header.file, header.stamp)
        return file


class _OpenFile:
    """One shard."""

    def __init__(self, path: Path, stamp: FileStamp | None) -> None:
        self._path, self._stamp = path, stamp
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise RuntimeError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error
        try:
            self.check_unchanged()
        except RuntimeError:
            self.close()
            raise

    def read_into(self, offset: int, buffers: list[memoryview]) -> int:
        """The number of bytes read: at least 1."""
        try:
            count = os.preadv(self._descriptor, buffers, offset)
        except OSError as error:
            raise RuntimeError(f"cannot read {self._path}: {error.strerror}; check the disk") from error
        if not count:
            raise RuntimeError(
                f"{self._path} ends at byte {offset}, before the tensors that its header describes: it became shorter "
                "while it was read; load it when nothing writes to it"
            )
        return count

    def check_unchanged(self) -> None:
        found = stamp_of(self._descriptor)
        if self._stamp is not None and found != self._stamp:
            raise RuntimeError(
                f"{self._path} changed while it was loaded (from {self._stamp.num_bytes} bytes, modified at "
                f"{self._stamp.modified_ns} ns, to {found.num_bytes} bytes, {found.modified_ns} ns); "
                "load it when nothing writes to it"
            )

    def close(self) -> None:
        os.close(self._descriptor)
