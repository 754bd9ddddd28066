from tests.helpers.compiled import Kernel

IDS = {"topk_ids": "*i32", "expert_owner": "*i32", "num_experts": "i32", "id_stride": "i32", "id_column_stride": "i32"}
PUT = {"word_addresses": "*i64", "flag_addresses": "*i64", "counters": "*i32", "rank": "i32"}
WAIT = {"flags": "*i32", "counters": "*i32", "missing": "*i32", "limit_ns": "i64"}
CONSTANTS = {"NUM_IDS": 8, "NUM_IDS_PADDED": 8, "NUM_RANKS": 2, "NUM_RANKS_PADDED": 2, "FLAG_WORDS": 32, "BLOCK": 1024}
# What a program wrote is counted, and the last one's flags are set, in order for all cards of the system.
RELEASES = ("atom.global.sys.acq_rel.add", "atom.global.sys.release.exch", "bar.sync")
ACQUIRES = ("ld.volatile.global", "sys.acquire", "%globaltimer")

KERNELS = (
    Kernel(
        "one_sided._put_tokens_kernel",
        {"words": "*i32", "scales": "*i32", "weights": "*i32", "num_tokens": "i32", "num_rows": "i32"}
        | {"num_words": "i32"}
        | {"row_words": "i32", "word_stride": "i32", "weight_stride": "i32", "weight_column_stride": "i32"}
        | {"scale_stride": "i32", "scale_column_stride": "i32"}
        | IDS
        | PUT,
        CONSTANTS | {"NUM_BLOCKS": 4, "NUM_SCALES": 0},
        multiples_of_16=("num_words", "row_words", "word_stride"),
        instructions=(*RELEASES, "st.global.v4"),
    ),
    Kernel(
        "one_sided._wait_kernel",
        WAIT,
        {"NUM_RANKS": 2, "NUM_RANKS_PADDED": 2, "FLAG_WORDS": 32},
        num_warps=1,
        is_vectorised=None,
        instructions=ACQUIRES,
    ),
    Kernel(
        "one_sided._put_sums_kernel",
        {"sums": "*bf16", "num_lines": "i32", "num_rows": "i32", "hidden_size": "i32", "sum_stride": "i32"} | IDS | PUT,
        CONSTANTS | {"NUM_BLOCKS": 7},
        multiples_of_16=("hidden_size", "sum_stride"),
        instructions=(*RELEASES, "st.global.v4"),
    ),
)
