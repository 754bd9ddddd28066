from tests.helpers.compiled import Kernel

STRIDES = {"scale_stride": "i32", "scale_column_stride": "i32", "id_stride": "i32", "id_column_stride": "i32"}
STRIDES |= {"weight_stride": "i32", "weight_column_stride": "i32"}


def pack_rows(num_scales: int) -> Kernel:
    return Kernel(
        "pack_rows._pack_rows_kernel",
        {"words": "*i32", "scales": "*i32", "topk_ids": "*i32", "weights": "*i32", "message": "*i32"}
        | {"num_tokens": "i32", "num_words": "i32", "row_words": "i32", "word_stride": "i32"}
        | STRIDES,
        {"NUM_SCALES": num_scales, "NUM_IDS": 8, "NUM_BLOCKS": 4, "BLOCK": 1024},
        multiples_of_16=("num_words", "row_words", "word_stride"),
        label=f"{num_scales} scales",
    )


def pack_routes(num_scales: int) -> Kernel:
    return Kernel(
        "pack_rows._pack_routes_kernel",
        {"words": "*i32", "scales": "*i32", "topk_ids": "*i32", "weights": "*i32", "counts": "*i32", "places": "*i32"}
        | {"message": "*i32", "sent_rows": "*i64", "num_words": "i32", "row_words": "i32", "word_stride": "i32"}
        | STRIDES,
        {"NUM_SCALES": num_scales, "NUM_IDS": 8, "NUM_RANKS": 2, "NUM_BLOCKS": 4, "BLOCK": 1024},
        multiples_of_16=("num_words", "row_words", "word_stride"),
        label=f"{num_scales} scales",
    )


KERNELS = (
    *(pack_rows(num_scales) for num_scales in (0, 1, 56)),
    *(pack_routes(num_scales) for num_scales in (0, 1, 56)),
    Kernel(
        "pack_rows._count_routes_kernel",
        {"topk_ids": "*i32", "expert_owner": "*i32", "counts": "*i32", "places": "*i32", "num_tokens": "i32"}
        | {"num_experts": "i32", "num_ranks": "i32", "id_stride": "i32", "id_column_stride": "i32"},
        {"NUM_IDS": 8, "NUM_IDS_PADDED": 8, "BLOCK": 2048},
        num_warps=16,
        is_vectorised=False,
    ),
)
