"""The requests that wait for a row, oldest first.

It keeps an order and does not decide who may start. Invariant: ``oldest`` is the first, by age, of the unfinished
requests that were pushed and not popped.
"""

import heapq

from argosy.engine.request import Request


class WaitingQueue:
    """A heap. Requests that end while they wait are skipped when met, so that ending one costs no search."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Request]] = []
        self._num_finished = 0  # entries of the heap whose request has ended

    def __len__(self) -> int:
        return len(self._heap) - self._num_finished

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, (request.age(), request))

    def oldest(self) -> Request | None:
        while self._heap and self._heap[0][1].status.is_finished:
            heapq.heappop(self._heap)
            self._num_finished -= 1
        return self._heap[0][1] if self._heap else None

    def pop_oldest(self) -> None:
        heapq.heappop(self._heap)

    def forget_finished(self) -> None:
        """One more entry has ended. Dropped for good once they are most of the heap: a prompt may be large."""
        self._num_finished += 1
        if self._num_finished > len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if not entry[1].status.is_finished]
            heapq.heapify(self._heap)
            self._num_finished = 0
