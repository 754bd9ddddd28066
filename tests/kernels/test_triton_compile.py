"""Every Triton kernel compiles for a Hopper card, on any machine; whole payloads are read in vectors of 16 bytes.

What they compute is checked in tests of their own.
"""

import pkgutil
import re
from importlib import import_module

import pytest

triton = pytest.importorskip("triton")

import argosy.kernels.triton  # noqa: E402 - after the check that there is a Triton
from tests.helpers import compiled  # noqa: E402
from tests.helpers.compiled import Kernel, compile_to_ptx  # noqa: E402

KERNELS: tuple[Kernel, ...] = tuple(
    kernel
    for module in pkgutil.iter_modules(compiled.__path__)
    for kernel in import_module(f"tests.helpers.compiled.{module.name}").KERNELS
)


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


def test_no_kernel_is_forgotten() -> None:
    found = set()
    for module in pkgutil.iter_modules(argosy.kernels.triton.__path__):
        names = vars(import_module(f"argosy.kernels.triton.{module.name}"))
        found |= {f"{module.name}.{name}" for name in names if name.endswith("_kernel")}
    assert found == {kernel.name for kernel in KERNELS}
