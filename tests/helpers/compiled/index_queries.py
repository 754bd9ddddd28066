from argosy.kernels.triton.index_queries import QUANTIZED_ROWS
from tests.helpers.compiled import Kernel

HEADS, DIM, ROPE_DIM = 64, 128, 64


def quantize_queries(number: str, max_value: float, rope_dim: int) -> Kernel:
    return Kernel(
        "index_queries._quantize_queries_kernel",
        {"index_q": "*bf16", "index_weights": "*fp32", "hadamard": "*fp32", "half_cos": "*fp32", "half_sin": "*fp32"}
        | {"query": f"*{number}", "weights": "*fp32", "num_rows": "i32"},
        {
            "MIN_AMAX": 1e-4,
            "MAX_VALUE": max_value,
            "IS_INTEGER": number == "i8",
            "DIM": DIM,
            "ROPE_DIM": rope_dim,
            "BLOCK_ROWS": HEADS if rope_dim else QUANTIZED_ROWS,
        },
        num_warps=8,
        instructions=(f"wgmma.mma_async.sync.aligned.m64n{64 if rope_dim else 128}",),
        label=f"{number}{' rotated' * (rope_dim > 0)}",
    )


KERNELS = tuple(
    quantize_queries(number, max_value, rope_dim)
    for number, max_value in (("i8", 127.0), ("fp8e4nv", 448.0))
    for rope_dim in (0, ROPE_DIM)
)
