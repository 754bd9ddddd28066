"""``agree``: one agreement from all proposals, the same on every replica."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argosy.distributed.dp_coord import DPCoordinator, ExchangePolicy, StepAgreement, StepProposal, agree

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
