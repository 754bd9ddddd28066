"""``argosy serve`` on a node other than 0: it computes for node 0, run after run, until node 0 ends or a signal comes.

No HTTP here, and no torch: each run is a process of its own (``node_process.py``). When a run fails, on whichever node,
node 0 opens another and this node joins it. Invariant: when ``host_node`` returns, no process of it is left.
"""

import asyncio
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from argosy.config import EngineConfig
from argosy.server.child_process import ChildProcess
from argosy.server.node_process import EXIT_FAILED, EXIT_NO_RUN, EXIT_OK, EXIT_USER_ERROR

NODE_MODULE = "argosy.server.node_process"
_KILL_S = 5.0  # for a process that was killed, and what it had started, to be gone

Say = Callable[[str], None]


class NodeProcess(Protocol):
    """One run's process; ``ChildProcess`` is the real one."""

    @property
    def exit_code(self) -> int | None: ...

    @property
    def gone(self) -> "asyncio.Future[None]": ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


StartNode = Callable[[bytes, str], NodeProcess]


@dataclass(frozen=True, kw_only=True, slots=True)
class NodePatience:
    """``leave_s``: after SIGTERM node 0 may take this long to end the engine. More failures than ``max_failures``
    within ``window_s`` are the last."""

    leave_s: float
    max_failures: int = 5
    window_s: float = 600.0
    pause_s: float = 0.5  # between the first two failures; it doubles


def start_node_process(first_words: bytes, name: str) -> NodeProcess:
    return ChildProcess(NODE_MODULE, first_words, name, on_exit=lambda what: None)  # its exit code says enough


def host_node(
    config: EngineConfig, patience: NodePatience, say: Say, start_process: StartNode = start_node_process
) -> int:
    """The exit code: 0 when node 0 ended in good order, or a signal told this node to leave and it could."""
    say(
        f"node {config.node_rank} of {config.nnodes} computes for node 0 at {config.master_addr}:{config.master_port}, "
        "which has the API; settings of the server other than --shutdown-timeout-s do nothing here"
    )
    return asyncio.run(_NodeHost(config, patience, say, start_process).run())


class _NodeHost:
    def __init__(self, config: EngineConfig, patience: NodePatience, say: Say, start_process: StartNode) -> None:
        self._config = config
        self._patience = patience
        self._say = say
        self._start_process = start_process
        self._failures_s: deque[float] = deque()

    async def run(self) -> int:
        leaving = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, leaving.set)
        while True:
            exit_code = await self._join_once(leaving)
            if exit_code is not None:
                return exit_code
            pause_s = self._patience.pause_s * 2 ** (len(self._failures_s) - 1) if self._failures_s else 0.0
            try:
                await asyncio.wait_for(leaving.wait(), pause_s)
            except TimeoutError:
                continue
            return EXIT_OK

    async def _join_once(self, leaving: asyncio.Event) -> int | None:
        """One run; None: there is to be another."""
        name = f"node {self._config.node_rank}"
        process = self._start_process(msgspec.msgpack.encode(self._config), name)
        left = asyncio.create_task(leaving.wait())
        try:
            await asyncio.wait((left, process.gone), return_when=asyncio.FIRST_COMPLETED)
            if leaving.is_set() and not process.gone.done():
                return await self._leave(process)
        finally:
            left.cancel()
            process.kill()
            await asyncio.wait((process.gone,), timeout=_KILL_S)
        return self._judge(process.exit_code)

    async def _leave(self, process: NodeProcess) -> int:
        """Node 0 may still have requests, and takes us along when they are done."""
        process.terminate()
        limit_s = self._patience.leave_s
        await asyncio.wait((process.gone,), timeout=limit_s)
        if process.gone.done():
            return EXIT_OK
        self._say(f"node {self._config.node_rank}: node 0 did not end the engine within {limit_s:g} s; left without it")
        return EXIT_FAILED

    def _judge(self, exit_code: int | None) -> int | None:
        node = f"node {self._config.node_rank}"
        if exit_code == EXIT_NO_RUN:
            self._say(f"{node}: still waits for node 0")
            return None
        if exit_code in (EXIT_OK, EXIT_USER_ERROR):
            return exit_code
        now_s = time.monotonic()
        self._failures_s.append(now_s)
        while self._failures_s[0] < now_s - self._patience.window_s:
            self._failures_s.popleft()
        if len(self._failures_s) > self._patience.max_failures:
            self._say(f"{node}: given up, {len(self._failures_s)} runs failed within {self._patience.window_s:g} s")
            return EXIT_FAILED
        self._say(f"{node}: the run failed; joins the next one")
        return None
