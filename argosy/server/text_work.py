"""Work on long texts (tokens of text, text of tokens) away from the event loop, which has streams to feed.

The tokenizer lets other threads run meanwhile. Invariant: only short work runs in the loop, and only so many bodies
wait for a thread.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from argosy.server.errors import overloaded

T = TypeVar("T")
MAX_LOOP_SIZE = 1024  # characters or token ids; more would hold the loop up for milliseconds
MAX_WAITING = 64
_NUM_THREADS = 2


class TextWork:
    """Threads for long texts."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="argosy-text")
        self._num_waiting = 0

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """The result of ``work`` on ``size`` characters or token ids.

        Raises:
            ApiError: too many long texts wait already (503).
        """
        if size <= MAX_LOOP_SIZE:
            return work()
        if self._num_waiting >= MAX_WAITING:
            raise overloaded(f"{self._num_waiting} long texts wait to be tokenized already; try again later")
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._num_waiting -= 1
