"""From every rank's counters to one summary."""

from argosy.engine.deployment_stats import summarize_stats
from argosy.engine.replica_messages import RankStats, ReplicaStats
from argosy.messages import imbalance


def replica(steps: int, dummies: int, tokens: int, agreed: tuple[int, float], *ranks: RankStats) -> ReplicaStats:
    return ReplicaStats(
        num_steps=steps,
        num_dummy_steps=dummies,
        num_scheduled_tokens=tokens,
        num_preemptions=0,
        num_agreements=agreed[0],
        coordination_s=agreed[1],
        ranks=list(ranks),
    )


def rank(number: int, *layers: list[int]) -> RankStats:
    return RankStats(
        number,
        {"tp": {"all_gather": 10, "reduce_scatter": 5}, "ep": {"all_to_all": number}},
        list(layers),
        waited_s={"tp": 0.5, "ep": float(number)},
    )


def test_experts_stand_in_the_order_of_their_ranks() -> None:
    first = replica(8, 0, 90, (10, 0.001), rank(1, [3, 4], [7, 8]), rank(0, [1, 2], [5, 6]))
    second = replica(6, 2, 30, (10, 0.004), rank(2, [10, 0], [0, 0]), rank(3, [0, 10], [0, 0]))
    stats = summarize_stats([first, second], 4)
    assert stats.tokens_per_expert == [[1, 2, 3, 4, 10, 0, 0, 10], [5, 6, 7, 8, 0, 0, 0, 0]]
    assert stats.tokens_per_rank == [[3, 7, 10, 10], [11, 15, 0, 0]]
    assert (stats.num_ranks, stats.num_steps, stats.num_dummy_steps) == (4, [8, 6], [0, 2])
    assert stats.bytes_sent == {"tp": 60, "ep": 6}
    assert stats.communication_s == {"tp": 2.0, "ep": 6.0}
    assert round(stats.coordination_us) == 400
    assert stats.replica_imbalance == 1.5


def test_ranks_with_the_same_experts_are_added() -> None:
    ranks = [rank(0, [1, 2]), rank(1, [3, 4]), rank(2, [10, 20]), rank(3, [30, 40])]
    stats = summarize_stats([replica(1, 0, 1, (1, 0.0), *ranks)], 2)
    assert stats.tokens_per_expert == [[11, 22, 33, 44]]
    assert stats.tokens_per_rank == [[33, 77]]
    assert stats.rank_imbalance == 77 / 55


def test_nothing_is_even() -> None:
    assert imbalance([0, 0]) == 1.0
    assert imbalance([3, 1]) == 1.5
