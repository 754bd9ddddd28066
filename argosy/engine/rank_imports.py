"""What ranks import, by name: a process from which they are forked imports it once for all of them.

Importing this imports none of it.
"""

import contextlib
import importlib
from pathlib import Path

_ACCELERATORS = "nvidia[0-9]*", "davinci[0-9]*"  # device files of NVIDIA's and Ascend's drivers


def modules_of_ranks(device_files: Path = Path("/dev")) -> tuple[str, ...]:
    """The engine, and what only a CPU computes with, unless there is an accelerator."""
    has_accelerator = any(next(device_files.glob(pattern), None) for pattern in _ACCELERATORS)
    return ("argosy.engine.worker",) if has_accelerator else ("argosy.engine.worker", "argosy.kernels.loops")


def import_as_rank() -> None:
    """What a rank would import, here; without numba, what there is."""
    for name in modules_of_ranks():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
