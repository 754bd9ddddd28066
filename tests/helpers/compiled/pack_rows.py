from tests.helpers.compiled import Kernel

STRIDES = {"id_stride": "i32", "id_column_stride": "i32", "weight_stride": "i32", "weight_column_stride": "i32"}

KERNELS = (
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
)
