"""What a Triton kernel is compiled with for a Hopper card: the arguments it gets in a model with real dimensions.

One file here for every module of ``argosy/kernels/triton`` that has kernels, with its ``KERNELS``;
``tests/kernels/test_triton_compile.py`` finds and compiles them all. Invariant: importing needs Triton, and no card.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module

SM_90 = 90


@dataclass(frozen=True)
class Kernel:
    """A kernel with the arguments it gets in a model with real dimensions."""

    name: str  # module.function, below argosy.kernels.triton
    arguments: Mapping[str, str]
    constants: Mapping[str, int | bool | float]
    num_warps: int = 4
    multiples_of_16: tuple[str, ...] = ()  # integers that Triton sees to be such
    is_vectorised: bool | None = True  # reads 16 bytes at once; None: it does not matter
    instructions: tuple[str, ...] = ()  # what the program must hold, as of the tensor cores
    num_stages: int = 3
    label: str = ""  # tells variants of a kernel apart


def compile_to_ptx(kernel: Kernel) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = kernel.name.split(".")
    function = getattr(import_module(f"argosy.kernels.triton.{module}"), name)
    names = function.arg_names
    assert set(names) == {*kernel.arguments, *kernel.constants}
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, argument in enumerate(names)
        if kernel.arguments.get(argument, "").startswith("*") or argument in kernel.multiples_of_16
    }
    signature = {argument: kernel.arguments.get(argument, "constexpr") for argument in names}
    constants = {(names.index(argument),): value for argument, value in kernel.constants.items()}
    source = ASTSource(function, signature, constants, attributes)
    target = GPUTarget("cuda", SM_90, 32)
    ptx: str = triton.compile(
        source, target=target, options={"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    ).asm["ptx"]
    return ptx


def compile_gluon(kernel: Kernel) -> tuple[str, int]:
    """PTX and bytes of shared memory. A descriptor is given as ``i8[64,128]``: its layout is made here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    module, name = kernel.name.split(".")
    function = getattr(import_module(f"argosy.kernels.triton.{module}"), name)
    arguments = dict(kernel.arguments)
    for argument, kind in arguments.items():
        if kind.endswith("]"):
            dtype, block = kind[:-1].split("[")
            shape = [int(number) for number in block.split(",")]
            layout = gl.NVMMASharedLayout.get_default_for(shape, {"i8": gl.int8, "fp8e4nv": gl.float8e4nv}[dtype])
            arguments[argument] = f"tensordesc<{kind},{layout!r}>"
    names = function.arg_names
    assert set(names) == {*arguments, *kernel.constants}
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, argument in enumerate(names)
        if arguments.get(argument, "").startswith("*") or argument in kernel.multiples_of_16
    }
    signature = {argument: arguments.get(argument, "constexpr") for argument in names}
    constants = {(names.index(argument),): value for argument, value in kernel.constants.items()}
    source = GluonASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", SM_90, 32), options={"num_warps": kernel.num_warps})
    return compiled.asm["ptx"], compiled.metadata.shared
