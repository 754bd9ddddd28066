from tests.helpers.compiled import Kernel


def sum_rows(out: str, *, has_addend: bool, is_sparse: bool = False) -> Kernel:
    return Kernel(
        "sum_rows._sum_rows_kernel",
        {"rows": "*bf16", "row_ids": "*i64", "weights": "*fp32", "addend": "*bf16", "out": out, "hidden_size": "i32"}
        | {"row_stride": "i32", "id_line_stride": "i32", "id_summand_stride": "i32"}
        | {"weight_line_stride": "i32", "weight_summand_stride": "i32"},
        {"NUM_SUMMANDS": 8, "HAS_WEIGHTS": True, "HAS_ADDEND": has_addend}
        | {
            "IS_SPARSE": is_sparse,
            "SKIPS_EMPTY": is_sparse,
            "NUM_BLOCKS": 2 if is_sparse else 7,
            "BLOCK": 4096 if is_sparse else 1024,
        },
        num_warps=8 if is_sparse else 4,
        multiples_of_16=("hidden_size", "row_stride"),
        label="with addend" if has_addend else "sparse" if is_sparse else "",
    )


KERNELS = (
    sum_rows("*fp32", has_addend=False),
    sum_rows("*bf16", has_addend=True),
    sum_rows("*bf16", has_addend=False, is_sparse=True),
)
