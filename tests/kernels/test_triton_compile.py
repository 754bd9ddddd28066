"""Every Triton kernel compiles for a Hopper card, on any machine; whole payloads are read in vectors of 16 bytes.

What they compute is checked in tests of their own.
"""

import pkgutil
import re
from importlib import import_module
from itertools import groupby

import pytest

triton = pytest.importorskip("triton")

import argosy.kernels.triton  # noqa: E402 - after the check that there is a Triton
from tests.helpers import compiled  # noqa: E402
from tests.helpers.compiled import Kernel, compile_gluon, compile_to_ptx  # noqa: E402
from tests.helpers.compiled.fp8_gemm import HOPPER_KERNELS as FP8_HOPPER_KERNELS  # noqa: E402

KERNELS: tuple[Kernel, ...] = tuple(
    kernel
    for module in pkgutil.iter_modules(compiled.__path__)
    for kernel in import_module(f"tests.helpers.compiled.{module.name}").KERNELS
)
SHARED_BYTES = 227 * 1024  # what a program may have on Hopper
PRODUCT, WAIT, SUM = "wgmma.mma_async", "wgmma.wait_group.sync.aligned {}", "fma.rn.f32"


def describe(kernel: Kernel) -> str:
    return f"{kernel.name} {kernel.label}".strip()


@pytest.mark.parametrize("kernel", KERNELS, ids=describe)
def test_kernel_compiles_for_sm_90(kernel: Kernel) -> None:
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter compiles nothing")
    ptx = compile_to_ptx(kernel)
    assert ".target sm_90" in ptx
    if kernel.is_vectorised is not None:
        vector_loads = re.findall(r"ld\.global[^;]*v4|cp\.async\.c[ag]\.shared\.global[^;]*0x10", ptx)
        assert bool(vector_loads) == kernel.is_vectorised, f"{len(vector_loads)} loads of 16 bytes"
    for instruction in kernel.instructions:
        assert instruction in ptx, instruction


@pytest.mark.parametrize("kernel", FP8_HOPPER_KERNELS, ids=describe)
def test_loop_for_hopper_in_fp8_compiles(kernel: Kernel) -> None:
    """It fits into shared memory, has two quarters of a block under way at once, adds each one's sums before the next
    product that writes over them, and stores 16 bytes at once.
    """
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter compiles nothing")
    ptx, shared_bytes = compile_gluon(kernel)
    assert shared_bytes <= SHARED_BYTES
    for instruction in kernel.instructions:
        assert instruction in ptx, instruction
    blocks = int(kernel.constants["NUM_UNROLLED"]), 1  # of a stretch, and of those that are left
    steps = re.findall(r"wgmma\.mma_async|wgmma\.wait_group\.sync\.aligned \d|fma\.rn\.f32", ptx)
    loop = []
    for count in blocks:
        loop += [(PRODUCT, 8), (WAIT.format(1), 1), (SUM, 32)]
        loop += [(PRODUCT, 4), (WAIT.format(1), 1), (SUM, 32)] * (4 * count - 2)
        loop += [(WAIT.format(0), 1), (SUM, 32)]
    assert [(step, len(list(run))) for step, run in groupby(steps)] == 2 * loop
    assert "st.global.v4.b32" in ptx


def test_no_kernel_is_forgotten() -> None:
    found = set()
    for module in pkgutil.iter_modules(argosy.kernels.triton.__path__):
        names = vars(import_module(f"argosy.kernels.triton.{module.name}"))
        found |= {f"{module.name}.{name}" for name in names if name.endswith("_kernel")}
    assert found == {kernel.name for kernel in KERNELS}
