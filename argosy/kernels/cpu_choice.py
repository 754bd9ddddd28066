"""What a CPU computes with: compiled loops, or plain torch and numpy. Importing this needs no numba."""

import functools
import warnings
from types import ModuleType

import torch


def loops_for(x: torch.Tensor) -> ModuleType | None:
    """``cpu_loops``, where ``x`` is a CPU's and its numbers are float32, and numba can be imported."""
    return load_loops() if x.is_cpu and x.dtype is torch.float32 else None


@functools.cache
def load_loops() -> ModuleType | None:
    """The first call imports the loops, and on a machine that has never run them compiles them: some 8 seconds."""
    try:
        from argosy.kernels import cpu_loops
    except ImportError as error:  # there is none, or none that fits numpy
        if (error.name or "").startswith("argosy"):
            raise
        warnings.warn(f"steps on a CPU take longer without numba ({error}); pip install numba", stacklevel=2)
        return None
    return cpu_loops
