"""How the replicas agree on a step: each offers a ``StepProposal``, all compute the same ``StepAgreement`` from them.

Replicas share expert-parallel collectives, so all take every step together: one that has nothing to do computes a dummy
batch of one token whose slots are -1. Which process sends what is not decided here, nor how tokens reach their experts.
Invariant: ``agree`` is a pure function of what every leader sees, so no leader needs to ask whether the others concur.
"""

import time
from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from argosy.config import EPMode

NUM_DUMMY_TOKENS = 1
ExchangeMode = Literal["low_latency", "high_throughput", "all_gather"]


class StepProposal(msgspec.Struct, frozen=True):
    """What one replica would do in a step."""

    step: int  # agreements so far: equal on all replicas, or one of them has lost its way
    num_tokens: int  # scheduled; 0 = nothing to do

    @property
    def has_work(self) -> bool:
        return self.num_tokens > 0


class ExchangePolicy(msgspec.Struct, frozen=True):
    """From how many tokens on a step is no longer low latency; equal on all replicas."""

    ep_mode: EPMode
    ll_max_tokens_per_rank: int  # -1 = never
    ranks_per_replica: int  # they share the tokens of a replica evenly


class StepAgreement(msgspec.Struct, frozen=True):
    """What all replicas do in a step."""

    step: int
    has_work: bool  # of any replica; if not, nothing is executed and all sleep
    num_tokens: tuple[int, ...]  # by dp rank, with the dummy tokens of idle replicas; zeros if nobody has work
    max_tokens_per_rank: int  # that any rank brings into the expert exchange
    mode: ExchangeMode


class IntGatherer(Protocol):
    """What is needed of the communicator between the leaders."""

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]: ...


class DPCoordinator:
    """One leader's seat at the table. Keeps the time that agreeing took, which includes waiting for slower replicas."""

    def __init__(self, leaders: IntGatherer) -> None:
        self._leaders = leaders
        self.num_agreements = 0
        self.coordination_s = 0.0

    def agree(self, proposal: StepProposal, policy: ExchangePolicy) -> StepAgreement:
        """Collective over leaders: every leader must call, for every step.

        Raises:
            RuntimeError: the replicas are not at the same step.
        """
        started_s = time.monotonic()
        gathered = self._leaders.all_gather_ints((proposal.step, proposal.num_tokens))
        agreement = agree([StepProposal(*values) for values in gathered], policy)
        self.num_agreements += 1
        self.coordination_s += time.monotonic() - started_s
        return agreement


def agree(proposals: Sequence[StepProposal], policy: ExchangePolicy) -> StepAgreement:
    """``proposals`` by dp rank.

    Raises:
        RuntimeError: they are for different steps; the message names replicas and steps.
    """
    step = proposals[0].step
    if any(proposal.step != step for proposal in proposals):
        steps = ", ".join(f"replica {dp_rank} at step {each.step}" for dp_rank, each in enumerate(proposals))
        raise RuntimeError(f"the replicas have lost step with one another ({steps}); this is a bug, restart the engine")
    has_work = any(proposal.has_work for proposal in proposals)
    num_dummy_tokens = NUM_DUMMY_TOKENS if has_work else 0
    num_tokens = tuple(proposal.num_tokens or num_dummy_tokens for proposal in proposals)
    max_tokens_per_rank = -(-max(num_tokens) // policy.ranks_per_replica)
    return StepAgreement(step, has_work, num_tokens, max_tokens_per_rank, _choose_mode(max_tokens_per_rank, policy))


def _choose_mode(max_tokens_per_rank: int, policy: ExchangePolicy) -> ExchangeMode:
    if policy.ep_mode != "auto":
        return policy.ep_mode
    return "low_latency" if max_tokens_per_rank <= policy.ll_max_tokens_per_rank else "high_throughput"
