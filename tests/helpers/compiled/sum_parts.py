from tests.helpers.compiled import Kernel

KERNELS = (
    Kernel(
        "sum_parts._sum_parts_kernel",
        {"parts": "*bf16", "out": "*fp32", "hidden_size": "i32", "part_stride": "i32", "row_stride": "i32"}
        | {"factor": "fp32"},
        {"NUM_PARTS": 2, "NUM_BLOCKS": 7, "BLOCK": 1024},
        multiples_of_16=("hidden_size", "part_stride", "row_stride"),
    ),
)
