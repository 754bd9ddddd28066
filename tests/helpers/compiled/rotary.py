from tests.helpers.compiled import Kernel

KERNELS = (
    Kernel(
        "rotary._rotary_rows_kernel",
        {"cos": "*fp32", "sin": "*fp32", "positions": "*i64", "turns": "*fp32", "half_cos": "*fp32"}
        | {"half_sin": "*fp32"},
        {"HALF": 32, "BLOCK": 32},
        num_warps=1,
        is_vectorised=None,
    ),
    Kernel(
        "rotary._rope_interleaved_kernel",
        {"x": "*bf16", "out": "*bf16", "turns": "*fp32", "num_heads": "i32", "token_stride": "i32"}
        | {"head_stride": "i32", "out_token_stride": "i32", "out_head_stride": "i32", "turn_stride": "i32"},
        {"NUM_BLOCKS": 4, "ROPE_DIM": 64, "BLOCK_ROPE": 64, "BLOCK_HEADS": 32},
        multiples_of_16=(
            *("num_heads", "token_stride", "head_stride", "out_token_stride", "out_head_stride", "turn_stride"),
        ),
    ),
    Kernel(
        "rotary._rope_half_split_kernel",
        {"x": "*bf16", "half_cos": "*fp32", "half_sin": "*fp32", "num_heads": "i32", "token_stride": "i32"}
        | {"head_stride": "i32", "cos_stride": "i32", "sin_stride": "i32"},
        {"NUM_BLOCKS": 2, "HALF": 32, "BLOCK_HALF": 32, "BLOCK_HEADS": 32},
        multiples_of_16=("num_heads", "token_stride", "head_stride", "cos_stride", "sin_stride"),
    ),
)
