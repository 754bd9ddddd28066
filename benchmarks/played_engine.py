"""The program of an engine process that computes nothing: what is left of a server's cost is the server's own.

A request's tokens are drawn from its prompt's length (``answer_of``). The first leaves at once, the others one a step
of ``STEP_S``, all requests in one message, as an engine's do. ``start_played_engine`` is its ``StartProcess``.
"""

import os
import time
from collections.abc import Callable

import msgspec

from argosy.engine.replica_messages import AbortRequest, AddRequest, FinishRequest, ReplicaStats, Shutdown, StepDeltas
from argosy.engine.wire import Spoke
from argosy.messages import FinishReason, TokenDelta
from argosy.server.child_process import ChildProcess, read_first_words
from argosy.server.engine_messages import (
    EngineCommand,
    EngineDescription,
    EngineLaunch,
    EngineReady,
    EngineReport,
    EngineSnapshot,
    EngineStarted,
    SubmitRequest,
)

MODULE = "benchmarks.played_engine"
STEP_S = 0.02
FIRST_TOKEN_ID = 8  # of the built-in tokenizer: one ASCII character each, so every token shows at once
NUM_TOKEN_IDS = 94
_BEAT_S = 0.5


def start_played_engine(first_words: bytes, name: str, on_exit: Callable[[str], None]) -> ChildProcess:
    return ChildProcess(MODULE, first_words, name, on_exit)


def answer_of(num_prompt_tokens: int, num_tokens: int) -> list[int]:
    return [FIRST_TOKEN_ID + (num_prompt_tokens * 7 + i) % NUM_TOKEN_IDS for i in range(num_tokens)]


def main() -> None:
    launch = msgspec.msgpack.decode(read_first_words(0), type=EngineLaunch)
    decoder: msgspec.msgpack.Decoder[EngineCommand] = msgspec.msgpack.Decoder(EngineCommand)
    spoke: Spoke[EngineReport, EngineCommand] = Spoke(decoder, launch.address, launch.peer)
    spoke.send(EngineStarted(os.getpid()))
    spoke.send(EngineReady(EngineDescription(4096, 4096, 1024, 64, "nothing", "none", "played", 1, 1, 1, 0.0)))
    PlayedEngine(spoke).run()
    spoke.close()


class PlayedEngine:
    """Its loop. A beat keeps the pool from taking it for stuck."""

    def __init__(self, spoke: Spoke[EngineReport, EngineCommand]) -> None:
        self._spoke = spoke
        self._running: dict[str, tuple[list[int], int]] = {}  # request id -> its tokens, how many were told
        self._num_commands = 0
        self._num_steps = 0

    def run(self) -> None:
        next_step_s = next_beat_s = time.monotonic()
        while True:
            now_s = time.monotonic()
            if now_s >= next_beat_s:
                self._beat(now_s)
                next_beat_s = now_s + _BEAT_S
            if now_s >= next_step_s:
                self._tell(list(self._running))
                next_step_s = max(next_step_s + STEP_S, now_s)
            self._spoke.wait(min(next_step_s, next_beat_s) - time.monotonic())
            for command in self._spoke.receive(waits=False):
                self._num_commands += 1
                match command:
                    case SubmitRequest(request):
                        self._add(request)
                    case AbortRequest(request_id) | FinishRequest(request_id):
                        self._running.pop(request_id, None)
                    case Shutdown():
                        return

    def _add(self, request: AddRequest) -> None:
        num_tokens = request.sampling_params.max_tokens or 1
        self._running[request.request_id] = answer_of(len(request.prompt_token_ids), num_tokens), 0
        self._tell([request.request_id])

    def _tell(self, request_ids: list[str]) -> None:
        deltas = []
        for request_id in request_ids:
            token_ids, num_told = self._running[request_id]
            is_last = num_told + 1 == len(token_ids)
            deltas.append(TokenDelta(request_id, [token_ids[num_told]], FinishReason.LENGTH if is_last else None))
            self._running[request_id] = token_ids, num_told + 1
            if is_last:
                del self._running[request_id]
        if deltas:
            self._num_steps += 1
            self._spoke.send(StepDeltas(deltas))

    def _beat(self, now_s: float) -> None:
        stats = ReplicaStats(self._num_steps, 0, self._num_steps, 0, 0, 0.0, [], num_running=len(self._running))
        self._spoke.send(EngineSnapshot(now_s, self._num_commands, bool(self._running), [stats]))


if __name__ == "__main__":
    main()
