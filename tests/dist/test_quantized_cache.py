"""An 8-bit cache on two ranks: its bytes are the same on both, and near one rank's."""

import pytest
import torch

from argosy.config import KVCacheDType
from argosy.distributed.layout import ParallelLayout
from argosy.kernels import decode_latent
from argosy.kernels.reference_cache_rows import FP8, INT8, LatentRowLayout
from tests.dist.test_tensor_parallel import PROMPTS, build_probe
from tests.helpers.rank_pool import PoolContext, RankPool

LAYOUTS = {"int8": LatentRowLayout(128, 16, INT8), "fp8": LatentRowLayout(128, 16, FP8)}  # argosy-tiny's


def fill_share(context: PoolContext, layout: ParallelLayout, kind: KVCacheDType) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's raw cache, latent and index_k, after a prefill in chunks."""
    cache = build_probe(context.mesh(layout), kind).fill_cache(PROMPTS, 37)
    return cache.latent, cache.index_k


def share_logits(context: PoolContext, layout: ParallelLayout, kind: KVCacheDType) -> list[torch.Tensor]:
    return build_probe(context.mesh(layout), kind).logits(PROMPTS, 37)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_bytes_are_equal_on_both_ranks_and_near_one_ranks(rank_pool: RankPool, kind: KVCacheDType) -> None:
    """Equal to the last bit: each rank reads its own copy, and a transfer may take any of them."""
    ((alone, _),) = rank_pool.run(fill_share, ParallelLayout(), kind, world=1)
    first, second = rank_pool.run(fill_share, ParallelLayout(tp_size=2), kind, world=2)
    assert first[0].any() and first[1].any()
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    ours, theirs = (decode_latent(rows[:, 1:], LAYOUTS[kind], torch.float32) for rows in (first[0], alone))
    for layer_id, (mine, single) in enumerate(zip(ours, theirs, strict=True)):
        # Sums in another order move a number by a step where it lies at the border of two.
        cosine = torch.cosine_similarity(mine.flatten(), single.flatten(), dim=0)
        assert cosine > 0.9999, f"layer {layer_id}"


def test_logits_are_near_one_ranks_and_equal_on_both(rank_pool: RankPool) -> None:
    (expected,) = rank_pool.run(share_logits, ParallelLayout(), "int8", world=1)
    first, second = rank_pool.run(share_logits, ParallelLayout(tp_size=2), "int8", world=2)
    for mine, other, single in zip(first, second, expected, strict=True):
        assert torch.equal(mine, other)
        assert torch.cosine_similarity(mine.flatten(), single.flatten(), dim=0) > 0.9999
