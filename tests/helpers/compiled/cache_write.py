from tests.helpers.compiled import Kernel

E4M3_CAST = "cvt.rn.satfinite.e4m3x2.f32"
MAX_VALUES = {"": 0.0, "int8": 127.0, "fp8": 448.0}  # by the rows' numbers; "": the model's own


def encoding(numbers: str) -> dict[str, bool | float]:
    is_fp8 = numbers == "fp8"
    return {"IS_ENCODED": bool(numbers), "IS_FP8": is_fp8, "MAX_VALUE": MAX_VALUES[numbers], "MIN_AMAX": 1e-4}


def places(numbers: str) -> dict[str, str]:
    return {"cache": "*u8" if numbers else "*bf16", "slot_mapping": "*i64", "eps": "fp32"}


def write_latent(numbers: str) -> Kernel:
    return Kernel(
        "cache_write._write_latent_kernel",
        {"latent": "*bf16", "norm_weight": "*fp32", "turns": "*fp32", "latent_stride": "i32", "turn_stride": "i32"}
        | places(numbers),
        {"RANK": 512, "ROPE_DIM": 64, "ROW_WIDTH": 656 if numbers else 576, "BLOCK_ROPE": 64}
        | {"GROUP": 128, "NUM_GROUPS": 4}
        | encoding(numbers),
        num_warps=1,
        multiples_of_16=("latent_stride", "turn_stride"),
        instructions=(E4M3_CAST,) if numbers == "fp8" else (),
        label=numbers,
    )


def write_index_k(numbers: str) -> Kernel:
    return Kernel(
        "cache_write._write_index_k_kernel",
        {"key": "*bf16", "norm_weight": "*fp32", "norm_bias": "*fp32", "half_cos": "*fp32", "half_sin": "*fp32"}
        | {"hadamard": "*fp32", "key_stride": "i32", "cos_stride": "i32", "sin_stride": "i32"}
        | places(numbers),
        {"WIDTH": 128, "ROPE_DIM": 64, "ROW_WIDTH": 132 if numbers else 128, "BLOCK": 128, "LOG_WIDTH": 7}
        | encoding(numbers),
        num_warps=1,
        multiples_of_16=("key_stride", "cos_stride", "sin_stride"),
        is_vectorised=None,  # a row is 4 numbers for each thread
        instructions=(E4M3_CAST,) if numbers == "fp8" else (),
        label=numbers,
    )


KERNELS = (*map(write_latent, MAX_VALUES), *map(write_index_k, MAX_VALUES))
