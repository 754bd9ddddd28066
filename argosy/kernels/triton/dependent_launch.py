"""Programmatic dependent launch: a kernel's programs start while the kernel before it ends, and wait for it inside.

What depends on no other kernel goes before ``wait_for_inputs``: a norm's weight, the first weights of a product. A
kernel that is launched with ``launch_pdl=IS_ON`` must call ``wait_for_inputs`` in every program, before it reads what
another kernel wrote and before it writes anything (``tests/unit/test_dependent_launch.py`` holds all to it); when it
has ended, so has every kernel before it, and the one behind it may rely on all of them. A kernel that is launched
otherwise, such as torch's, starts when the one before it has ended, whatever that allowed. Recordings keep such
launches. Invariant: with ``IS_ON`` False nothing here is compiled into anything; the interpreter knows no such
launches.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

_IS_WANTED = True  # measured on one H200: 0.2 to 2 % of a decode step
IS_ON = _IS_WANTED and not triton.knobs.runtime.interpret
_IS_ON: tl.constexpr = tl.constexpr(IS_ON)
LINE_BYTES: tl.constexpr = tl.constexpr(128)


@triton.jit
def let_next_start():
    """The next kernel's programs may take what room is left; they still wait for this one's end."""
    if _IS_ON:
        cuda.gdc_launch_dependents()


@triton.jit
def wait_for_inputs():
    """Until all kernels before this one have ended, and what they wrote can be read."""
    if _IS_ON:
        cuda.gdc_wait()


@triton.jit
def fetch_lines(places):
    """Ask for the lines that ``places``, pointers to memory that no kernel writes, lie in: into the card's cache."""
    if _IS_ON:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [places.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
