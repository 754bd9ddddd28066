"""Tells a ``LateCompilations`` of every kernel that Triton compiles. Nothing is counted here.

Triton calls one function for the whole process before it compiles. Invariant: whoever was called before still is, and
decides as ever whether the kernel is compiled at all; only an earlier counter is replaced.
"""

import triton

from argosy.kernels.compilations import LateCompilations


class CompilationHook:
    """What Triton calls."""

    def __init__(self, counter: LateCompilations, previous: object) -> None:
        self._counter = counter
        self.previous = previous

    def __call__(self, **details: object) -> object:
        """``details``: Triton's own (3.6 and 3.7): among them ``fn`` with the kernel's name, and ``key``."""
        name = getattr(details["fn"], "name", str(details["fn"]))
        self._counter.observe(name, str(details["key"]))
        return self.previous(**details) if callable(self.previous) else None


def watch_compilations(counter: LateCompilations) -> None:
    """Until the next call: a process counts for one engine."""
    previous = triton.knobs.runtime.jit_cache_hook
    if isinstance(previous, CompilationHook):
        previous = previous.previous
    triton.knobs.runtime.jit_cache_hook = CompilationHook(counter, previous)
