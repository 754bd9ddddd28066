"""The self-test's MoE exchange: silent where all is well, and it names the mode that loses a token."""

import pytest
import torch

from argosy.distributed.communicator import Communicator
from argosy.distributed.ep_dispatch import build_dispatcher
from argosy.distributed.ep_self_test import check_experts
from argosy.distributed.ep_types import DispatchedTokens, DispatchHandle, ExchangePlan
from argosy.distributed.pending import Pending
from tests.helpers.rank_pool import PoolContext, RankPool

CPU = torch.device("cpu")


class LossyDispatcher:
    """Sends nothing to rank 1's experts in low latency."""

    def __init__(self, ep: Communicator, num_experts: int) -> None:
        self._inner = build_dispatcher(ep, num_experts)
        self._lost = range(num_experts // ep.size, 2 * num_experts // ep.size)

    def start_dispatch(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, plan: ExchangePlan
    ) -> Pending[DispatchedTokens]:
        if plan.mode == "low_latency":
            is_lost = (topk_ids >= self._lost.start) & (topk_ids < self._lost.stop)
            topk_ids = topk_ids.masked_fill(is_lost, -1)
        return self._inner.start_dispatch(x, topk_ids, topk_weights, plan)

    def start_combine(self, expert_out: torch.Tensor, handle: DispatchHandle) -> Pending[torch.Tensor]:
        return self._inner.start_combine(expert_out, handle)


def run_check(context: PoolContext) -> None:
    check_experts(context.communicator(), CPU)


def run_lossy_check(context: PoolContext) -> str:
    try:
        check_experts(context.communicator(), CPU, LossyDispatcher)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world", [1, 2, 4, 16])
def test_a_sound_exchange_passes(rank_pool: RankPool, world: int) -> None:
    rank_pool.run(run_check, world=world)


def test_lost_tokens_are_found_and_the_mode_is_named(rank_pool: RankPool) -> None:
    messages = [message for message in rank_pool.run(run_lossy_check, world=4) if message]
    assert messages and all("with a wrong sum in mode low_latency;" in message for message in messages)
