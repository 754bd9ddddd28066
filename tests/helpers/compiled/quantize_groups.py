from tests.helpers.compiled import Kernel


def quantize_groups(*, is_gated: bool, block_rows: int) -> Kernel:
    return Kernel(
        "quantize_groups._quantize_groups_kernel",
        {
            "x": "*bf16",
            "quantized": "*fp8e4nv",
            "scale": "*fp32",
            "num_rows": "i32",
            "size": "i32",
            "row_stride": "i32",
        },
        {"IS_GATED": is_gated, "HAS_UE8M0_SCALES": True, "BLOCK_ROWS": block_rows, "BLOCK_GROUPS": 8},
        multiples_of_16=("size", "row_stride"),
        label=f"{block_rows} rows{' gated' if is_gated else ''}",
    )


def quantize_real_groups(*, block_rows: int) -> Kernel:
    return Kernel(
        "quantize_groups._quantize_real_groups_kernel",
        {"x": "*bf16", "counts": "*i32", "quantized": "*fp8e4nv", "scale": "*fp32", "num_rows": "i32", "size": "i32"}
        | {"row_stride": "i32", "num_experts": "i32"},
        {"NUM_EXPERTS": 16, "HAS_UE8M0_SCALES": True, "BLOCK_ROWS": block_rows, "BLOCK_GROUPS": 8},
        multiples_of_16=("size", "row_stride", "num_experts"),
        label=f"{block_rows} rows",
    )


KERNELS = (
    quantize_real_groups(block_rows=1),
    quantize_real_groups(block_rows=4),
    quantize_groups(is_gated=False, block_rows=1),
    quantize_groups(is_gated=False, block_rows=4),
    quantize_groups(is_gated=True, block_rows=4),
)
