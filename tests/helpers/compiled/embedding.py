from argosy.kernels.triton.embedding import BLOCK_SIZE, NUM_WARPS
from tests.helpers.compiled import Kernel

KERNELS = (
    Kernel(
        "embedding._look_up_kernel",
        {"table": "*bf16", "ids": "*i64", "rows": "*bf16", "size": "i32", "id_stride": "i32", "table_stride": "i32"},
        {"NUM_BLOCKS": 7, "BLOCK": BLOCK_SIZE},
        num_warps=NUM_WARPS,
        multiples_of_16=("size", "table_stride"),
    ),
)
