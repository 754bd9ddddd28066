"""What a CPU computes with: compiled loops, or plain torch and numpy. Importing this needs no numba."""

import functools
import warnings
from types import ModuleType

import torch

# Loops have one thread. For more numbers torch is as fast on two cores (1,024 rows of 256), and may have more of them.
_MAX_NUMBERS = 2**18
MAX_SCORES = 2**13  # of ``select_topk_slots``: numpy's sort takes half the time for 128 rows of 176, twice for 8


def loops_for(x: torch.Tensor, max_numbers: int = _MAX_NUMBERS) -> ModuleType | None:
    """``cpu_loops``, where ``x`` is a CPU's and holds few numbers, in float32, and numba can be imported."""
    is_taken = x.is_cpu and x.dtype is torch.float32 and x.numel() <= max_numbers
    return load_loops() if is_taken else None


@functools.cache
def load_loops() -> ModuleType | None:
    """The first call imports the loops, and on a machine that has never run them compiles them: 5 to 15 s."""
    try:
        from argosy.kernels import cpu_loops
    except ImportError as error:  # there is none, or none that fits numpy
        if (error.name or "").startswith("argosy"):
            raise
        warnings.warn(f"steps on a CPU take longer without numba ({error}); pip install numba", stacklevel=2)
        return None
    return cpu_loops
