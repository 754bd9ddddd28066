"""Every Triton kernel compiles for a Hopper card, on any machine; whole payloads are read in vectors of 16 bytes.

What they compute is checked in ``test_row_ops.py``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module

import pytest

triton = pytest.importorskip("triton")

from argosy.kernels.triton.w8a8_gemm import (  # noqa: E402 - after the check that there is a Triton
    GATED_TILES,
    GATED_WIDE_TILE,
    PLAIN_TILES,
    PLAIN_WIDE_TILE,
    Tile,
)

SM_90 = 90
STRIDES = {"id_stride": "i32", "id_column_stride": "i32", "weight_stride": "i32", "weight_column_stride": "i32"}


@dataclass(frozen=True)
class Kernel:
    """A kernel with the arguments it gets in a model with real dimensions."""

    name: str  # module.function, below argosy.kernels.triton
    arguments: Mapping[str, str]
    constants: Mapping[str, int | bool | float]
    num_warps: int = 4
    multiples_of_16: tuple[str, ...] = ()  # integers that Triton sees to be such
    is_vectorised: bool = field(default=True)
    instruction: str = ""  # of the tensor cores, which the program must hold
    num_stages: int = 3


def w8a8_gemm(tile: Tile, *, is_gated: bool, is_dense: bool = False) -> Kernel:
    """The kernel with a tile of ``w8a8_gemm.py``; what it loads comes through the tile loader, not in vectors."""
    rows = tile.block_n if tile.is_swapped else tile.block_rows
    assert rows % 64 == 0, "shorter sides do not fill the instruction"
    return Kernel(
        "w8a8_gemm._w8a8_kernel",
        {
            "x_tiles": f"tensordesc<i8[{tile.block_rows},{tile.block_k}]>",
            "weight_tiles": f"tensordesc<i8[{tile.block_n},{tile.block_k}]>",
        }
        | {"x_scale": "*fp32", "weight_scale": "*fp32", "counts": "*i32", "out": "*bf16", "num_rows": "i32"}
        | {"num_experts": "i32", "num_columns": "i32", "out_features": "i32", "in_features": "i32"},
        {"NUM_EXPERTS": 1 if is_dense else 256, "BLOCK_ROWS": tile.block_rows, "BLOCK_N": tile.block_n}
        | {"BLOCK_K": tile.block_k, "GROUP_ROWS": tile.group_rows, "IS_SWAPPED": tile.is_swapped}
        | {"IS_GATED": is_gated, "IS_DENSE": is_dense},
        num_warps=tile.num_warps,
        multiples_of_16=("num_columns", "out_features", "in_features"),
        is_vectorised=False,
        instruction="wgmma.mma_async.sync.aligned.m64n",
        num_stages=tile.num_stages,
    )


KERNELS = (
    *(w8a8_gemm(tile, is_gated=False) for _, tile in PLAIN_TILES),
    w8a8_gemm(PLAIN_WIDE_TILE, is_gated=False, is_dense=True),
    *(w8a8_gemm(tile, is_gated=True) for _, tile in GATED_TILES),
    w8a8_gemm(GATED_WIDE_TILE, is_gated=True),
    Kernel(
        "quantize._quantize_kernel",
        {"x": "*bf16", "quantized": "*i8", "scale": "*fp32", "size": "i32", "row_stride": "i32"},
        {"MIN_AMAX": 1e-12, "BLOCK": 8192},
        num_warps=16,
        multiples_of_16=("size", "row_stride"),
    ),
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
    ptx: str = triton.compile(
        source, target=target, options={"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    ).asm["ptx"]
    return ptx


def describe(kernel: Kernel) -> str:
    rows, columns = kernel.constants.get("BLOCK_ROWS"), kernel.constants.get("BLOCK_N")
    return f"{kernel.name} {rows}x{columns}" if rows else kernel.name


@pytest.mark.parametrize("kernel", KERNELS, ids=describe)
def test_kernel_compiles_for_sm_90(kernel: Kernel) -> None:
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter compiles nothing")
    ptx = compile_to_ptx(kernel)
    assert ".target sm_90" in ptx
    vector_loads = re.findall(r"ld\.global[^;]*v4", ptx)
    if not kernel.instruction:
        assert bool(vector_loads) == kernel.is_vectorised, f"{len(vector_loads)} loads of 16 bytes"
    else:
        assert kernel.instruction in ptx and ".s32.s8.s8" in ptx and "cp.async.bulk.tensor" in ptx


def test_no_kernel_is_forgotten() -> None:
    found = set()
    for module_name in ("sum_parts", "sum_rows", "pack_rows", "arrange_rows", "w8a8_gemm", "quantize"):
        module = import_module(f"argosy.kernels.triton.{module_name}")
        found |= {f"{module_name}.{name}" for name in vars(module) if name.endswith("_kernel")}
    assert found == {kernel.name for kernel in KERNELS}
