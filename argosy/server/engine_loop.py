"""What an engine process does with its engine: commands in, steps, tokens out, and a heartbeat with its counters.

The only module of the server that loads torch, by way of the engine. It knows neither text nor HTTP, and nothing of the
pool's other engines. Invariant: commands are taken in the order sent, and the tokens of a step are sent before the next
one starts.
"""

import time
import traceback

from argosy.config import EngineConfig
from argosy.distributed.fork_server_start import close_fork_server_door
from argosy.engine.deployment import RunningEngine, deploy, end_engine
from argosy.engine.engine_client import EngineClient
from argosy.engine.replica_messages import AbortRequest, FinishRequest, Shutdown, StepDeltas
from argosy.engine.wire import Spoke
from argosy.messages import FinishReason
from argosy.server.engine_messages import (
    EngineCommand,
    EngineDescription,
    EngineReady,
    EngineReport,
    EngineSnapshot,
    RequestRefused,
    StartStage,
    SubmitRequest,
)

EngineSpoke = Spoke[EngineReport, EngineCommand]

HEARTBEAT_S = 0.5
_BEATS_PER_RANK_BEAT = 4  # counters of every rank and expert are many, and reading them costs a replica a moment
_STAGE_S = 0.2  # stages of the start are told no more often than this


def serve_engine(config: EngineConfig, spoke: EngineSpoke) -> None:
    """Start an engine and serve it until the pool says ``Shutdown``.

    Raises:
        ValueError: settings, a model or a machine that cannot work.
        RuntimeError: a file, a device or a rank failed.
    """
    running = deploy(config, StageReporter(spoke))
    close_fork_server_door()
    try:
        spoke.send(EngineReady(describe_engine(running)))
        EngineLoop(running.client, spoke).run()
    except ValueError as error:  # of the engine's own making: what the user gave has been accepted
        traceback.print_exception(error)
        raise RuntimeError(f"ValueError in the engine: {error}") from error
    finally:
        end_engine(running.client)


def describe_engine(running: RunningEngine) -> EngineDescription:
    config = running.config
    assert config.max_model_len is not None and config.num_blocks is not None
    built = running.built
    return EngineDescription(
        max_model_len=config.max_model_len,
        vocab_size=running.tokenizer.vocab_size,
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        device_name=running.device_name,
        dtype=config.dtype,
        number_format=config.number_format,
        dp_size=config.dp_size,
        tp_size=config.tp_size,
        ep_size=config.ep_size or config.world_size,
        start_s=running.start_s,
        nnodes=config.nnodes,
        memory_report=built.memory_use.lines() if built is not None and built.memory_use is not None else (),
    )


class EngineLoop:
    """One engine and the way to its pool. ``client`` may be of one rank or of many."""

    def __init__(self, client: EngineClient, spoke: EngineSpoke) -> None:
        self._client = client
        self._spoke = spoke
        self._num_commands = 0
        self._num_beats = 0
        self._next_beat_s = 0.0

    def run(self) -> None:
        """Until ``Shutdown``.

        Raises:
            RuntimeError: the engine failed.
        """
        client, spoke = self._client, self._spoke
        while True:
            wait_s = max(0.0, self._next_beat_s - time.monotonic())
            deltas = client.step(spoke, wait_s)
            # Only the pool aborts, and it has forgotten what it aborts.
            told = [delta for delta in deltas if delta.finish_reason is not FinishReason.ABORT]
            if told:
                spoke.send(StepDeltas(told))
            for command in spoke.receive(waits=False):
                self._num_commands += 1
                if isinstance(command, Shutdown):
                    return
                self._take(command)
            if time.monotonic() >= self._next_beat_s:
                self._beat()

    def _take(self, command: EngineCommand) -> None:
        match command:
            case SubmitRequest(request, data_parallel_rank):
                try:
                    self._client.add(request, data_parallel_rank)
                except ValueError as error:
                    self._spoke.send(RequestRefused(request.request_id, str(error)))
            case AbortRequest(request_id):
                self._client.abort(request_id)
            case FinishRequest(request_id, reason):
                self._client.finish(request_id, reason)

    def _beat(self) -> None:
        has_ranks = self._num_beats % _BEATS_PER_RANK_BEAT == 0
        self._num_beats += 1
        replicas = self._client.poll_stats(has_ranks=has_ranks)
        now_s = time.monotonic()
        self._next_beat_s = now_s + HEARTBEAT_S
        has_work = self._client.has_unfinished()
        self._spoke.send(EngineSnapshot(now_s, self._num_commands, has_work, replicas))


class StageReporter:
    """``StartProgress`` that tells the pool, not more often than people read."""

    def __init__(self, spoke: EngineSpoke) -> None:
        self._spoke = spoke
        self._stage = ""
        self._told_s = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if stage != self._stage or done == total or now_s - self._told_s >= _STAGE_S:
            self._stage, self._told_s = stage, now_s
            self._spoke.send(StartStage(stage, done, total))
