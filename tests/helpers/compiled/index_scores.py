from argosy.kernels.triton.index_scores import (
    FEW_HOPPER_TILES,
    FEW_TILES,
    HOPPER_TILES,
    MANY_TILES,
    MIN_ROWS,
)
from tests.helpers.compiled import SM_90, Kernel

HEADS, DIM, BLOCK_SIZE = 64, 128, 64
LENGTHS = {"num_rows": "i32", "num_tokens": "i32", "max_seq_len": "i32", "table_stride": "i32", "out_stride": "i32"}
# Triton's and the instruction's names of the numbers in the cache, and their bytes.
FORMATS = (("i8", ".s32.s8.s8", 1), ("fp8e4nv", ".f32.e4m3.e4m3", 1), ("bf16", ".f32.bf16.bf16", 2))


def score(number: str, product: str, num_bytes: int, *, is_few: bool, num_rows: int = 128) -> Kernel:
    tile = (FEW_TILES if is_few else MANY_TILES)[num_bytes]
    queries = {"query": f"*{number}"} if is_few else {"queries": f"tensordesc<{number}[{HEADS},{DIM}]>"}
    return Kernel(
        "index_scores._score_keys_kernel" if is_few else "index_scores._score_tokens_kernel",
        queries
        | {"keys": f"*{number}", "scales": "*fp32" if num_bytes == 1 else f"*{number}", "weights": "*fp32"}
        | {"block_table": "*i32", "num_visible": "*i32", "out": "*fp32"}
        | LENGTHS,
        {"BLOCK_SIZE": BLOCK_SIZE, "KEY_STRIDE": DIM + 4 if num_bytes == 1 else DIM, "HAS_SCALES": num_bytes == 1}
        | {"HEADS": HEADS, "DIM": DIM, "BLOCK_KEYS": tile.block_keys}
        | ({"NUM_ROWS": num_rows} if is_few else {"BLOCK_TOKENS": tile.block_tokens}),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        multiples_of_16=("out_stride",),
        is_vectorised=None,
        instructions=("wgmma.mma_async.sync.aligned.m64n64", product),
        label=f"{number} {num_rows}" if is_few else number,
    )


KERNELS = (
    *(score(*numbers, is_few=is_few) for numbers in FORMATS for is_few in (True, False)),
    score(*FORMATS[0], is_few=True, num_rows=MIN_ROWS),
)


def score_on_hopper(number: str, product: str, num_bytes: int) -> Kernel:
    tile = HOPPER_TILES[num_bytes]
    return Kernel(
        "index_scores_hopper.score_tokens_on_hopper",
        {"keys": f"*{number}", "scales": "*fp32" if num_bytes == 1 else f"*{number}"}
        | {"block_table": "*i32", "num_visible": "*i32", "out": "*fp32"}
        | {name: kind for name, kind in LENGTHS.items() if name != "num_rows"},
        {"BLOCK_SIZE": BLOCK_SIZE, "KEY_STRIDE": DIM + 4 if num_bytes == 1 else DIM, "HAS_SCALES": num_bytes == 1}
        | {"NUMBER_BYTES": num_bytes, "BLOCK_TOKENS": tile.block_tokens, "NUM_STAGES": tile.num_stages}
        | {"TURN_TOKENS": tile.turn_tokens},
        num_warps=tile.num_warps,
        instructions=("wgmma.mma_async.sync.aligned.m64n64", product, "cp.async.bulk.tensor.2d"),
        label=number,
    )


# Not Triton's but Gluon's: compiled by a test of their own.
HOPPER_KERNELS = tuple(score_on_hopper(*numbers) for numbers in FORMATS)


def compile_for_hopper(kernel: Kernel) -> tuple[str, int]:
    """PTX of one of ``HOPPER_KERNELS``, and the bytes of shared memory that it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from argosy.kernels.triton.index_scores_hopper import score_tokens_on_hopper

    names = score_tokens_on_hopper.arg_names
    bits = 8 * int(kernel.constants["NUMBER_BYTES"])
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2)
    line = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    arguments = {
        **kernel.arguments,
        "queries": f"tensordesc<{kernel.label}[{HEADS}, {DIM}],{layout!r}>",
        "weights": f"tensordesc<fp32[{HEADS}],{line!r}>",
    }
    assert set(names) == {*arguments, *kernel.constants}
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, argument in enumerate(names)
        if arguments.get(argument, "").startswith("*") or argument in kernel.multiples_of_16
    }
    signature = {argument: arguments.get(argument, "constexpr") for argument in names}
    constants = {(names.index(argument),): value for argument, value in kernel.constants.items()}
    source = GluonASTSource(score_tokens_on_hopper, signature, constants, attributes)
    options = {"num_warps": kernel.num_warps}
    compiled = triton.compile(source, target=GPUTarget("cuda", SM_90, 32), options=options)
    return compiled.asm["ptx"], compiled.metadata.shared


def score_few_on_hopper(number: str, product: str, num_bytes: int, *, is_whole: bool) -> Kernel:
    tile = FEW_HOPPER_TILES[num_bytes]
    has_scales = num_bytes == 1
    width = "0x10" if is_whole or not has_scales else "0x4"
    return Kernel(
        "index_scores_few_hopper.score_few_on_hopper",
        {"query": f"*{number}", "keys": f"*{number}", "scales": "*fp32" if has_scales else f"*{number}"}
        | {"weights": "*fp32", "block_table": "*i32", "num_visible": "*i32", "out": "*fp32"}
        | LENGTHS,
        {"BLOCK_SIZE": BLOCK_SIZE, "KEY_STRIDE": DIM + 4 if has_scales else DIM, "HAS_SCALES": has_scales}
        | {"NUMBER_BYTES": num_bytes, "HEADS": HEADS, "DIM": DIM, "NUM_ROWS": 128, "NUM_STAGES": tile.num_stages}
        | {"IS_WHOLE": is_whole},
        num_warps=tile.num_warps,
        instructions=("wgmma.mma_async.sync.aligned.m64n64", product, f", {width}, {width};"),
        label=f"{number}{' whole' * is_whole}",
    )


# Gluon's too, without descriptors.
FEW_HOPPER_KERNELS = tuple(
    score_few_on_hopper(*numbers, is_whole=is_whole)
    for numbers in FORMATS
    for is_whole in ((False, True) if numbers[2] == 1 else (False,))
)
