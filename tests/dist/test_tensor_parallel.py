"""Tensor and expert parallelism against one rank: the same logits, whatever the number of tokens."""

import pytest
import torch

from argosy.assets import builtin_model_directory
from argosy.cache.rope import build_rotary_table
from argosy.config import KVCacheDType, choose_cache_dtypes
from argosy.distributed.communicator import Communicator
from argosy.distributed.layout import ParallelLayout
from argosy.distributed.mesh import ParallelMesh
from argosy.distributed.tp_comm import TensorParallelTokens, WholeTokens, build_token_slices, slice_bounds
from argosy.engine.build_rank import rotary_settings
from argosy.models.deepseek.checkpoint import build_weight_mapping
from argosy.models.deepseek.config import load_model_config
from argosy.models.deepseek.model import DeepseekV32Model, weight_shard
from argosy.quantization.weight_loader import load_weights
from argosy.validation.probe import ModelProbe
from tests.helpers.rank_pool import PoolContext, RankPool

DIRECTORY = builtin_model_directory("argosy-tiny")
PROMPTS = [[5 + i % 300 for i in range(130)], [9] * 70, [7]]  # past index_topk, at it, and a single token


def share_logits(context: PoolContext, layout: ParallelLayout, chunk_size: int) -> list[torch.Tensor]:
    return build_probe(context.mesh(layout)).logits(PROMPTS, chunk_size)


def build_probe(mesh: ParallelMesh, kv_cache_dtype: KVCacheDType = "auto") -> ModelProbe:
    config = load_model_config(DIRECTORY)
    model = DeepseekV32Model(config, torch.float32, mesh)
    mapping = build_weight_mapping(
        config.num_hidden_layers, config.num_nextn_predict_layers, weight_shard(config, mesh)
    )
    load_weights(model, DIRECTORY, mapping=mapping)
    rotary = build_rotary_table(rotary_settings(config), torch.device("cpu"))
    return ModelProbe(model, config, rotary, choose_cache_dtypes(kv_cache_dtype))


@pytest.mark.parametrize("chunk_size", [1000, 37])
@pytest.mark.parametrize("tp_size", [2, 4, 8])
def test_logits_equal_one_rank(rank_pool: RankPool, tp_size: int, chunk_size: int) -> None:
    (expected,) = rank_pool.run(share_logits, ParallelLayout(), chunk_size, world=1)
    by_rank = rank_pool.run(share_logits, ParallelLayout(tp_size=tp_size), chunk_size, world=tp_size)
    for logits in by_rank:
        for ours, theirs in zip(logits, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for logits in by_rank[1:]:  # every rank samples for itself, so they must agree to the last bit
        assert all(torch.equal(a, b) for a, b in zip(logits, by_rank[0], strict=True))


def run_slices(context: PoolContext, num_tokens: int) -> dict[str, torch.Tensor]:
    tp = context.communicator(axis="tp")
    slices = TensorParallelTokens(tp)
    x = torch.arange(num_tokens * 3, dtype=torch.float32).view(num_tokens, 3)
    mine = x[slice(*slice_bounds(num_tokens, tp.size, tp.rank))]
    rows = torch.tensor([num_tokens - 1, 0] if num_tokens else [], dtype=torch.int64)
    return {
        "gathered": slices.all_gather(mine, num_tokens),
        "summed": slices.reduce_scatter(x * (tp.rank + 1)),
        "rows": slices.take_rows(mine, rows, num_tokens),
    }


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 4, 5, 9])
def test_slices_put_together_are_the_batch(rank_pool: RankPool, num_tokens: int) -> None:
    x = torch.arange(num_tokens * 3, dtype=torch.float32).view(num_tokens, 3)
    results = rank_pool.run(run_slices, num_tokens, world=4)
    for result in results:
        assert torch.equal(result["gathered"], x)
        assert torch.equal(result["rows"], x[[num_tokens - 1, 0]] if num_tokens else x)
    assert torch.equal(torch.cat([result["summed"] for result in results]), x * (1 + 2 + 3 + 4))


def test_slices_are_even_and_in_order() -> None:
    assert [slice_bounds(9, 4, rank) for rank in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 9)]
    assert [slice_bounds(2, 4, rank) for rank in range(4)] == [(0, 1), (1, 2), (2, 2), (2, 2)]


def test_one_rank_gets_the_null_twin() -> None:
    assert isinstance(build_token_slices(Communicator.local("tp")), WholeTokens)


def count_step_bytes(context: PoolContext, layout: ParallelLayout, num_tokens: int) -> dict[str, int]:
    """What this rank sends in one forward pass without sampling."""
    mesh = context.mesh(layout)
    probe = build_probe(mesh)
    mesh.tp.reset_counters()
    mesh.ep.reset_counters()
    probe.forward([7] * num_tokens)
    return {**mesh.tp.bytes_sent, "ep": sum(mesh.ep.bytes_sent.values())}


@pytest.mark.parametrize("layout", [ParallelLayout(tp_size=2, ep_size=1), ParallelLayout(tp_size=4, ep_size=1)])
def test_bytes_on_the_wire_are_those_of_one_all_reduce_a_block(rank_pool: RankPool, layout: ParallelLayout) -> None:
    """Attention, and a dense MLP too: a reduce-scatter and an all-gather, each of (tp - 1) / tp of the batch from every
    rank. The embedding takes a reduce-scatter alone; a MoE layer takes nothing over tp."""
    config = load_model_config(DIRECTORY)
    num_tokens = 64
    share = num_tokens * config.hidden_size * 4 * (layout.tp_size - 1) // layout.tp_size
    num_blocks = config.num_hidden_layers + config.first_k_dense_replace
    for sent in rank_pool.run(count_step_bytes, layout, num_tokens, world=layout.tp_size):
        assert sent == {"all_gather": num_blocks * share, "reduce_scatter": (num_blocks + 1) * share, "ep": 0}
