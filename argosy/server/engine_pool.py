"""The API process's only door to the engines: requests in, new tokens out, whatever becomes of an engine meanwhile.

It chooses an engine for every request, remembers which tokens it has handed on, and gives the requests of an engine
that died to another one, behind those tokens. Text is ``outputs.py``'s, processes are ``engine_seat.py``'s. Everything
here runs in one event loop. Invariant: of every request each token is delivered at most once and in order, and the
request ends once: by its last delta, by ``refuse``, or by its caller's ``abort`` or ``finish``.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from argosy.config import EngineConfig
from argosy.engine.dp_load_balancer import DPLoadBalancer, check_replica
from argosy.engine.replica_messages import AbortRequest, AddRequest, FinishRequest, StepDeltas
from argosy.engine.wire import Hub
from argosy.messages import FinishReason, TokenDelta
from argosy.server.engine_messages import EngineCommand, EngineDescription, EngineReport, RequestRefused, SubmitRequest
from argosy.server.engine_seat import EngineSeat, EngineStatus, PoolSettings, StartProcess, start_engine_process
from argosy.server.launch_plan import plan_engines

Deliver = Callable[[list[TokenDelta]], None]
Refuse = Callable[[str, str, bool], None]  # request_id, message, whether it is the user's fault
OnProgress = Callable[[str, int, int], None]  # stage, done, total

_log = logging.getLogger(__name__)


class NoEngineError(RuntimeError):
    """No engine is ready to take the request now."""


@dataclass(kw_only=True, slots=True)
class _Ticket:
    """One unfinished request."""

    request: AddRequest  # with the id that engines know, which is never used twice
    request_id: str  # the caller's
    replica: int | None  # inside the engine, where the caller named one
    seat: EngineSeat | None = None  # None: waits for an engine that is about to be ready
    emitted: list[int] = field(default_factory=list)
    num_cached_tokens: int | None = None  # as the first engine counted them
    num_replays: int = 0


class EnginePool:
    """Build with ``start``, end with ``aclose``.

    ``deliver`` gets new tokens; ``refuse`` ends a request that cannot go on: an engine refused it (the user's fault),
    no engine is left, or too many have died with it. Both are called in the event loop and may call the pool.
    """

    def __init__(
        self,
        config: EngineConfig,
        settings: PoolSettings,
        deliver: Deliver,
        refuse: Refuse,
        on_progress: OnProgress | None,
        start_process: StartProcess,
    ) -> None:
        self.settings = settings
        self.num_replays = 0  # statistics: it only grows
        self._deliver = deliver
        self._refuse = refuse
        self._on_progress = on_progress
        self._loop = asyncio.get_running_loop()
        decoder: msgspec.msgpack.Decoder[EngineReport] = msgspec.msgpack.Decoder(EngineReport)
        self._hub: Hub[EngineCommand, EngineReport] = Hub(decoder, None)
        self._is_drain_due = False
        self._is_closed = False
        plan = plan_engines(config)
        peers = itertools.count()
        self._seats = tuple(
            EngineSeat(index, each, settings, self._hub.address, lambda: next(peers), self, start_process)
            for index, each in enumerate(plan)
        )
        self._dp_size = config.dp_size
        self._balancer = DPLoadBalancer(len(plan))
        self._tickets: dict[str, _Ticket] = {}  # by the engines' id; every unfinished request
        self._engine_ids: dict[str, str] = {}  # the caller's id -> the engines'
        self._homeless: dict[str, _Ticket] = {}  # of the tickets, those that no engine has now
        self._numbers = itertools.count()
        self._loop.add_reader(self._hub.fileno(), self._drain)

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        settings: PoolSettings,
        *,
        deliver: Deliver,
        refuse: Refuse,
        on_progress: OnProgress | None = None,
        start_process: StartProcess = start_engine_process,
    ) -> "EnginePool":
        """Start every engine and wait until all are ready. ``on_progress`` is told of the stages that take long.

        ``start_process`` is for tests.

        Raises:
            ValueError: settings, a model or a machine that cannot work; in the engine's own words.
            RuntimeError: a file, a device or a process failed. No process is left then.
        """
        pool = cls(config, settings, deliver, refuse, on_progress, start_process)
        try:
            for seat in pool._seats:
                seat.start()
            await asyncio.gather(*(seat.first_ready for seat in pool._seats))
        except BaseException:
            await pool.aclose(0.0)
            raise
        return pool

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: AddRequest, data_parallel_rank: int | None = None) -> None:
        """Give a request to the replica named, or to the engine with the fewest tokens in flight.

        Raises:
            ValueError: no such replica, or an unfinished request has the id.
            NoEngineError: no engine, or not that one, is ready.
        """
        if request.request_id in self._engine_ids:
            raise ValueError(f"request_id {request.request_id!r} is in use by an unfinished request; choose another")
        seat, replica = self._choose_seat(data_parallel_rank)
        # Late news of an earlier request must never be taken for this one's.
        engine_id = f"{request.request_id}~{next(self._numbers)}"
        named = msgspec.structs.replace(request, request_id=engine_id)
        ticket = _Ticket(
            request=named, request_id=request.request_id, replica=replica, emitted=list(request.output_token_ids)
        )
        self._tickets[engine_id] = ticket
        self._engine_ids[request.request_id] = engine_id
        self._give(ticket, seat)

    def abort(self, request_id: str) -> None:
        """End a request without a trace; unknown ones are over already."""
        ticket = self._forget(request_id)
        if ticket is not None and ticket.seat is not None:
            self._send(ticket.seat, AbortRequest(ticket.request.request_id))

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """End a request whose end was found in its text; nothing more is delivered of it."""
        ticket = self._forget(request_id)
        if ticket is not None and ticket.seat is not None:
            self._send(ticket.seat, FinishRequest(ticket.request.request_id, reason))

    # --- what it knows ------------------------------------------------------------------------------------------------

    @property
    def description(self) -> EngineDescription:
        """Of the first engine; all are alike."""
        description = self._seats[0].description
        assert description is not None, "a pool that has started knows its engines"
        return description

    @property
    def engines(self) -> list[EngineStatus]:
        return [seat.status(self._count_requests(seat)) for seat in self._seats]

    @property
    def dp_size(self) -> int:
        """Replicas of all engines together: what ``data_parallel_rank`` counts."""
        return self._dp_size

    @property
    def is_ready(self) -> bool:
        """Whether some engine takes requests."""
        return any(seat.state == "ready" for seat in self._seats)

    @property
    def num_requests(self) -> int:
        """Unfinished ones."""
        return len(self._tickets)

    async def aclose(self, timeout_s: float) -> None:
        """End all engines; what has not ended by itself after ``timeout_s`` is killed. Unfinished requests get no word.

        When it returns, no process is left. A second time does nothing.
        """
        if self._is_closed:
            return
        self._is_closed = True
        try:
            await asyncio.gather(*(seat.aclose(timeout_s) for seat in self._seats))
        finally:
            self._loop.remove_reader(self._hub.fileno())
            self._hub.close()
            self._tickets.clear()
            self._engine_ids.clear()
            self._homeless.clear()

    # --- what seats tell and ask --------------------------------------------------------------------------------------

    def send(self, peer: int, command: EngineCommand) -> None:
        """Raises RuntimeError: that process is gone."""
        # NOTE(order): sending may use up the signal that something has arrived, so look again afterwards.
        self._drain_soon()
        self._hub.send(peer, command)

    def drain(self) -> None:
        """Take everything that has arrived."""
        self._drain()

    def seat_ready(self, seat: EngineSeat) -> None:
        for ticket in list(self._homeless.values()):
            self._give(ticket, seat)

    def seat_lost(self, seat: EngineSeat, reason: str) -> None:
        """Its process is dead, or as good as dead: what it still says will not be heard."""
        if self._is_closed:
            return
        for ticket in [each for each in self._tickets.values() if each.seat is seat]:
            self._take_back(ticket, reason)

    def seat_failed(self, seat: EngineSeat) -> None:
        """It will not be ready again."""
        if any(each.state != "failed" for each in self._seats):
            return
        for ticket in list(self._homeless.values()):
            self._forget(ticket.request_id)
            self._refuse(ticket.request_id, f"no engine is left: {seat.last_message}", False)

    def progress(self, seat: EngineSeat, stage: str, done: int, total: int) -> None:
        if self._on_progress is not None:
            self._on_progress(stage if len(self._seats) == 1 else f"engine {seat.index}: {stage}", done, total)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _choose_seat(self, data_parallel_rank: int | None) -> tuple[EngineSeat, int | None]:
        """And the replica inside that engine."""
        replica = None
        candidates = self._seats
        if data_parallel_rank is not None:
            check_replica(data_parallel_rank, self._dp_size)
            per_engine = self._dp_size // len(self._seats)
            candidates = (self._seats[data_parallel_rank // per_engine],)
            replica = data_parallel_rank % per_engine
        ready = [seat for seat in candidates if seat.state == "ready"]
        if not ready:
            states = ", ".join(f"engine {seat.index} is {seat.state}" for seat in candidates)
            raise NoEngineError(f"no engine can take the request now: {states}; try again in a few seconds")
        return self._least_loaded(ready), replica

    def _least_loaded(self, seats: list[EngineSeat]) -> EngineSeat:
        loads = self._balancer.tokens_in_flight
        return min(seats, key=lambda seat: loads[seat.index])

    def _give(self, ticket: _Ticket, seat: EngineSeat) -> None:
        engine_id = ticket.request.request_id
        self._homeless.pop(engine_id, None)
        ticket.seat = seat
        num_tokens = len(ticket.request.prompt_token_ids) + len(ticket.emitted)
        self._balancer.add(engine_id, num_tokens, seat.index)
        request = ticket.request
        if ticket.emitted:
            request = msgspec.structs.replace(request, output_token_ids=ticket.emitted)
        self._send(seat, SubmitRequest(request, ticket.replica))

    def _take_back(self, ticket: _Ticket, reason: str) -> None:
        """From a dead engine, to give it to another: now, or to the first that is ready."""
        engine_id = ticket.request.request_id
        self._balancer.remove(engine_id)
        ticket.seat = None
        if ticket.num_replays == self.settings.max_replays:
            self._forget(ticket.request_id)
            message = f"{ticket.num_replays + 1} engines ended while they computed this request; the last: {reason}"
            self._refuse(ticket.request_id, message, False)
            return
        ticket.num_replays += 1
        self.num_replays += 1
        ready = [seat for seat in self._seats if seat.state == "ready"]
        if ready:
            self._give(ticket, self._least_loaded(ready))
        else:
            self._homeless[engine_id] = ticket

    def _forget(self, request_id: str) -> _Ticket | None:
        """The request is over."""
        engine_id = self._engine_ids.pop(request_id, None)
        if engine_id is None:
            return None
        self._balancer.remove(engine_id)
        self._homeless.pop(engine_id, None)
        return self._tickets.pop(engine_id)

    def _count_requests(self, seat: EngineSeat) -> int:
        return sum(ticket.seat is seat for ticket in self._tickets.values())

    def _send(self, seat: EngineSeat, command: EngineCommand) -> None:
        """A process that is gone has its end noticed soon, and its requests given to others."""
        with contextlib.suppress(RuntimeError):
            seat.send(command)

    def _drain_soon(self) -> None:
        if not self._is_drain_due:
            self._is_drain_due = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        """NOTE(order): zmq signals once, not for every message, so all is taken until nothing is left."""
        self._is_drain_due = False
        if self._hub.is_closed:
            return
        try:
            arrived = self._hub.receive(0.0)
        except (msgspec.MsgspecError, ValueError) as error:  # nobody can say whose tokens are lost with it
            _log.error("a message of an engine cannot be read (%s); all engines start again", error)
            for seat in self._seats:
                seat.end(f"a message of an engine cannot be read: {error}")
            return
        deltas: list[TokenDelta] = []
        refused: list[RequestRefused] = []
        for peer, report in arrived:
            for seat in self._seats:
                if seat.peer != peer:
                    continue  # what no seat listens to was said by a process that was given up
                seat.hear(report)
                match report:
                    case StepDeltas(news):
                        for delta in news:
                            self._take_delta(delta, deltas)
                    case RequestRefused():
                        refused.append(report)
        try:
            if deltas:
                self._deliver(deltas)
        finally:
            for refusal in refused:
                self._take_refusal(refusal)

    def _take_delta(self, delta: TokenDelta, deltas: list[TokenDelta]) -> None:
        ticket = self._tickets.get(delta.request_id)
        if ticket is None:
            return  # ended here meanwhile
        ticket.emitted += delta.new_token_ids
        if ticket.num_cached_tokens is None:
            ticket.num_cached_tokens = delta.num_cached_tokens
        delta.num_cached_tokens = ticket.num_cached_tokens  # what a replay finds in the cache is no saving to report
        if delta.finish_reason is None:
            self._balancer.grow(delta.request_id, len(delta.new_token_ids))
        else:
            self._forget(ticket.request_id)
        delta.request_id = ticket.request_id
        deltas.append(delta)

    def _take_refusal(self, refusal: RequestRefused) -> None:
        ticket = self._tickets.get(refusal.request_id)
        if ticket is None:
            return
        self._forget(ticket.request_id)
        self._refuse(ticket.request_id, refusal.message, ticket.num_replays == 0)
