"""What ``--ll-max-tokens-per-rank`` becomes when ranks start: the user's number, or one for ranks and device."""

import dataclasses

import pytest

from argosy.assets import builtin_model_directory
from argosy.config import EngineConfig
from argosy.engine.worker import build_policy
from argosy.models.deepseek.config import load_model_config
from argosy.platforms.cpu import CpuPlatform

TINY = load_model_config(builtin_model_directory("argosy-tiny"))
DEEPSEEK = dataclasses.replace(TINY, n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4)


class Card(CpuPlatform):
    device_type = "cuda"


@pytest.mark.parametrize(
    ("ep_size", "platform", "ll_max"), [(2, Card(), 8192), (4, Card(), 64), (16, Card(), 64), (2, CpuPlatform(), 64)]
)
def test_the_engine_chooses_by_ranks_and_device(ep_size: int, platform: CpuPlatform, ll_max: int) -> None:
    policy = build_policy(EngineConfig(dp_size=ep_size), DEEPSEEK, ep_size, platform)
    assert (policy.ep_mode, policy.ll_max_tokens_per_rank, policy.ranks_per_replica) == ("auto", ll_max, 1)


@pytest.mark.parametrize("ll_max", [-1, 7])
def test_a_users_number_stands(ll_max: int) -> None:
    config = EngineConfig(dp_size=1, tp_size=2, ll_max_tokens_per_rank=ll_max)
    policy = build_policy(config, DEEPSEEK, 2, Card())
    assert (policy.ll_max_tokens_per_rank, policy.ranks_per_replica) == (ll_max, 2)
