"""Whole reads and writes at byte offsets, and files that appear complete or not at all.

It knows no tensors. Invariant: a name in the destination directory holds a whole file that the disk has confirmed: it
is written under a hidden temporary name, synced, and renamed.
"""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

_COPY_BYTES = 8 * 2**20


class SourceFiles:
    """Open files of a checkpoint, shared by threads; reads have no position, so they do not disturb one another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}

    def read(self, file: Path, start_byte: int, num_bytes: int) -> np.ndarray:
        """Bytes as a new uint8 array.

        Raises:
            RuntimeError: a file that cannot be read, or that became shorter.
        """
        buffer = np.empty(num_bytes, dtype=np.uint8)
        view, done = buffer.data, 0
        try:
            descriptor = self._descriptor(file)
            while done < num_bytes:
                count = os.preadv(descriptor, [view[done:]], start_byte + done)
                if count == 0:
                    raise RuntimeError(f"{file} ended {num_bytes - done} bytes early; it changed while it was read")
                done += count
        except OSError as error:
            raise RuntimeError(f"cannot read {file}: {error.strerror}; run the same command again to go on") from error
        return buffer

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            return self._descriptors[file]


class NewFile:
    """A file on its way. Threads may write different bytes of it at once."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        """Raises RuntimeError as ``write``."""
        self.path = path
        self._num_bytes = num_bytes
        self._partial = partial_path(path)
        self._descriptor = self._guarded(lambda: os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644))

    def write(self, data: bytes | np.ndarray, start_byte: int) -> None:
        """Raises RuntimeError naming file, needed and free bytes when the disk takes no more."""
        whole = memoryview(data) if isinstance(data, bytes) else data.data
        if whole.nbytes == 0:
            return  # and Python cannot cast a view with a zero in its shape
        view, done = whole.cast("B"), 0
        while done < len(view):
            done += self._guarded(lambda: os.pwrite(self._descriptor, view[done:], start_byte + done))  # noqa: B023
        # On Linux this starts the write to the disk, which then goes on beside the arithmetic instead of all at the
        # sync; and a file that nobody is about to read does not push others out of memory.
        self._guarded(lambda: os.posix_fadvise(self._descriptor, start_byte, done, os.POSIX_FADV_DONTNEED))

    def sync(self) -> None:
        """What was written is on the disk. Raises as ``write``."""
        self._guarded(lambda: os.fsync(self._descriptor))

    def finish(self) -> None:
        """Sync, and the file appears under its name. Raises as ``write``."""
        self.sync()
        found = os.fstat(self._descriptor).st_size
        assert found == self._num_bytes, f"{self.path}: wrote {found} of {self._num_bytes} bytes"
        self._guarded(lambda: os.replace(self._partial, self.path))
        self._guarded(lambda: sync_directory(self.path.parent))
        os.close(self._descriptor)

    def discard(self) -> None:
        os.close(self._descriptor)
        self._partial.unlink(missing_ok=True)

    def _guarded(self, action: Callable[[], int | None]) -> int:
        try:
            return action() or 0
        except OSError as error:
            free = shutil.disk_usage(self.path.parent).free
            raise RuntimeError(
                f"cannot write {self.path}: {error.strerror}; the file needs {self._num_bytes} bytes, and "
                f"{free} are free in {self.path.parent}. Finished files are kept: make room and run the same "
                "command again"
            ) from error


def write_file(path: Path, content: bytes) -> None:
    """Raises RuntimeError as ``NewFile``."""
    new = NewFile(path, len(content))
    try:
        new.write(content, 0)
    except RuntimeError:
        new.discard()
        raise
    new.finish()


def copy_file(source: Path, destination: Path) -> None:
    """Raises RuntimeError as ``NewFile`` and ``SourceFiles``."""
    files, num_bytes = SourceFiles(), source.stat().st_size
    new = NewFile(destination, num_bytes)
    try:
        for start in range(0, num_bytes, _COPY_BYTES):
            new.write(files.read(source, start, min(_COPY_BYTES, num_bytes - start)), start)
    except RuntimeError:
        new.discard()
        raise
    finally:
        files.close()
    new.finish()


def partial_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def sync_directory(directory: Path) -> None:
    """A rename is on the disk when its directory is."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
