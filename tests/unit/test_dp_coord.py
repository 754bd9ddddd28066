"""``agree``: one agreement from all proposals, the same on every replica."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argosy.distributed.dp_coord import (
    DPCoordinator,
    ExchangePolicy,
    StepAgreement,
    StepProposal,
    agree,
    choose_ll_max_tokens_per_rank,
    expected_ranks_visited,
)

AUTO = ExchangePolicy("auto", 64, 8)


def _agree(num_tokens: Sequence[int], policy: ExchangePolicy = AUTO) -> StepAgreement:
    return agree([StepProposal(7, n) for n in num_tokens], policy)


def test_idle_replica_joins_with_one_dummy_token() -> None:
    assert _agree([100, 0, 3]).num_tokens == (100, 1, 3)


def test_nobody_executes_when_nobody_has_work() -> None:
    agreement = _agree([0, 0])
    assert not agreement.has_work and agreement.num_tokens == (0, 0) and agreement.max_tokens_per_rank == 0


def test_tokens_per_rank_are_those_of_the_fullest_rank() -> None:
    assert _agree([17, 9]).max_tokens_per_rank == 3  # 17 over 8 ranks: two on most, three on the first
    assert _agree([16, 9]).max_tokens_per_rank == 2
    assert _agree([0, 1]).max_tokens_per_rank == 1


def test_mode_follows_the_fullest_replica_and_not_ones_own() -> None:
    assert _agree([1, 64 * 8]).mode == "low_latency"
    assert _agree([1, 64 * 8 + 1]).mode == "high_throughput"


def test_minus_one_is_never_low_latency() -> None:
    assert _agree([1, 0], ExchangePolicy("auto", -1, 8)).mode == "high_throughput"


@pytest.mark.parametrize("mode", ["low_latency", "high_throughput", "all_gather"])
def test_a_forced_mode_stays(mode: str) -> None:
    policy = ExchangePolicy(mode, 64, 8)  # type: ignore[arg-type]
    assert {_agree(tokens, policy).mode for tokens in ([1, 0], [5000, 1], [0, 0])} == {mode}


def test_replicas_out_of_step_are_named() -> None:
    with pytest.raises(RuntimeError, match="replica 0 at step 4, replica 1 at step 5"):
        agree([StepProposal(4, 1), StepProposal(5, 1)], AUTO)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=16), st.integers(1, 16), st.integers(-1, 100))
def test_no_rank_brings_more_than_was_agreed(tokens: list[int], ranks: int, ll_max: int) -> None:
    agreement = _agree(tokens, ExchangePolicy("auto", ll_max or 1, ranks))
    shares = [len(range(r, n, ranks)) for n in agreement.num_tokens for r in range(ranks)]
    assert agreement.max_tokens_per_rank == max(shares)
    assert all(n >= 1 for n in agreement.num_tokens) is agreement.has_work


def test_one_replica_agrees_with_itself() -> None:
    class Alone:
        def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
            return [list(values)]

    coordinator = DPCoordinator(Alone())
    agreement = coordinator.agree(StepProposal(3, 40), ExchangePolicy("auto", 64, 1))
    assert agreement == StepAgreement(3, True, (40,), 40, "low_latency")
    assert coordinator.num_agreements == 1 and coordinator.coordination_s > 0


# --- where low latency pays ------------------------------------------------------------------------------------------

DEEPSEEK = {"num_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}


def drawn_ranks_visited(ep_size: int, sizes: dict[str, int], num_draws: int = 4000) -> float:
    """By the rule itself: open groups, then experts in them."""
    rng = random.Random(0)
    group_size, num_local_experts = sizes["num_experts"] // sizes["n_group"], sizes["num_experts"] // ep_size
    total = 0
    for _ in range(num_draws):
        groups = rng.sample(range(sizes["n_group"]), sizes["topk_group"])
        open_experts = [group * group_size + i for group in groups for i in range(group_size)]
        total += len({expert // num_local_experts for expert in rng.sample(open_experts, sizes["num_experts_per_tok"])})
    return total / num_draws


@pytest.mark.parametrize(
    ("ep_size", "sizes"),
    [
        *((ep_size, DEEPSEEK) for ep_size in (1, 2, 4, 8, 16, 32)),
        (3, {"num_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}),  # ranks across groups
        (4, {"num_experts": 32, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}),
    ],
)
def test_ranks_visited_are_those_of_drawn_tokens(ep_size: int, sizes: dict[str, int]) -> None:
    assert expected_ranks_visited(ep_size, **sizes) == pytest.approx(drawn_ranks_visited(ep_size, sizes), rel=0.02)


def test_ranks_visited_are_the_documents_table() -> None:
    figures = [round(expected_ranks_visited(ep_size, **DEEPSEEK), 2) for ep_size in (2, 4, 8, 16, 32)]
    assert figures == [1.93, 2.93, 3.63, 5.34, 6.60]


def test_two_cards_never_count_and_more_of_them_do() -> None:
    limits = {
        ep_size: choose_ll_max_tokens_per_rank(ep_size, expected_ranks_visited(ep_size, **DEEPSEEK), is_card=True)
        for ep_size in (2, 4, 16)
    }
    assert limits == {2: 8192, 4: 64, 16: 64}
    assert choose_ll_max_tokens_per_rank(2, 1.93, is_card=False) == 64
    assert _agree([8192, 0], ExchangePolicy("auto", limits[2], 1)).mode == "low_latency"
    assert _agree([8193, 0], ExchangePolicy("auto", limits[2], 1)).mode == "high_throughput"


def test_a_token_of_one_expert_is_not_sent_to_both_cards() -> None:
    visited = expected_ranks_visited(2, num_experts=32, num_experts_per_tok=1, n_group=1, topk_group=1)
    assert visited == 1.0 and choose_ll_max_tokens_per_rank(2, visited, is_card=True) == 64
