from importlib import import_module

from argosy.kernels.triton.sparse_mla import (
    ENCODED_TILES,
    FLOAT32_TILE,
    HOPPER_TILE,
    PAIRED_WARPS,
    PLAIN_TILES,
    PORTABLE_ENCODED_TILE,
    PORTABLE_TILE,
    Tile,
)
from tests.helpers.compiled import SM_90, Kernel

NUMBERS = {"plain": "bf16", "int8": "i8", "fp8": "fp8e4nv"}
TENSOR_CORES = ("wgmma.mma_async.sync.aligned.m64n256k16", "cp.async.cg.shared.global")


def attend(tile: Tile, rows: str = "plain", *, is_share: bool = False, dtype: str = "bf16") -> Kernel:
    """The kernel with a tile of ``sparse_mla.py``, all heads of DeepSeek-V3.2 on one card."""
    is_plain = rows == "plain"
    numbers = dtype if is_plain else NUMBERS[rows]
    few_instructions = () if tile == FLOAT32_TILE else ("mma.sync", "cp.async.cg.shared.global")
    return Kernel(
        "sparse_mla_hopper.attend_on_hopper" if tile.is_hopper else "sparse_mla._attend_kernel",
        {"query": f"*{dtype}", "numbers": f"*{numbers}", "scales": f"*{dtype}" if is_plain else "*fp32"}
        | {"ropes": f"*{dtype}", "slots": "*i64", "out": "*fp32" if is_share else f"*{dtype}", "log_sums": "*fp32"}
        | {"scale": "fp32", "heads": "i32", "num_keys": "i32", "slot_stride": "i32", "token_stride": "i32"}
        | {"head_stride": "i32", "share_keys": "i32"}
        | ({"num_shares": "i32"} if is_share else {}),
        {"R": 512, "P": 64, "WIDTH": 576 if is_plain else 656, "GROUP_SIZE": 0 if is_plain else 128}
        | {"BLOCK_HEADS": tile.block_heads, "BLOCK_KEYS": tile.block_keys, "SHARE_SIZE": 256 if is_share else 2048}
        | {"IS_FULL": False, "IS_SHARE": is_share}
        | ({} if is_share else {"num_shares": 1}),
        num_warps=tile.num_warps,
        multiples_of_16=("heads", "num_keys", "slot_stride", "token_stride", "head_stride", "share_keys"),
        instructions=TENSOR_CORES if tile.block_heads >= 64 else few_instructions,
        num_stages=tile.num_stages,
        label=f"{tile.block_heads}x{tile.block_keys} {rows}{' share' if is_share else ''}",
    )


PORTABLE_KERNELS = (
    attend(PLAIN_TILES[0][1]),
    attend(PORTABLE_TILE),
    attend(PORTABLE_TILE, is_share=True),
    attend(ENCODED_TILES[0][1], "int8"),
    attend(PORTABLE_ENCODED_TILE, "fp8"),
    attend(FLOAT32_TILE, dtype="fp32"),
)
# Not Triton's but Gluon's: compiled by a test of their own.
HOPPER_KERNELS = (
    attend(HOPPER_TILE),
    attend(HOPPER_TILE, is_share=True),
    attend(ENCODED_TILES[-1][1], "int8"),
    attend(ENCODED_TILES[-1][1], "fp8", is_share=True),
)
KERNELS = (
    *PORTABLE_KERNELS,
    Kernel(
        "sparse_mla._join_kernel",
        {"parts": "*fp32", "log_sums": "*fp32", "out": "*bf16", "heads": "i32"},
        {"R": 512, "NUM_SHARES": 16},
        multiples_of_16=("heads",),
    ),
)


def attend_in_pairs(*, is_full: bool) -> Kernel:
    sizes = ("heads", "num_keys", "slot_stride", "token_stride", "head_stride")
    return Kernel(
        "sparse_mla_pairs.attend_in_pairs",
        {"query": "*bf16", "numbers": "*bf16", "slots": "*i64", "out": "*bf16", "scale": "fp32"}
        | dict.fromkeys(sizes, "i32"),
        {"R": 512, "WIDTH": 576, "NUM_PLACES": 2048, "IS_FULL": is_full},
        num_warps=PAIRED_WARPS,
        multiples_of_16=sizes,
        instructions=(*TENSOR_CORES, "setmaxnreg.inc.sync.aligned.u32"),
        label="full" if is_full else "",
    )


PAIRED_KERNELS = (attend_in_pairs(is_full=True), attend_in_pairs(is_full=False))


def compile_for_hopper(kernel: Kernel) -> tuple[str, int]:
    """PTX of one of ``HOPPER_KERNELS`` or ``PAIRED_KERNELS``, and the bytes of shared memory that it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

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
    source = GluonASTSource(function, signature, constants, attributes)
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", SM_90, 32), options=options)
    return compiled.asm["ptx"], compiled.metadata.shared
