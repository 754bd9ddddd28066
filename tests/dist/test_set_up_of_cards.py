"""How ranks with accelerators share out their memory and agree on what is recorded, on CPUs that say they are cards."""

import functools
import json
from pathlib import Path

import pytest

from argosy.cache.cache_format import build_cache_format
from argosy.cache.mla_kv_cache import kv_bytes_per_block
from argosy.config import IN_MODEL_DTYPE, EngineConfig
from argosy.distributed.launcher import RankProcesses
from argosy.engine.build import prepare
from argosy.engine.build_rank import DTYPES, cache_dims
from argosy.engine.deployment import build_spec
from argosy.runner.graph_runner import graph_batch_sizes, graph_lengths
from tests.helpers import rank_entries
from tests.helpers.rank_entries import CARD_BYTES, CARD_STEP_BYTES

pytestmark = pytest.mark.processes

GRAPH_BYTES = 2**29
NOBODY = -1


@pytest.mark.parametrize(("poor_rank", "eager_rank"), [(1, NOBODY), (3, NOBODY), (NOBODY, 2)])
def test_the_poorest_rank_sizes_the_cache_and_a_rank_that_cannot_record_makes_all_eager(
    poor_rank: int, eager_rank: int, tmp_path: Path
) -> None:
    """Steps are measured together, with their exchanges; room for graphs is part of what every rank keeps free."""
    config = EngineConfig(
        tp_size=2,
        dp_size=2,
        device="cpu",
        num_threads=1,
        max_num_seqs=32,  # 512 blocks could be used: memory is the limit
        max_num_batched_tokens=64,
        max_model_len=1024,
        flight_recorder_dir=str(tmp_path),
    )
    prepared = prepare(config)
    entry = functools.partial(rank_entries.set_up_on_cards, poor_rank, eager_rank)
    processes = RankProcesses.start(entry, build_spec(prepared, None))
    try:
        assert processes.wait(60.0) is None
        results = [json.loads(processes.store.try_get(f"result/{rank}") or "null") for rank in range(4)]
    finally:
        processes.close(grace_s=0)
    dtype = DTYPES[prepared.config.dtype]
    dims = cache_dims(prepared.model_config)
    block_bytes = kv_bytes_per_block(
        build_cache_format(IN_MODEL_DTYPE, dims, dtype, prepared.platform.device(0)),
        num_layers=prepared.model_config.num_hidden_layers,
        block_size=config.block_size,
    )
    step_bytes = CARD_STEP_BYTES * (1 if poor_rank == NOBODY else 3)
    free_bytes = CARD_BYTES // 2 - int(0.1 * CARD_BYTES) - GRAPH_BYTES - step_bytes
    num_graphs = len(graph_batch_sizes(32)) * len(graph_lengths(prepared.model_config.index_topk, 1024))
    for num_blocks, found_graphs, sent in results:
        assert num_blocks == free_bytes // block_bytes
        assert found_graphs == (num_graphs if eager_rank == NOBODY else 0)
        assert {"all_gather", "reduce_scatter"} <= set(sent["tp"]) and sent["ep"]
