from argosy.kernels.triton.argmax import BLOCK_SIZE, NUM_WARPS
from tests.helpers.compiled import Kernel

KERNELS = (
    Kernel(
        "argmax._find_in_blocks_kernel",
        {"x": "*fp32", "best": "*i32", "size": "i32", "row_stride": "i32", "num_blocks": "i32"},
        {"BLOCK": BLOCK_SIZE},
        num_warps=NUM_WARPS,
        multiples_of_16=("row_stride",),
        instructions=("redux.sync.max", "redux.sync.min"),
    ),
    Kernel(
        "argmax._find_block_kernel",
        {"best": "*i32", "places": "*i64", "num_blocks": "i32"},
        {"BLOCK": 64},
        num_warps=1,
        is_vectorised=None,
        instructions=("redux.sync.max", "redux.sync.min"),
    ),
)
