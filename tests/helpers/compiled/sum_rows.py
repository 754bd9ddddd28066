from tests.helpers.compiled import Kernel

KERNELS = (
    Kernel(
        "sum_rows._sum_rows_kernel",
        {"rows": "*bf16", "row_ids": "*i64", "weights": "*fp32", "out": "*fp32", "hidden_size": "i32"}
        | {"row_stride": "i32", "id_line_stride": "i32", "id_summand_stride": "i32"}
        | {"weight_line_stride": "i32", "weight_summand_stride": "i32"},
        {"NUM_SUMMANDS": 8, "HAS_WEIGHTS": True, "NUM_BLOCKS": 7, "BLOCK": 1024},
        multiples_of_16=("hidden_size", "row_stride"),
    ),
)
