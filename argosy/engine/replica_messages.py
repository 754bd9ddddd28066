"""What the driver, the leaders and the other ranks of a replica say to one another: tagged msgspec structs.

The *driver* is the process that holds ``LLM``; a *leader* is the first rank of a replica, which schedules; the other
ranks follow its plans. This file sends nothing. Invariant: every message names its type on the wire, so a process never
guesses what it received, and nothing is ever unpickled.
"""

import msgspec

from argosy.config import EPMode
from argosy.distributed.dp_coord import StepAgreement
from argosy.engine.step_times import StepTime
from argosy.messages import FinishReason, ScheduledBatch, TokenDelta
from argosy.sampling_params import SamplingParams

# --- driver -> leader -------------------------------------------------------------------------------------------------


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    """A request to compute; the driver has checked that it can be."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    priority: int = 0  # lower runs first
    cache_salt: str | None = None  # requests with different salts share no cache blocks
    output_token_ids: list[int] = []  # emitted by another engine that died: go on behind them, report only new tokens


class AbortRequest(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class FinishRequest(msgspec.Struct, frozen=True, tag=True):
    """The driver found the end in the text and has reported it."""

    request_id: str
    reason: FinishReason


class Wake(msgspec.Struct, frozen=True, tag=True):
    """Every leader has said that it sleeps before ``step``: go on from there, all of you."""

    step: int


class UpdateSettings(msgspec.Struct, frozen=True, tag=True):
    """New values between requests; None leaves one as it is. Sent to sleeping leaders only, and to all of them."""

    ep_mode: EPMode | None = None
    ll_max_tokens_per_rank: int | None = None
    max_num_batched_tokens: int | None = None
    async_scheduling: bool | None = None
    enforce_eager: bool | None = None  # False: steps that were recorded at the start are replayed


class CollectStats(msgspec.Struct, frozen=True, tag=True):
    """Asks for ``ReplicaStats``; a leader passes it on to its ranks, which answer with ``RankStats``."""

    has_ranks: bool = True  # False: of the leader's own books alone, which costs the replica nothing


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End in good order; a leader passes it on. Sent to sleeping leaders only: nobody waits in a collective then."""


# --- leader -> driver -------------------------------------------------------------------------------------------------


class ReplicaReady(msgspec.Struct, frozen=True, tag=True):
    """The replica is set up and sleeps before step 0."""

    num_blocks: int  # of the cache: the smallest of all ranks
    dtype: str
    device_name: str
    num_graphs: int = 0  # recordings of decode steps on each of its ranks


class StepDeltas(msgspec.Struct, frozen=True, tag=True):
    """New tokens, at most one delta a request."""

    deltas: list[TokenDelta]


class Idle(msgspec.Struct, frozen=True, tag=True):
    """No replica had work: this leader sleeps before ``step`` until it is woken."""

    step: int


class RankStats(msgspec.Struct, frozen=True, tag=True):
    """What one rank counted since it started."""

    rank: int
    bytes_sent: dict[str, dict[str, int]]  # axis -> operation -> bytes that this rank sent to others
    tokens_per_expert: list[list[int]] = []  # by MoE layer, of this rank's experts in order
    num_replays: int = 0  # steps from device graphs
    num_late_compilations: int = 0  # of kernels, since this rank was ready
    waited_s: dict[str, float] = {}  # axis -> see ``Communicator.waited_s``
    pid: int = 0


class ReplicaStats(msgspec.Struct, frozen=True, tag=True):
    """What one replica counted since it started."""

    num_steps: int  # with work of its own
    num_dummy_steps: int  # taken for the sake of the other replicas
    num_scheduled_tokens: int
    num_preemptions: int
    num_agreements: int
    coordination_s: float  # spent agreeing, which includes waiting for slower replicas
    ranks: list[RankStats]  # [] if not asked for
    num_running: int = 0  # now, as all below that do not say since
    num_waiting: int = 0
    blocks_total: int = 0  # without the null block; each is used, cached or blank
    blocks_used: int = 0
    blocks_cached: int = 0  # held by no request, but with a prefix that the next may want
    num_queried_tokens: int = 0  # since the start: looked up in the prefix cache,
    num_cached_tokens: int = 0  # and found there
    step_s: float = 0.0  # since the start: spent in steps with work, without agreeing on them
    steps_by_duration: list[int] = []  # how many of these took how long, by the bounds in ``step_times.py``
    recent_steps: list[StepTime] = []  # oldest first, as many as are remembered


# --- leader -> the other ranks of its replica -------------------------------------------------------------------------


class StepPlan(msgspec.Struct, frozen=True, tag=True):
    """One step to execute; no batch means a dummy batch."""

    agreement: StepAgreement
    batch: ScheduledBatch | None = None


class RankHello(msgspec.Struct, frozen=True, tag=True):
    """A process has connected and listens."""


Command = AddRequest | AbortRequest | FinishRequest | Wake | UpdateSettings | CollectStats | Shutdown
Report = ReplicaReady | StepDeltas | Idle | ReplicaStats
PlanMessage = StepPlan | CollectStats | Shutdown
FollowerReport = RankHello | RankStats
