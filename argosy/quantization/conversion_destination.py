"""The directory that a conversion writes: may it be written, is there room, what else belongs in it.

It writes no weights. Invariant: a file that a conversion did not write itself is never deleted or replaced.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from argosy.quantization.conversion_manifest import MANIFEST_NAME
from argosy.quantization.file_pieces import partial_path
from argosy.quantization.safetensors_headers import INDEX_NAME, name_some

# Weights in any format, which the conversion replaces.
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf")


def check_destination(source: Path, destination: Path, *, overwrite: bool) -> None:
    """Writes nothing.

    Raises:
        ValueError: the source itself, a place inside of it, or a directory with other things in it.
    """
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"destination {destination} is a file; name a directory")
    if destination.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"destination {destination} is the source, or inside of it; name another directory")
    if not destination.is_dir() or (destination / MANIFEST_NAME).is_file():
        return
    found = [entry.name for entry in destination.iterdir() if entry != partial_path(destination / MANIFEST_NAME)]
    if found:
        flag = ", and --overwrite deletes conversions only" if overwrite else ""
        raise ValueError(
            f"destination {destination} holds other files ({name_some(found)}) and no unfinished conversion{flag}; "
            "name a new or an empty directory"
        )


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """One conversion at a time; the lock ends with the process. A file system without locks is trusted.

    Raises:
        RuntimeError: another process holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        _try_lock(directory, descriptor)
        yield
    finally:
        os.close(descriptor)


def _try_lock(directory: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RuntimeError(f"another argosy quantize is writing {directory}; wait for it or stop it") from error
    except OSError:
        return  # network file systems may know no locks; two conversions of one task would write equal bytes anyway


def remove_former(destination: Path) -> None:
    """Delete what a former conversion wrote here; its index first, so that nothing half-deleted looks whole.

    Raises:
        ValueError: its record cannot be read, so what it wrote is not known.
    """
    manifest = destination / MANIFEST_NAME
    try:
        outputs = json.loads(manifest.read_bytes().splitlines()[0])["outputs"]
        former = [destination / name for name in (INDEX_NAME, *map(str, outputs))]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{manifest} cannot be read, so it is not known what to delete; delete {destination}"
        ) from error
    root = destination.resolve()
    for file in (*former, manifest):
        if not file.resolve().is_relative_to(root):
            raise ValueError(f"{manifest} names {file}, which is not in {destination}; delete {destination} yourself")
        file.unlink(missing_ok=True)
        partial_path(file).unlink(missing_ok=True)


def check_room(destination: Path, num_needed_bytes: int) -> None:
    """Raises RuntimeError if the disk has less."""
    num_free_bytes = shutil.disk_usage(destination).free
    if num_free_bytes < num_needed_bytes:
        raise RuntimeError(
            f"{destination} has {num_free_bytes} bytes free, and the conversion needs {num_needed_bytes} more; make "
            "room or name a directory on another disk"
        )


def reclaimable_bytes(files: Iterable[Path]) -> int:
    """What the half-written forms of ``files`` take now; they are written anew."""
    partials = (partial_path(file) for file in files)
    return sum(partial.stat().st_blocks * 512 for partial in partials if partial.is_file())


def list_other_files(source: Path) -> tuple[Path, ...]:
    """Tokenizer, templates, licence and so on, relative to ``source``: not weights, config.json, hidden files."""
    found = []
    for folder, folder_names, file_names in os.walk(source, followlinks=False):
        folder_names[:] = sorted(name for name in folder_names if not name.startswith("."))
        for name in sorted(file_names):
            is_other = not name.startswith(".") and not name.endswith(_WEIGHT_SUFFIXES) and name != MANIFEST_NAME
            if is_other:
                found.append((Path(folder) / name).relative_to(source))
    return tuple(file for file in found if file != Path("config.json"))
