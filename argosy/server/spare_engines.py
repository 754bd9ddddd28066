"""Engine processes kept in reserve: they have imported torch and the engine, hold no weights, and wait to be told.

A restart then takes as long as loading the model, also on a busy machine. A spare is no engine: it has no seat, no
socket and no device. Invariant: after ``aclose`` no spare is left, and a spare that dies or is stopped delays nobody.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from argosy.config import EngineConfig
from argosy.server.child_process import ChildProcess, is_stopped
from argosy.server.engine_messages import SPARE_ARGUMENT
from argosy.server.engine_seat import ENGINE_MODULE, EngineStatus, Process
from argosy.server.launch_plan import plan_engines

MIN_FREE_BYTES = 4 * 2**30  # what must be left for a spare that nobody asked for; it takes 0.2 GB itself
_CALM_S = 5.0  # engines are ready for so long before a spare takes the time of a core
_RETRY_S = 30.0  # after one that died
_POLL_S = 0.5

_log = logging.getLogger(__name__)


class SpareEngines:
    """``start`` is the pool's ``StartProcess``; ``keep`` begins to hold ``number`` in reserve (None: what fits)."""

    def __init__(
        self,
        number: int | None,
        config: EngineConfig,
        *,
        calm_s: float = _CALM_S,
        count_free_bytes: Callable[[], int | None] | None = None,
    ) -> None:
        self._number = number
        self._arguments = (SPARE_ARGUMENT, str(plan_engines(config)[0].world_size))
        self._calm_s = calm_s
        self._count_free_bytes = count_free_bytes or free_memory_bytes
        self._spares: list[ChildProcess] = []
        self._given_up: list[ChildProcess] = []
        self._not_before_s = 0.0
        self._keeping: asyncio.Task[None] | None = None

    @property
    def pids(self) -> list[int]:
        return [spare.pid for spare in self._spares]

    def start(self, first_words: bytes, name: str, on_exit: Callable[[str], None]) -> Process:
        """A spare that takes the name, or a new process."""
        while self._spares:
            spare = self._spares.pop(0)
            if not is_stopped(spare.pid):
                spare.take_up(first_words, name, on_exit)
                _log.info("%s is the spare one now (pid %d)", name, spare.pid)
                return spare
            spare.kill()
            self._given_up.append(spare)
        return ChildProcess(ENGINE_MODULE, first_words, name, on_exit)

    def keep(self, read_engines: Callable[[], Sequence[EngineStatus]]) -> None:
        """Start spares whenever one is missing and no engine is starting."""
        if self._number != 0:
            self._keeping = asyncio.get_running_loop().create_task(self._keep(read_engines), name="spare engines")

    async def aclose(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait((self._keeping,))
        left, self._spares = [*self._spares, *self._given_up], []
        for spare in left:
            spare.kill()
        await asyncio.gather(*(spare.gone for spare in left))

    async def _keep(self, read_engines: Callable[[], Sequence[EngineStatus]]) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            self._given_up = [spare for spare in self._given_up if not spare.gone.done()]
            if len(self._spares) < self._count_wanted() and self._is_calm(read_engines()):
                self._add()

    def _count_wanted(self) -> int:
        if self._number is not None:
            return self._number
        free_bytes = self._count_free_bytes()
        return 1 if self._spares or (free_bytes is not None and free_bytes >= MIN_FREE_BYTES) else 0

    def _is_calm(self, engines: Sequence[EngineStatus]) -> bool:
        now_s = time.monotonic()
        return now_s >= self._not_before_s and all(
            engine.state == "failed" or (engine.state == "ready" and now_s - engine.since_s >= self._calm_s)
            for engine in engines
        )

    def _add(self) -> None:
        started: list[ChildProcess] = []
        try:
            spare = ChildProcess(
                ENGINE_MODULE, None, "spare engine", lambda what: self._lose(started[0], what), self._arguments
            )
        except OSError as error:
            self._put_off(f"a spare engine cannot be started: {error}")
            return
        started.append(spare)
        self._spares.append(spare)
        _log.info("a spare engine is kept (pid %d)", spare.pid)

    def _lose(self, spare: ChildProcess, what: str) -> None:
        with contextlib.suppress(ValueError):  # it was given up before
            self._spares.remove(spare)
            self._given_up.append(spare)
            self._put_off(what)

    def _put_off(self, why: str) -> None:
        self._not_before_s = time.monotonic() + _RETRY_S
        _log.warning("%s; another one is started in %g s", why, _RETRY_S)


def free_memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What processes may still take, of the machine and of their container; None where the system does not tell."""
    try:
        lines = (proc / "meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    with contextlib.suppress(OSError, ValueError):  # no container, or "max"
        limit = int((cgroup / "memory.max").read_text(encoding="ascii"))
        free = min(free, limit - int((cgroup / "memory.current").read_text(encoding="ascii")))
    return free
