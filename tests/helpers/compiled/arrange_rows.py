from tests.helpers.compiled import Kernel

KERNELS = (
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
