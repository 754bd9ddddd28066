"""Barriers in shared memory, copies that complete them, and warps with programs of their own, for the interpreter.

One program runs at a time, until it waits or arrives; which is next is drawn by lot. A copy arrives when nobody else
can go on: as late as it may. Its target holds a number that no test draws until then. A wait asks for a parity, as a
card's does.
Invariant: programs that all wait for good are a RuntimeError, which names what they wait for.
"""

import math
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Protocol

import torch


class Shared(Protocol):
    values: torch.Tensor


@dataclass
class Descriptor:
    """A tensor that is copied in boxes."""

    tensor: torch.Tensor
    block_shape: list[int]
    layout: None = None

    @property
    def block_type(self) -> SimpleNamespace:
        return SimpleNamespace(nbytes=math.prod(self.block_shape) * self.tensor.element_size())

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, start: Sequence[int]) -> torch.Tensor:
        box = torch.zeros(self.block_shape, dtype=self.tensor.dtype)
        stops = [min(int(at) + size, end) for at, size, end in zip(start, box.shape, self.tensor.shape, strict=True)]
        part = self.tensor[tuple(slice(int(at), stop) for at, stop in zip(start, stops, strict=True))]
        box[tuple(slice(size) for size in part.shape)] = part
        return box

    def write(self, start: Sequence[int], box: torch.Tensor) -> None:
        assert list(box.shape) == self.block_shape and box.dtype == self.tensor.dtype
        stops = [min(int(at) + size, end) for at, size, end in zip(start, box.shape, self.tensor.shape, strict=True)]
        part = self.tensor[tuple(slice(int(at), stop) for at, stop in zip(start, stops, strict=True))]
        part.copy_(box[tuple(slice(size) for size in part.shape)])


@dataclass
class _Barrier:
    count: int
    num_awaited: int
    num_bytes: int = 0
    num_completed: int = 0

    def settle(self) -> None:
        assert self.num_awaited >= 0, "more arrivals than the barrier's count"
        if self.num_awaited == 0 and self.num_bytes == 0:
            self.num_completed += 1
            self.num_awaited = self.count


@dataclass
class _Partition:
    thread: threading.Thread | None = None
    may_go: Callable[[], bool] = lambda: True
    awaits: str = "its start"
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    is_finished: bool = False


class _GivenUpError(Exception):
    """Ends a program that would wait for good."""


class Partitions:
    """``mbarrier`` and ``tma`` of Gluon, and ``gl.warp_specialize``."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, program: int) -> None:
        self.lot = random.Random(program)
        self.barriers: dict[int, _Barrier] = {}
        self.copies: list[tuple[_Barrier, torch.Tensor, torch.Tensor]] = []
        self.stores: dict[int, list[Callable[[], None]]] = {}  # of a thread
        self.current: _Partition | None = None
        self.back = threading.Semaphore(0)
        self.error: Exception | None = None

    def MBarrierLayout(self) -> None:  # noqa: N802 - Gluon's name
        return None

    def init(self, barrier: Shared, count: int) -> None:
        self.barriers[barrier.values.data_ptr()] = _Barrier(count, count)

    def expect(self, barrier: Shared, num_bytes: int, pred: bool = True) -> None:
        if pred:
            self._at(barrier).num_bytes += num_bytes
            self._arrive(barrier, 1)

    def arrive(self, barrier: Shared, *, count: int = 1, pred: bool = True) -> None:
        if pred:
            self._arrive(barrier, count)
            if self.current is not None:  # others may go on before this one does
                self._yield(lambda: True, "its turn")

    def _arrive(self, barrier: Shared, count: int) -> None:
        self._at(barrier).num_awaited -= count
        self._at(barrier).settle()

    def wait(self, barrier: Shared, phase: int, pred: bool = True) -> None:
        state, parity = self._at(barrier), int(phase)
        if not pred:
            return
        if self.current is not None:
            number = list(self.barriers).index(barrier.values.data_ptr())
            awaits = f"parity {parity} of barrier {number}, completed {state.num_completed} times"
            self._yield(lambda: state.num_completed % 2 != parity, awaits)
        while state.num_completed % 2 == parity:
            assert self.copies, "waits for what nobody completes"
            self._deliver()

    def async_copy_global_to_shared(
        self, source: Descriptor, start: Sequence[int], barrier: Shared, target: Shared, pred: bool = True
    ) -> None:
        if not pred:
            return
        box = source.read(start)
        assert box.shape == target.values.shape and box.dtype == target.values.dtype
        spoil(target.values)
        self.copies.append((self._at(barrier), target.values, box))

    def async_copy_shared_to_global(self, target: Descriptor, start: Sequence[int], source: Shared) -> None:
        self.stores.setdefault(threading.get_ident(), []).append(lambda: target.write(start, source.values))

    def store_wait(self, pendings: int) -> None:
        assert pendings == 0
        for store in self.stores.pop(threading.get_ident(), []):
            store()

    def warp_specialize(
        self,
        programs: Sequence[tuple[Callable[..., object], Sequence[object]]],
        num_warps: Sequence[int],
        num_registers: Sequence[int],
    ) -> None:
        assert len(programs) - 1 == len(num_warps) == len(num_registers)
        partitions = [_Partition() for _ in programs]
        for partition, (function, arguments) in zip(partitions, programs, strict=True):
            partition.thread = threading.Thread(target=self._run, args=(partition, function, arguments), daemon=True)
            partition.thread.start()
        while self.error is None and not all(partition.is_finished for partition in partitions):
            waiting = [partition for partition in partitions if not partition.is_finished]
            ready = [partition for partition in waiting if partition.may_go()]
            if ready:
                self._resume(self.lot.choice(ready))
            elif self.copies:
                self._deliver()
            else:
                self.error = RuntimeError("deadlock: " + "; ".join(partition.awaits for partition in waiting))
        for partition in partitions:  # after an error: those that wait give up
            while not partition.is_finished:
                self._resume(partition)
        self.current = None
        if self.error is not None:
            raise self.error
        assert not self.copies, "a copy that nobody waited for"

    def _run(self, partition: _Partition, function: Callable[..., object], arguments: Sequence[object]) -> None:
        partition.turn.acquire()
        try:
            function(*arguments)
        except _GivenUpError:
            pass
        except Exception as error:  # noqa: BLE001 - raised again by the thread that started this one
            self.error = self.error or error
        partition.is_finished = True
        self.back.release()

    def _resume(self, partition: _Partition) -> None:
        self.current = partition
        partition.turn.release()
        self.back.acquire()

    def _yield(self, may_go: Callable[[], bool], awaits: str) -> None:
        partition = self.current
        assert partition is not None
        partition.may_go, partition.awaits = may_go, awaits
        self.back.release()
        partition.turn.acquire()
        if self.error is not None:
            raise _GivenUpError

    def _deliver(self) -> None:
        barrier, target, box = self.copies.pop(self.lot.randrange(len(self.copies)))
        target.copy_(box)
        barrier.num_bytes -= box.numel() * box.element_size()
        barrier.settle()

    def _at(self, barrier: Shared) -> _Barrier:
        return self.barriers[barrier.values.data_ptr()]


def spoil(values: torch.Tensor) -> None:
    """What memory holds before anything is in it."""
    values.fill_(float("nan") if values.dtype.is_floating_point else torch.iinfo(values.dtype).min)
