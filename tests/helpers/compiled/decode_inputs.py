from tests.helpers.compiled import Kernel

TARGETS = {"input_ids": "*i64", "positions": "*i64", "slot_mapping": "*i64", "seq_lens": "*i32", "block_table": "*i32"}
SOURCES = {"source_ids": "*i64", "source_positions": "*i64", "source_slots": "*i64", "source_lens": "*i32"}

KERNELS = (
    Kernel(
        "decode_inputs._fill_decode_inputs_kernel",
        TARGETS
        | SOURCES
        | {"source_table": "*i32", "num_rows": "i32", "num_blocks": "i32", "table_stride": "i32"}
        | {"source_table_stride": "i32"},
        {"BLOCK": 128},
        is_vectorised=False,  # tables' rows begin anywhere
    ),
)
