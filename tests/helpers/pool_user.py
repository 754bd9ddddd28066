"""A caller of the engine pool for tests: gathers what is delivered, and finds the processes that engines consist of."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from argosy.config import EngineConfig
from argosy.engine.replica_messages import AddRequest
from argosy.messages import FinishReason, TokenDelta
from argosy.sampling_params import SamplingParams
from argosy.server.engine_pool import EnginePool, PoolSettings

WAIT_S = 60.0  # generous: other tests may keep the cores busy
SETTINGS: dict[str, object] = {"device": "cpu", "num_threads": 1, "max_model_len": 256, "block_size": 16}


class PoolUser:
    """Everything that a pool said of every request."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, list[FinishReason]] = {}
        self.refusals: dict[str, tuple[str, bool]] = {}
        self.pids: set[int] = set()  # of engines that were seen
        self._pool: EnginePool | None = None

    async def start(self, settings: PoolSettings | None = None, **config: object) -> "PoolUser":
        self._pool = await EnginePool.start(
            EngineConfig(**{**SETTINGS, **config}),  # type: ignore[arg-type]
            settings or PoolSettings(),
            deliver=self._deliver,
            refuse=self._refuse,
        )
        self.note_pids()
        return self

    @property
    def pool(self) -> EnginePool:
        assert self._pool is not None
        return self._pool

    def submit(self, request_id: str, prompt: list[int], params: SamplingParams, replica: int | None = None) -> None:
        self.tokens[request_id] = []
        self.ends[request_id] = []
        self.pool.submit(AddRequest(request_id, prompt, params), replica)

    def note_pids(self) -> list[int]:
        pids = [each.pid for each in self.pool.engines if each.pid is not None]
        self.pids.update(pids)
        return pids

    def is_over(self, request_id: str) -> bool:
        return bool(self.ends[request_id]) or request_id in self.refusals

    async def wait(self, is_so: Callable[[], bool], timeout_s: float = WAIT_S) -> float:
        """Until it is so; the seconds it took."""
        started_s = time.monotonic()
        while not is_so():
            if time.monotonic() - started_s > timeout_s:
                raise AssertionError(f"not so within {timeout_s:g} s: {self.pool.engines}")
            await asyncio.sleep(0.005)
        self.note_pids()
        return time.monotonic() - started_s

    async def wait_for_all(self, timeout_s: float = WAIT_S) -> None:
        await self.wait(lambda: all(map(self.is_over, self.ends)), timeout_s)

    async def wait_until_ready(self, timeout_s: float = WAIT_S) -> float:
        """All engines."""
        return await self.wait(lambda: all(each.state == "ready" for each in self.pool.engines), timeout_s)

    def forget(self) -> None:
        self.tokens, self.ends, self.refusals = {}, {}, {}

    def _deliver(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            assert not self.ends[delta.request_id], f"{delta} after the end"
            self.tokens[delta.request_id] += delta.new_token_ids
            if delta.finish_reason is not None:
                self.ends[delta.request_id].append(delta.finish_reason)

    def _refuse(self, request_id: str, message: str, is_users_fault: bool) -> None:
        assert request_id not in self.refusals and not self.ends[request_id]
        self.refusals[request_id] = (message, is_users_fault)


def processes_of_session(session: int) -> dict[int, int]:
    """pid -> parent of every living process of a session; each engine has one of its own, named by its pid."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            fields = (directory / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # it ended just now
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            found[int(directory.name)] = int(fields[1])
    return found


def children_of(pid: int) -> set[int]:
    """Living processes that ``pid`` has started, of whatever session."""
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            fields = (directory / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] not in "ZX":
            found.add(int(directory.name))
    return found
