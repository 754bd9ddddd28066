from argosy.kernels.triton.index_queries import QUANTIZED_ROWS
from tests.helpers.compiled import Kernel


def quantize_queries(number: str, max_value: float) -> Kernel:
    return Kernel(
        "index_queries._quantize_queries_kernel",
        {"index_q": "*bf16", "index_weights": "*fp32", "hadamard": "*fp32", "query": f"*{number}"}
        | {"weights": "*fp32", "num_rows": "i32"},
        {
            "MIN_AMAX": 1e-4,
            "MAX_VALUE": max_value,
            "IS_INTEGER": number == "i8",
            "DIM": 128,
            "BLOCK_ROWS": QUANTIZED_ROWS,
        },
        num_warps=8,
        instructions=("wgmma.mma_async.sync.aligned.m64n128",),
        label=number,
    )


KERNELS = (quantize_queries("i8", 127.0), quantize_queries("fp8e4nv", 448.0))
