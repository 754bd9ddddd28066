"""``dependent_launch.py`` for kernels that are written in Gluon: same words, same rules.

A kernel calls both before ``gl.warp_specialize``, so that they hold for all of its warps. Invariant: as there.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from argosy.kernels.triton.dependent_launch import IS_ON

_IS_ON = gl.constexpr(IS_ON)


@gluon.jit
def let_next_start():
    if _IS_ON:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def wait_for_inputs():
    if _IS_ON:
        gl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
