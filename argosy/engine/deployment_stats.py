"""From every rank's counters to one summary. Pure; the counters are collected by ``EngineClient.collect_stats``."""

from collections import Counter
from collections.abc import Sequence

from argosy.engine.replica_messages import RankStats, ReplicaStats
from argosy.messages import DeploymentStats


def summarize_stats(replicas: Sequence[ReplicaStats], num_ep_ranks: int) -> DeploymentStats:
    """``replicas`` by dp rank; ``num_ep_ranks``: ranks that share the experts (several such groups are added up)."""
    ranks = sorted((rank for replica in replicas for rank in replica.ranks), key=lambda rank: rank.rank)
    bytes_sent: Counter[str] = Counter()
    communication_s: dict[str, float] = {}
    for rank in ranks:
        bytes_sent.update({axis: sum(operations.values()) for axis, operations in rank.bytes_sent.items()})
        for axis, seconds in rank.waited_s.items():
            communication_s[axis] = communication_s.get(axis, 0.0) + seconds
    by_ep_rank = [_add_layers(ranks[ep_rank::num_ep_ranks]) for ep_rank in range(num_ep_ranks)]
    layers = list(zip(*by_ep_rank, strict=True))
    return DeploymentStats(
        num_ranks=len(ranks),
        num_steps=[replica.num_steps for replica in replicas],
        num_dummy_steps=[replica.num_dummy_steps for replica in replicas],
        num_scheduled_tokens=[replica.num_scheduled_tokens for replica in replicas],
        coordination_us=max(1e6 * each.coordination_s / max(each.num_agreements, 1) for each in replicas),
        bytes_sent=dict(bytes_sent),
        tokens_per_expert=[[tokens for experts in layer for tokens in experts] for layer in layers],
        tokens_per_rank=[[sum(experts) for experts in layer] for layer in layers],
        communication_s=communication_s,
        num_late_compilations=sum(rank.num_late_compilations for rank in ranks),
    )


def _add_layers(ranks: Sequence[RankStats]) -> list[list[int]]:
    """Tokens by layer and local expert, of ranks that hold the same experts."""
    return [
        [sum(tokens) for tokens in zip(*copies, strict=True)]
        for copies in zip(*(rank.tokens_per_expert for rank in ranks), strict=True)
    ]
