"""What the API process and an engine process say to one another: tagged msgspec structs.

The *pool* is the API process's side (``engine_pool.py``), the *engine process* holds one engine (``engine_loop.py``).
Requests and tokens are the engine's own messages; here is what the two processes add. No torch. Invariant: every
message names its type on the wire, so a process never guesses what it received, and nothing is ever unpickled.
"""

import msgspec

from argosy.config import EngineConfig
from argosy.engine.deployment_stats import summarize_stats
from argosy.engine.replica_messages import AbortRequest, AddRequest, FinishRequest, ReplicaStats, Shutdown, StepDeltas
from argosy.engine.wire import WireAddress
from argosy.messages import DeploymentStats

SPARE_ARGUMENT = "spare"  # to the engine's program, then how many ranks: import all now, hear later what to be


class EngineLaunch(msgspec.Struct, frozen=True):
    """The first words to a new engine process, on its standard input."""

    config: EngineConfig
    address: WireAddress  # the pool's hub
    peer: int  # the number to connect with: of this start of this engine alone


# --- pool -> engine ---------------------------------------------------------------------------------------------------


class SubmitRequest(msgspec.Struct, frozen=True, tag=True):
    """A request to compute; an answer is deltas, or ``RequestRefused``."""

    request: AddRequest
    data_parallel_rank: int | None = None  # a replica inside the engine; None: where there is least to do


# --- engine -> pool ---------------------------------------------------------------------------------------------------


class EngineStarted(msgspec.Struct, frozen=True, tag=True):
    """The process runs and can be talked to; loading begins."""

    pid: int


class StartStage(msgspec.Struct, frozen=True, tag=True):
    """A stage of the start that takes long: ``done`` of ``total``."""

    stage: str
    done: int
    total: int


class EngineDescription(msgspec.Struct, frozen=True):
    """What an engine is, once it is ready."""

    max_model_len: int
    vocab_size: int  # ids that a prompt may hold
    num_blocks: int  # of the cache of each replica, the null block included
    block_size: int
    device_name: str
    dtype: str
    number_format: str  # for people: "bfloat16, w8a8, int8 cache"
    dp_size: int  # replicas inside this engine
    tp_size: int
    ep_size: int  # ranks that share the experts
    start_s: float
    nnodes: int = 1  # equal blocks of neighbouring ranks
    memory_report: tuple[str, ...] = ()  # lines for people


class EngineReady(msgspec.Struct, frozen=True, tag=True):
    description: EngineDescription


class RequestRefused(msgspec.Struct, frozen=True, tag=True):
    """The engine will not compute this request; nothing else is said of it."""

    request_id: str
    message: str


class EngineSnapshot(msgspec.Struct, frozen=True, tag=True):
    """An engine's counters and queues: about every half second, also when it is idle, so it is the heartbeat too.

    Counters only grow while the process lives, and start at 0 with a new one.
    """

    time_s: float  # time.monotonic of the engine process, which is the machine's
    num_commands: int  # heard from the pool so far
    has_work: bool  # whether a request is unfinished, as of the last of those commands
    replicas: list[ReplicaStats] = []  # by dp rank; [] until the replicas have answered for the first time

    @property
    def num_running(self) -> int:
        return sum(each.num_running for each in self.replicas)

    @property
    def num_waiting(self) -> int:
        return sum(each.num_waiting for each in self.replicas)

    @property
    def blocks_total(self) -> int:
        """Without the null blocks. Every block is used, cached or blank."""
        return sum(each.blocks_total for each in self.replicas)

    @property
    def blocks_used(self) -> int:
        return sum(each.blocks_used for each in self.replicas)

    @property
    def blocks_cached(self) -> int:
        """Held by no request, but with a prefix that the next one may want."""
        return sum(each.blocks_cached for each in self.replicas)

    @property
    def num_preemptions(self) -> int:
        return sum(each.num_preemptions for each in self.replicas)

    @property
    def num_steps(self) -> int:
        return sum(each.num_steps for each in self.replicas)

    @property
    def num_dummy_steps(self) -> int:
        return sum(each.num_dummy_steps for each in self.replicas)

    @property
    def num_scheduled_tokens(self) -> int:
        return sum(each.num_scheduled_tokens for each in self.replicas)

    @property
    def prefix_cache_queries(self) -> int:
        """Tokens that were looked up."""
        return sum(each.num_queried_tokens for each in self.replicas)

    @property
    def prefix_cache_hits(self) -> int:
        """Tokens that were found."""
        return sum(each.num_cached_tokens for each in self.replicas)

    @property
    def step_s(self) -> float:
        """Seconds spent in steps; several replicas step at the same time."""
        return sum(each.step_s for each in self.replicas)

    @property
    def steps_by_duration(self) -> list[int]:
        """How many steps took how long, by the bounds in ``step_times.py``."""
        return [sum(counts) for counts in zip(*(each.steps_by_duration for each in self.replicas), strict=False)]

    @property
    def num_graph_replays(self) -> int:
        """Of all ranks, as of the last slow beat."""
        return sum(rank.num_replays for each in self.replicas for rank in each.ranks)

    @property
    def coordination_s(self) -> float:
        """Seconds that replicas spent agreeing, which includes waiting for slower ones."""
        return sum(each.coordination_s for each in self.replicas)

    def summarize_ranks(self, num_ep_ranks: int) -> DeploymentStats | None:
        """Bytes by axis and tokens by expert, as of the last slow beat (``num_ep_ranks``: the description's ep_size).

        None until every rank has told its counters.
        """
        if not self.replicas or not all(each.ranks for each in self.replicas):
            return None
        return summarize_stats(self.replicas, num_ep_ranks)


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """The last words of an engine process."""

    message: str
    is_user_error: bool = False  # settings or a model that cannot work


EngineCommand = SubmitRequest | AbortRequest | FinishRequest | Shutdown
EngineReport = EngineStarted | StartStage | EngineReady | StepDeltas | RequestRefused | EngineSnapshot | EngineFailed
