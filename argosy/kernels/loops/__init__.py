"""What a CPU does in plain loops, compiled by numba: everything between the products of a step of few tokens.

Each operation is one pass in one thread. Plain torch takes five to twenty calls for it, and behind a product that has
filled the cache with weights every call finds its own code gone (``docs/log.md``, 2026-11-23). ``cpu_loops.py`` says
where tensors lie; numba stays out of everything else. Numbers are float32 unless a docstring says otherwise.

Importing this package compiles it, once for a machine and a version: 5 to 15 s on two cores, afterwards 0.4 s and as
much for numba.
"""

from argosy.kernels.loops.compiled import one_process_at_a_time

with one_process_at_a_time():
    from argosy.kernels.loops import experts, norms, rotary, topk

__all__ = ["experts", "norms", "rotary", "topk"]
