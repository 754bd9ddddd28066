"""How the replicas agree on a step: each offers a ``StepProposal``, all compute the same ``StepAgreement`` from them.

Replicas share expert-parallel collectives, so all take every step together: one that has nothing to do computes a dummy
batch of one token whose slots are -1. A step is replayed from a recording by all ranks or by none, and all replay the
same one: what was recorded on one rank waits for what was recorded beside it on the others. Which process sends what is
not decided here, nor how tokens reach their experts.
Invariant: ``agree`` is a pure function of what every leader sees, so no leader needs to ask whether the others concur.
"""

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from math import comb
from typing import Protocol

import msgspec

from argosy.config import EPMode, ExchangeMode
from argosy.distributed.recordings import NO_RECORDINGS, RecordingKey, RecordingTable

NUM_DUMMY_TOKENS = 1
LL_MAX_TOKENS_PER_RANK = 64  # where low latency stops to pay, if nobody says otherwise
# Bytes that low latency may send for each that high throughput needs, and still be taken for large steps on a card: the
# counts, and what the host does around them, cost more than a tenth of any exchange that was measured.
MAX_EXCESS = 1.1
# Received tokens of such a step. Without counts the experts' rows are as many as there could be, K for each: at D 7,168
# and K 8 that is 1.75 GiB of bfloat16 going in, and as much coming out.
MAX_FIXED_ROWS = 16_384


class StepProposal(msgspec.Struct, frozen=True):
    """What one replica would do in a step."""

    step: int  # agreements so far: equal on all replicas, or one of them has lost its way
    num_tokens: int  # scheduled; 0 = nothing to do
    decode_length: int = 0  # its longest sequence, if every request computes one token; 0 = some compute more

    @property
    def has_work(self) -> bool:
        return self.num_tokens > 0


class ExchangePolicy(msgspec.Struct, frozen=True):
    """Up to how many tokens a step is low latency, and what was recorded; equal on all replicas."""

    ep_mode: EPMode
    ll_max_tokens_per_rank: int  # -1 = never
    ranks_per_replica: int  # they share the tokens of a replica evenly
    recordings: RecordingTable = NO_RECORDINGS  # that may be replayed


class StepAgreement(msgspec.Struct, frozen=True):
    """What all replicas do in a step."""

    step: int
    has_work: bool  # of any replica; if not, nothing is executed and all sleep
    num_tokens: tuple[int, ...]  # by dp rank, with the dummy tokens of idle replicas; zeros if nobody has work
    max_tokens_per_rank: int  # that any rank brings into the expert exchange, padding of a recording included
    mode: ExchangeMode
    recording: RecordingKey | None = None  # that all ranks replay; None: all launch their kernels themselves


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
        gathered = self._leaders.all_gather_ints((proposal.step, proposal.num_tokens, proposal.decode_length))
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
    recording = _choose_recording([proposal for proposal in proposals if proposal.has_work], policy)
    most_tokens = max(num_tokens) if recording is None else recording.size
    max_tokens_per_rank = -(-most_tokens // policy.ranks_per_replica)
    mode = choose_mode(max_tokens_per_rank, policy)
    return StepAgreement(step, has_work, num_tokens, max_tokens_per_rank, mode, recording)


def choose_mode(max_tokens_per_rank: int, policy: ExchangePolicy) -> ExchangeMode:
    if policy.ep_mode != "auto":
        return policy.ep_mode
    return "low_latency" if max_tokens_per_rank <= policy.ll_max_tokens_per_rank else "high_throughput"


def plan_recordings(
    sizes: Sequence[int], lengths: Sequence[int], policy: ExchangePolicy, *, ep_size: int
) -> RecordingTable:
    """Of ``sizes``, those whose exchange can be recorded under ``policy``. High throughput cannot: it waits for counts
    on the host, unless there is nobody to exchange with."""
    modes = {size: choose_mode(-(-size // policy.ranks_per_replica), policy) for size in sizes}
    fixed = [size for size in sizes if modes[size] != "high_throughput" or ep_size == 1]
    return RecordingTable(tuple(fixed), tuple(lengths), tuple(modes[size] for size in fixed))


def choose_ll_max_tokens_per_rank(ep_size: int, ranks_visited: float, *, is_card: bool) -> int:
    """``ranks_visited``: see ``expected_ranks_visited``.

    Low latency sends a token to all ``ep_size`` ranks, high throughput to those it visits, once the host has read how
    many will come. Where that saves next to nothing, only memory speaks for it; on a CPU, reading counts is free.
    """
    if is_card and ep_size / ranks_visited <= MAX_EXCESS:
        return max(MAX_FIXED_ROWS // ep_size, LL_MAX_TOKENS_PER_RANK)
    return LL_MAX_TOKENS_PER_RANK


def expected_ranks_visited(
    ep_size: int, *, num_experts: int, num_experts_per_tok: int, n_group: int, topk_group: int
) -> float:
    """Ranks that own at least one expert of a token, when routing is even: ``topk_group`` of the groups, and of their
    experts ``num_experts_per_tok``, all choices alike."""
    group_size, num_local_experts = num_experts // n_group, num_experts // ep_size
    num_open = topk_group * group_size
    total, choices = 0.0, list(itertools.combinations(range(n_group), topk_group))
    for groups in choices:
        experts = (group * group_size + i for group in groups for i in range(group_size))
        open_by_rank = Counter(expert // num_local_experts for expert in experts)
        misses = (comb(num_open - number, num_experts_per_tok) for number in open_by_rank.values())
        total += len(open_by_rank) - sum(misses) / comb(num_open, num_experts_per_tok)
    return total / len(choices)


def _choose_recording(busy: Sequence[StepProposal], policy: ExchangePolicy) -> RecordingKey | None:
    """The smallest that holds every replica's step, if it was recorded as it would be exchanged now."""
    if not all(proposal.decode_length for proposal in busy):
        return None
    recordings = policy.recordings
    most = max((proposal.num_tokens for proposal in busy), default=0)
    longest = max((proposal.decode_length for proposal in busy), default=0)
    chosen = recordings.choose(most, longest)
    if chosen is None:
        return None
    mode = choose_mode(-(-chosen.size // policy.ranks_per_replica), policy)
    return chosen if recordings.mode(chosen.size) == mode else None
