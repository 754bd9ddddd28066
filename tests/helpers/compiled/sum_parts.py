from tests.helpers.compiled import Kernel


def sum_parts(out: str, *, has_addend: bool) -> Kernel:
    return Kernel(
        "sum_parts._sum_parts_kernel",
        {"parts": "*bf16", "addend": "*bf16", "out": out, "hidden_size": "i32", "part_stride": "i32"}
        | {"row_stride": "i32", "factor": "fp32"},
        {"NUM_PARTS": 2, "HAS_ADDEND": has_addend, "NUM_BLOCKS": 7, "BLOCK": 1024},
        multiples_of_16=("hidden_size", "part_stride", "row_stride"),
        label="with addend" if has_addend else "",
    )


KERNELS = (
    sum_parts("*fp32", has_addend=False),
    sum_parts("*bf16", has_addend=True),
    Kernel(
        "sum_parts._sum_visited_parts_kernel",
        {"parts": "*bf16", "topk_ids": "*i32", "expert_owner": "*i32", "addend": "*bf16", "out": "*bf16"}
        | {"hidden_size": "i32", "num_experts": "i32", "part_stride": "i32", "row_stride": "i32"}
        | {"id_stride": "i32", "id_column_stride": "i32"},
        {"NUM_PARTS": 16, "NUM_IDS": 8, "PADDED_IDS": 8, "HAS_ADDEND": True, "NUM_BLOCKS": 14, "BLOCK": 512},
        multiples_of_16=("hidden_size", "part_stride", "row_stride"),
        is_vectorised=None,  # 8 bytes, and twice the programs
    ),
)
