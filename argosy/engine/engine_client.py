"""What ``LLM`` needs of an engine, wherever it runs, and the twin for an engine in this process.

``replica_client.py`` is the twin for engines in other processes. Text and user requests are not known here. Invariant:
after ``close``, or an error out of ``step`` of the other twin, nothing of the engine runs any more.
"""

from typing import Protocol

from argosy.engine.dp_load_balancer import check_replica
from argosy.engine.engine_core import EngineCore
from argosy.engine.replica_loop import build_request
from argosy.engine.replica_messages import AddRequest, ReplicaStats, UpdateSettings
from argosy.engine.wire import AnySpoke
from argosy.messages import FinishReason, TokenDelta


class EngineClient(Protocol):
    """An engine of one or more replicas, from outside."""

    def add(self, request: AddRequest, data_parallel_rank: int | None = None) -> None:
        """Queue a request, in a given replica or where there is least to do.

        Raises:
            ValueError: it could never run, its id is taken, or there is no such replica.
        """

    def abort(self, request_id: str) -> None:
        """End a request without a trace; unknown ones are over already."""

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """End a request whose end was found in its text; no delta follows."""

    def step(self, interrupt: AnySpoke | None = None, timeout_s: float = 0.0) -> list[TokenDelta]:
        """Wait for news of any request, and return it: new tokens, at most a few steps' worth. [] if none is left.

        With an ``interrupt`` also [] when something has arrived there, or after ``timeout_s``; then it waits too if
        there is no request. Within a step of this process nothing is waited for.

        Raises:
            RuntimeError: the engine failed.
        """

    def has_unfinished(self) -> bool: ...

    def update_settings(self, settings: UpdateSettings) -> None:
        """Change settings between requests.

        Raises:
            RuntimeError: requests are unfinished.
        """

    def collect_stats(self) -> list[ReplicaStats]:
        """By dp rank."""

    def poll_stats(self, *, has_ranks: bool) -> list[ReplicaStats]:
        """The same without waiting: by dp rank, what arrived last; [] until all have answered once.

        It asks for new ones, ``has_ranks`` for those of all ranks too, which costs a replica a moment.
        """

    def close(self) -> None:
        """End the engine; a second time does nothing."""


class InProcessClient:
    """The engine is an object here: every call is the core's."""

    def __init__(self, core: EngineCore, eos_token_ids: tuple[int, ...]) -> None:
        self.core = core
        self._eos_token_ids = eos_token_ids

    def add(self, request: AddRequest, data_parallel_rank: int | None = None) -> None:
        if data_parallel_rank is not None:
            check_replica(data_parallel_rank, 1)
        self.core.add(build_request(request, self._eos_token_ids))

    def abort(self, request_id: str) -> None:
        scheduler = self.core.scheduler
        self.core.abort(request_id)
        if not scheduler.num_running and not scheduler.num_waiting:
            scheduler.drain()  # nobody is left to read the reports of these aborts

    def finish(self, request_id: str, reason: FinishReason) -> None:
        self.core.finish(request_id, reason)

    def step(self, interrupt: AnySpoke | None = None, timeout_s: float = 0.0) -> list[TokenDelta]:
        if interrupt is not None and not self.core.has_unfinished():
            interrupt.wait(timeout_s)
            return []
        return self.core.step()

    def has_unfinished(self) -> bool:
        return self.core.has_unfinished()

    def update_settings(self, settings: UpdateSettings) -> None:
        self.core.update_settings(settings)

    def collect_stats(self) -> list[ReplicaStats]:
        return [self.core.collect_stats()]

    def poll_stats(self, *, has_ranks: bool) -> list[ReplicaStats]:
        return [self.core.collect_stats(has_ranks=has_ranks)]

    def close(self) -> None:
        return None
