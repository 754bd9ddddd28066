"""A driver and the leaders of several replicas in one thread, with every order of events that real processes may have.

The driver is the real ``ReplicasClient``, leaders are real ``ReplicaLoop``s over a real scheduler and a fake runner;
only the link between them is a queue here, from which a random choice delivers one message, or lets one leader go one
half step, at a time. Messages go through their wire form. Invariant: a wait for which nothing can happen any more is a
hang, and fails.
"""

import random
from collections import deque

import msgspec

from argosy.cache.block_manager import BlockManager
from argosy.distributed.dp_coord import ExchangePolicy, StepAgreement, StepProposal, agree
from argosy.engine.replica_loop import ReplicaLoop
from argosy.engine.replica_messages import Command, RankStats, Report
from argosy.engine.scheduler import Scheduler
from argosy.engine.wire import AnySpoke
from argosy.messages import ScheduledBatch, StepOutput
from tests.helpers.scheduler_simulation import EOS_TOKEN_ID, FakeRunner

BLOCK_SIZE = 4
NUM_BLOCKS = 40
MAX_MODEL_LEN = 40


class FakeRanks:
    """A replica's ranks: records what was agreed on."""

    def __init__(self, dp_rank: int) -> None:
        self.dp_rank = dp_rank
        self.agreements: list[StepAgreement] = []
        self.is_shut_down = False
        self.most_in_flight = 0
        self._runner = FakeRunner(BLOCK_SIZE)
        self._salts: dict[str, str | None] = {}
        self._in_flight: deque[StepOutput] = deque()

    def start(self, batch: ScheduledBatch, agreement: StepAgreement) -> None:
        assert batch.num_in_flight == len(self._in_flight)
        assert agreement.has_work and agreement.num_tokens[self.dp_rank] == batch.num_tokens
        if agreement.recording is not None:
            assert 0 < batch.decode_length <= agreement.recording.length and len(batch.rows) <= agreement.recording.size
        self.agreements.append(agreement)
        self._salts.update({request.request_id: None for request in batch.admitted})
        self._in_flight.append(self._runner.execute(batch, self._salts, {}))
        self.most_in_flight = max(self.most_in_flight, len(self._in_flight))

    def finish(self) -> StepOutput:
        return self._in_flight.popleft()

    def execute_dummy(self, agreement: StepAgreement) -> None:
        assert agreement.has_work and agreement.num_tokens[self.dp_rank] == 1 and not self._in_flight
        self.agreements.append(agreement)

    def collect_stats(self) -> list[RankStats]:
        return [RankStats(self.dp_rank, {})]

    def shut_down(self) -> None:
        assert not self._in_flight
        self.is_shut_down = True


class FakeCoordinator:
    num_agreements = 0
    coordination_s = 0.0


class SimulatedLink:
    """``ReplicaLink`` to leaders that run only while the driver waits, as a random choice has it."""

    def __init__(
        self, num_replicas: int, rng: random.Random, policy: ExchangePolicy, *, async_scheduling: bool = False
    ) -> None:
        self.num_replicas = num_replicas
        self.ranks = [FakeRanks(dp_rank) for dp_rank in range(num_replicas)]
        self.loops = [self._build_loop(dp_rank, policy, async_scheduling) for dp_rank in range(num_replicas)]
        self.is_closed_orderly: bool | None = None
        self._rng = rng
        self._commands: list[deque[bytes]] = [deque() for _ in range(num_replicas)]
        self._reports: list[deque[bytes]] = [deque() for _ in range(num_replicas)]
        self._proposals: dict[int, StepProposal] = {}
        self._agreements: dict[int, StepAgreement] = {}  # by dp rank: computed, not carried out yet

    def send(self, dp_rank: int, command: Command) -> None:
        self._commands[dp_rank].append(msgspec.msgpack.encode(command))

    def receive(self, timeout_s: float, interrupt: AnySpoke | None = None) -> list[tuple[int, Report]]:
        received: list[tuple[int, Report]] = []
        while not received or self._rng.random() < 0.3:
            if interrupt is not None and (not self._can_move() or self._rng.random() < 0.1):
                break  # interrupted, or the time is over
            assert received or self._can_move(), f"hang: {self._describe()}"
            if not received and self._rng.random() < 0.05:
                break  # the timeout
            if not self._can_move():
                break
            received += self._move()
        return received

    def num_questions_waiting(self) -> list[int]:
        """Of ``CollectStats``, by dp rank, that the leader has not heard."""
        return [sum(b"CollectStats" in command for command in commands) for commands in self._commands]

    def close(self, *, is_orderly: bool) -> None:
        while is_orderly and self._can_move():
            self._move()
        self.is_closed_orderly = is_orderly

    def _build_loop(self, dp_rank: int, policy: ExchangePolicy, async_scheduling: bool) -> ReplicaLoop:
        manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE, enable_prefix_caching=True, hash_key=bytes(32))
        scheduler = Scheduler(
            manager,
            max_num_seqs=4,
            max_num_batched_tokens=16,
            max_model_len=MAX_MODEL_LEN,
            async_scheduling=async_scheduling,
        )
        return ReplicaLoop(
            scheduler,
            self.ranks[dp_rank],
            policy=policy,
            eos_token_ids=(EOS_TOKEN_ID,),
            coordinator=FakeCoordinator(),
            report=lambda report: self._reports[dp_rank].append(msgspec.msgpack.encode(report)),
        )

    def _moves(self) -> list[tuple[str, int]]:
        moves = []
        for dp_rank, loop in enumerate(self.loops):
            if self._reports[dp_rank]:
                moves.append(("report", dp_rank))
            if dp_rank in self._agreements:
                moves.append(("carry out", dp_rank))
            elif dp_rank not in self._proposals and not loop.is_stopped:
                if self._commands[dp_rank]:
                    moves.append(("command", dp_rank))
                if not loop.is_asleep:
                    moves.append(("propose", dp_rank))
        return moves

    def _can_move(self) -> bool:
        return bool(self._moves())

    def _move(self) -> list[tuple[int, Report]]:
        kind, dp_rank = self._rng.choice(self._moves())
        loop = self.loops[dp_rank]
        match kind:
            case "report":
                report: Report = msgspec.msgpack.decode(self._reports[dp_rank].popleft(), type=Report)  # type: ignore[arg-type]
                return [(dp_rank, report)]
            case "command":
                command: Command = msgspec.msgpack.decode(self._commands[dp_rank].popleft(), type=Command)  # type: ignore[arg-type]
                loop.receive(command)
            case "propose":
                self._proposals[dp_rank] = loop.propose()
                if len(self._proposals) == self.num_replicas:
                    proposals = [self._proposals[i] for i in range(self.num_replicas)]
                    self._agreements = {i: agree(proposals, each.policy) for i, each in enumerate(self.loops)}
                    assert len(set(self._agreements.values())) == 1, "the leaders agreed on different things"
                    self._proposals = {}
            case "carry out":
                loop.carry_out(self._agreements.pop(dp_rank))
                loop.scheduler.check_integrity()
        return []

    def _describe(self) -> str:
        states = [
            f"replica {i} {'asleep' if loop.is_asleep else 'awake'} at step {loop.step}"
            for i, loop in enumerate(self.loops)
        ]
        return ", ".join(states) + f"; proposed: {sorted(self._proposals)}"
