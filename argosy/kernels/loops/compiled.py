"""How the loops are compiled: by numba, when they are imported, for the types that their signatures name.

What is compiled is kept on disk and made anew when its file changes. Who changes a loop that is part of another file's
must delete ``__pycache__``.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from numba import njit

Loop = TypeVar("Loop", bound=Callable[..., object])

# Sums in any order and products joined with additions, which makes loops vector instructions. NaN and infinities keep
# their meaning.
_FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}


def compiled(signature: str) -> Callable[[Loop], Loop]:
    """``signature``: numba's; ``i8`` for sizes, strides and addresses (``memory.py``), ``f4`` for float32. Where no
    directory may be written to, every process compiles for itself."""

    def compile_loop(loop: Loop) -> Loop:
        options = {"fastmath": _FAST_MATH, "nogil": True, "error_model": "numpy"}
        try:
            return njit(signature, cache=True, **options)(loop)  # type: ignore[no-any-return]
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            return njit(signature, **options)(loop)  # type: ignore[no-any-return]

    return compile_loop


def inlined(loop: Loop) -> Loop:
    """Becomes part of the loops that call it: what is constant there is constant in it, which vectors may depend on."""
    return njit(loop, inline="always")  # type: ignore[no-any-return]


@contextlib.contextmanager
def one_process_at_a_time() -> Iterator[None]:
    """Of ranks that start together one compiles, and the others load what it made. The directory itself is locked."""
    lock = os.open(Path(__file__).parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # file systems of a network may have no locks: all compile then
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
