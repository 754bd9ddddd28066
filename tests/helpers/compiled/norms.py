from tests.helpers.compiled import Kernel


def rms_norm(size: int, *, delta: str = "", is_quantized: bool = False, is_grouped: bool = False) -> Kernel:
    """``delta``: the type of what is added, if anything is."""
    block = 1 << (size - 1).bit_length()
    kind = "int8" if is_quantized else "e4m3" if is_grouped else ""
    return Kernel(
        "norms._rms_norm_kernel",
        {"x": "*bf16", "delta": delta or "*bf16", "weight": "*fp32", "total": "*bf16", "normed": "*bf16"}
        | {"quantized": "*fp8e4nv" if is_grouped else "*i8", "scale": "*fp32", "num_rows": "i32", "size": "i32"}
        | {"x_stride": "i32", "delta_stride": "i32", "normed_stride": "i32", "eps": "fp32"},
        {"HAS_DELTA": bool(delta), "IS_QUANTIZED": is_quantized, "IS_GROUPED": is_grouped}
        | {"HAS_UE8M0_SCALES": True, "MIN_AMAX": 1e-12, "BLOCK": block},
        num_warps=min(32, max(1, block // 512)),
        multiples_of_16=("size", "x_stride", "delta_stride", "normed_stride"),
        label=f"{size}{'+' + delta if delta else ''} {kind}".strip(),
    )


def silu_mul_quantize(width: int) -> Kernel:
    block = 1 << (width - 1).bit_length()
    return Kernel(
        "norms._silu_mul_quantize_kernel",
        {"gate_up": "*bf16", "quantized": "*i8", "scale": "*fp32", "width": "i32", "row_stride": "i32"},
        {"MIN_AMAX": 1e-12, "BLOCK": block},
        num_warps=min(32, max(1, block // 512)),
        multiples_of_16=("width", "row_stride"),
        label=f"{width}",
    )


KERNELS = (
    rms_norm(512),
    rms_norm(7168),
    rms_norm(7168, delta="*bf16"),
    rms_norm(1536, is_quantized=True),
    rms_norm(7168, delta="*fp32", is_quantized=True),
    rms_norm(7168, delta="*bf16", is_quantized=True),
    rms_norm(18432, delta="*bf16", is_quantized=True),
    rms_norm(1536, is_grouped=True),
    rms_norm(7168, delta="*bf16", is_grouped=True),
    Kernel(
        "norms._silu_mul_kernel",
        {"gate_up": "*bf16", "out": "*bf16", "width": "i32", "row_stride": "i32"},
        {"NUM_BLOCKS": 2, "BLOCK": 1024},
        multiples_of_16=("width", "row_stride"),
    ),
    Kernel(
        "norms._silu_mul_real_rows_kernel",
        {"gate_up": "*bf16", "counts": "*i32", "out": "*bf16", "width": "i32", "row_stride": "i32"}
        | {"num_experts": "i32"},
        {"NUM_EXPERTS": 16, "NUM_BLOCKS": 2, "BLOCK": 1024},
        multiples_of_16=("width", "row_stride", "num_experts"),
    ),
    silu_mul_quantize(2048),
    silu_mul_quantize(18432),
)
