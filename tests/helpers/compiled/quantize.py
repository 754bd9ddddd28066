from tests.helpers.compiled import Kernel

KERNELS = (
    Kernel(
        "quantize._quantize_kernel",
        {"x": "*bf16", "quantized": "*i8", "scale": "*fp32", "size": "i32", "row_stride": "i32"},
        {"MIN_AMAX": 1e-12, "BLOCK": 8192},
        num_warps=16,
        multiples_of_16=("size", "row_stride"),
    ),
    Kernel(
        "quantize._quantize_real_rows_kernel",
        {"x": "*bf16", "counts": "*i32", "quantized": "*i8", "scale": "*fp32", "size": "i32", "row_stride": "i32"}
        | {"num_experts": "i32"},
        {"NUM_EXPERTS": 16, "MIN_AMAX": 1e-12, "BLOCK": 8192},
        num_warps=16,
        multiples_of_16=("size", "row_stride", "num_experts"),
    ),
)
