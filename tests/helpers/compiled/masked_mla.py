from argosy.kernels.triton.masked_mla import FLOAT32_TILE, HOPPER_WARPS, PORTABLE_TILE, Tile
from tests.helpers.compiled import SM_90, Kernel

SCALARS = ("scale", "num_tokens", "num_keys", "num_computed", "mask_stride")
STRIDES = (
    *("q_nope_row", "q_nope_head", "q_rope_row", "q_rope_head", "k_nope_row", "k_nope_head", "k_rope_row"),
    *("value_row", "value_head"),
)
TENSORS = ("q_nope", "q_rope", "k_nope", "k_rope", "value", "out")


def attend(tile: Tile, dtype: str, *, has_mask: bool) -> Kernel:
    return Kernel(
        "masked_mla._attend_kernel",
        dict.fromkeys(TENSORS, f"*{dtype}")
        | {"mask": "*i32"}
        | {name: "fp32" if name == "scale" else "i32" for name in (*SCALARS, "heads", *STRIDES)},
        {"N": 128, "P": 64, "V": 128, "HAS_MASK": has_mask}
        | {"BLOCK_QUERIES": tile.block_queries, "BLOCK_KEYS": tile.block_keys},
        num_warps=tile.num_warps,
        multiples_of_16=("heads", *STRIDES),
        instructions=("wgmma.mma_async.sync.aligned", "cp.async.cg.shared.global") if dtype == "bf16" else (),
        num_stages=tile.num_stages,
        label=f"{dtype}{' mask' if has_mask else ''}",
    )


KERNELS = (
    attend(PORTABLE_TILE, "bf16", has_mask=True),
    attend(PORTABLE_TILE, "bf16", has_mask=False),
    attend(FLOAT32_TILE, "fp32", has_mask=True),
)


def attend_on_hopper(*, has_mask: bool, has_vectors: bool) -> Kernel:
    """All heads of DeepSeek-V3.2 on one card."""
    strides = ("q_nope_stride", "q_rope_stride", "k_nope_stride", "value_stride")
    return Kernel(
        "masked_mla_hopper.attend_masked_on_hopper",
        {"mask": "*i32" if has_mask else "*bf16", "mask_vectors": "i32", "heads_together": "i32"}
        | {name: "fp32" if name == "scale" else "i32" for name in (*SCALARS, *strides)},
        {"N": 128, "P": 64, "HAS_MASK": has_mask, "HAS_VECTORS": has_vectors},
        num_warps=HOPPER_WARPS,
        multiples_of_16=strides,
        instructions=("setmaxnreg.dec.sync.aligned.u32", "cp.async.bulk.tensor.2d"),
        label=f"mask {has_mask}, vectors {has_vectors}",
    )


# Not Triton's but Gluon's: compiled by a test of their own.
HOPPER_KERNELS = (
    attend_on_hopper(has_mask=True, has_vectors=True),
    attend_on_hopper(has_mask=True, has_vectors=False),
    attend_on_hopper(has_mask=False, has_vectors=False),
)
BOXES = {"q_nope": [64, 128], "q_rope": [64, 64], "k_nope": [128, 128], "k_rope": [128, 64], "value": [128, 128]}


def compile_for_hopper(kernel: Kernel) -> tuple[str, int]:
    """PTX of one of ``HOPPER_KERNELS``, and the bytes of shared memory that it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from argosy.kernels.triton.masked_mla_hopper import SHARED, attend_masked_on_hopper

    names = attend_masked_on_hopper.arg_names
    boxes = {name: f"tensordesc<bf16{box},{SHARED.value!r}>" for name, box in BOXES.items()}
    arguments = {**boxes, "out": boxes["q_nope"], **kernel.arguments}
    assert set(names) == {*arguments, *kernel.constants}
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, argument in enumerate(names)
        if arguments.get(argument, "").startswith("*") or argument in kernel.multiples_of_16
    }
    signature = {argument: arguments.get(argument, "constexpr") for argument in names}
    constants = {(names.index(argument),): value for argument, value in kernel.constants.items()}
    source = GluonASTSource(attend_masked_on_hopper, signature, constants, attributes)
    options = {"num_warps": kernel.num_warps}
    compiled = triton.compile(source, target=GPUTarget("cuda", SM_90, 32), options=options)
    return compiled.asm["ptx"], compiled.metadata.shared
