"""Every Triton kernel compiles for a Hopper card, on any machine; whole payloads are read in vectors of 16 bytes.

What they compute is checked in ``test_row_ops.py``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module

import pytest

triton = pytest.importorskip("triton")

SM_90 = 90
STRIDES = {"id_stride": "i32", "id_column_stride": "i32", "weight_stride": "i32", "weight_column_stride": "i32"}


@dataclass(frozen=True)
class Kernel:
    """A kernel with the arguments it gets in a model with real dimensions."""

    name: str  # module.function, below argosy.kernels.triton
    arguments: Mapping[str, str]
    constants: Mapping[str, int | bool]
    num_warps: int = 4
    multiples_of_16: tuple[str, ...] = ()  # integers that Triton sees to be such
    is_vectorised: bool = field(default=True)


KERNELS = (
    Kernel(
        "sum_parts._sum_parts_kernel",
        {"parts": "*bf16", "out": "*fp32", "hidden_size": "i32", "part_stride": "i32", "row_stride": "i32"},
        {"NUM_PARTS": 2, "NUM_BLOCKS": 7, "BLOCK": 1024},
        multiples_of_16=("hidden_size", "part_stride", "row_stride"),
    ),
    Kernel(
        "sum_rows._sum_rows_kernel",
        {"rows": "*bf16", "row_ids": "*i64", "weights": "*fp32", "out": "*fp32", "hidden_size": "i32"}
        | {"row_stride": "i32", "id_line_stride": "i32", "id_summand_stride": "i32"}
        | {"weight_line_stride": "i32", "weight_summand_stride": "i32"},
        {"NUM_SUMMANDS": 8, "HAS_WEIGHTS": True, "NUM_BLOCKS": 7, "BLOCK": 1024},
        multiples_of_16=("hidden_size", "row_stride"),
    ),
    Kernel(
        "pack_rows._pack_rows_kernel",
        {"words": "*i32", "topk_ids": "*i32", "weights": "*i32", "message": "*i32", "num_tokens": "i32"}
        | {"num_words": "i32", "row_words": "i32", "word_stride": "i32"}
        | STRIDES,
        {"NUM_IDS": 8, "NUM_BLOCKS": 4, "BLOCK": 1024},
        multiples_of_16=("num_words", "row_words", "word_stride"),
    ),
    Kernel(
        "pack_rows._pack_routes_kernel",
        {"words": "*i32", "topk_ids": "*i32", "weights": "*i32", "counts": "*i32", "places": "*i32", "message": "*i32"}
        | {"sent_rows": "*i64", "num_words": "i32", "row_words": "i32", "word_stride": "i32"}
        | STRIDES,
        {"NUM_IDS": 8, "NUM_RANKS": 2, "NUM_BLOCKS": 4, "BLOCK": 1024},
        multiples_of_16=("num_words", "row_words", "word_stride"),
    ),
    Kernel(
        "pack_rows._count_routes_kernel",
        {"topk_ids": "*i32", "expert_owner": "*i32", "counts": "*i32", "places": "*i32", "num_tokens": "i32"}
        | {"num_experts": "i32", "num_ranks": "i32", "id_stride": "i32", "id_column_stride": "i32"},
        {"NUM_IDS": 8, "NUM_IDS_PADDED": 8, "BLOCK": 2048},
        num_warps=16,
        is_vectorised=False,
    ),
    Kernel(
        "arrange_rows._count_entries_kernel",
        {"topk_ids": "*i32", "expert_map": "*i32", "counts": "*i32", "starts": "*i32", "places": "*i32"}
        | {"num_entries": "i32", "num_experts": "i32", "id_stride": "i32", "id_column_stride": "i32"},
        {"NUM_IDS": 8, "BLOCK": 8192},
        num_warps=32,
        is_vectorised=False,
    ),
    Kernel(
        "arrange_rows._copy_rows_kernel",
        {"x": "*bf16", "topk_ids": "*i32", "expert_map": "*i32", "starts": "*i32", "places": "*i32", "rows": "*bf16"}
        | {"row_ids": "*i64", "hidden_size": "i32", "num_experts": "i32", "num_local_experts": "i32"}
        | {"x_stride": "i32", "id_stride": "i32", "id_column_stride": "i32"},
        {"NUM_IDS": 8, "NUM_BLOCKS": 4, "BLOCK": 2048},
        multiples_of_16=("hidden_size", "x_stride"),
    ),
)


def compile_to_ptx(kernel: Kernel) -> str:
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
    ptx: str = triton.compile(source, target=target, options={"num_warps": kernel.num_warps}).asm["ptx"]
    return ptx


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_kernel_compiles_for_sm_90(kernel: Kernel) -> None:
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter compiles nothing")
    ptx = compile_to_ptx(kernel)
    assert ".target sm_90" in ptx
    vector_loads = re.findall(r"ld\.global[^;]*v4", ptx)
    assert bool(vector_loads) == kernel.is_vectorised, f"{len(vector_loads)} loads of 16 bytes"


def test_no_kernel_is_forgotten() -> None:
    found = set()
    for module_name in ("sum_parts", "sum_rows", "pack_rows", "arrange_rows"):
        module = import_module(f"argosy.kernels.triton.{module_name}")
        found |= {f"{module_name}.{name}" for name in vars(module) if name.endswith("_kernel")}
    assert found == {kernel.name for kernel in KERNELS}
