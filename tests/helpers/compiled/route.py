from argosy.kernels.triton.route import FEW_TOKENS_PARTS, MANY_TOKENS_PARTS, NUM_WARPS
from tests.helpers.compiled import Kernel


def route(num_parts: int, num_tokens: int) -> Kernel:
    return Kernel(
        "route._route_kernel",
        {"parts": "*fp32", "correction_bias": "*fp32", "topk_ids": "*i32", "topk_weights": "*fp32"}
        | {"num_tokens": "i32", "part_stride": "i32", "row_stride": "i32", "scaling_factor": "fp32"}
        | {"topk_group": "i32", "num_ids": "i32"},
        {"NUM_PARTS": num_parts, "NUM_GROUPS": 8, "GROUP_SIZE": 32, "PADDED_GROUPS": 8}
        | {"PADDED_SIZE": 32, "PADDED_IDS": 8, "IS_NORMED": True, "BLOCK_TOKENS": num_tokens}
        | {"PARTS_AT_ONCE": min(num_parts, FEW_TOKENS_PARTS if num_tokens == 1 else MANY_TOKENS_PARTS)},
        num_warps=NUM_WARPS,
        multiples_of_16=("part_stride", "row_stride"),
        instructions=("redux.sync.max", "redux.sync.min"),
        label=f"{num_tokens} tokens, {num_parts} parts",
    )


# A decode step and prefill, each from logits and from the parts that the linear leaves.
KERNELS = (route(1, 1), route(28, 1), route(1, 4), route(4, 4))
