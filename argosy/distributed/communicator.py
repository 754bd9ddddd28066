"""Collectives over one axis of the mesh: the only file that moves tensors between ranks.

An axis of size 1 has no process group, and every method returns its input. It decides nothing about who computes what
(``tp_comm.py``, ``ep_dispatch.py``) and makes no group (``mesh.py``). Every operation is recorded, watched and counted.
Invariant: all ranks of ``ranks`` call the same operations in the same order, with shapes that fit.

A collective in a device graph runs at every replay, started by the device: ``taping`` is for the time of recording it,
``replay`` for launching the graph.

``bytes_sent`` counts what this rank sends to other ranks, by formula: n ranks, a tensor of B bytes that goes in.
    all_reduce 2 B (n - 1) / n     all_gather B (n - 1)     reduce_scatter, all_to_all B (n - 1) / n
    broadcast B (n - 1) at the source     all_to_all_v: the rows for other ranks
    puts B (n - 1) for what at most goes to each
``waited_s`` adds up how long the host started and awaited collectives, which includes waiting for slower ranks. What a
card's own streams wait for is not in it, nor what a recording replays there: the host does not see these.
"""

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from argosy.distributed.flight_recorder import CollectiveRecord, CollectiveTape, Completion, FlightRecorder
from argosy.distributed.pending import Pending, Ready
from argosy.distributed.put_flight import PutFlight

# gloo and HCCL refuse 8-bit floats; their bytes travel all the same.
BYTE_SIZED_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
T = TypeVar("T")


class Communicator:
    """One axis. Build with ``ParallelMesh.build`` or ``Communicator.local``.

    ``ranks`` are global ranks, ``rank`` is this process's position in them. ``host_group`` carries integers on the
    host; on a CPU it is the group itself.
    """

    def __init__(
        self,
        axis: str,
        ranks: tuple[int, ...],
        rank: int,
        *,
        group: dist.ProcessGroup | None,
        host_group: dist.ProcessGroup | None,
        recorder: FlightRecorder,
        is_host: bool = True,
    ) -> None:
        self.axis = axis
        self.ranks = ranks
        self.rank = rank
        self.size = len(ranks)
        self.label = ""
        self.bytes_sent: dict[str, int] = {}
        self.waited_s: dict[str, float] = {}  # by operation
        self._group = group
        self._host_group = host_group
        self._recorder = recorder
        self._shared: list[object] = []  # what keeps other ranks' memory mapped here
        self._is_host = is_host  # the group ends its operations in wait(); a card's end later

    @classmethod
    def local(cls, axis: str) -> "Communicator":
        """The null twin: one rank."""
        return cls(axis, (0,), 0, group=None, host_group=None, recorder=FlightRecorder(capacity=1))

    def named(self, label: str) -> "Communicator":
        """The same axis, group and counters; ``label`` ("layer 3 attention") tells reports where a collective is."""
        twin = copy.copy(self)
        twin.label = label
        return twin

    def reset_counters(self) -> None:
        """Of this axis, under all its names."""
        self.bytes_sent.clear()
        self.waited_s.clear()

    # --- equal shapes on all ranks ---------------------------------------------------------------------------------

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks. Works in place on a contiguous ``x``. Collective."""
        if self._group is None:
            return x
        x = x.contiguous()
        num_bytes = 2 * _num_bytes(x) * (self.size - 1) // self.size
        launch = partial(dist.all_reduce, x, group=self._group, async_op=True)
        return self._start("all_reduce", x, num_bytes, x, launch).wait()

    def broadcast(self, x: torch.Tensor, src: int) -> torch.Tensor:
        """``x`` of the rank at position ``src``, written into a contiguous ``x`` everywhere. Collective."""
        if self._group is None:
            return x
        x = x.contiguous()
        num_bytes = _num_bytes(x) * (self.size - 1) if self.rank == src else 0
        launch = partial(dist.broadcast, x, group=self._group, group_src=src, async_op=True)
        return self._start("broadcast", x, num_bytes, x, launch).wait()

    def barrier(self) -> None:
        """NOTE(sync): returns when every rank of the axis has come here, on the host. Collective."""
        self.all_gather_ints((0,), op="barrier")

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """``x: [n, ...]`` -> [size * n, ...], in rank order. Collective."""
        return self.start_all_gather(x).wait()

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """``x: [size * n, ...]`` -> [n, ...]: this rank's part of the sum. Collective."""
        return self.start_reduce_scatter(x).wait()

    def start_all_gather(self, x: torch.Tensor) -> Pending[torch.Tensor]:
        """``all_gather``; ``x`` must not change before ``wait``."""
        if self._group is None:
            return Ready(x)
        x = x.contiguous()
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        wire_out, wire_x = _as_wire(out), _as_wire(x)
        if self._is_host:
            # gloo gathers in a ring, n - 1 hops one after another; its all-to-all sends the same bytes in one.
            copies = torch.cat([wire_x] * self.size)
            launch = partial(dist.all_to_all_single, wire_out, copies, group=self._group, async_op=True)
        else:
            launch = partial(dist.all_gather_into_tensor, wire_out, wire_x, group=self._group, async_op=True)
        return self._start("all_gather", x, _num_bytes(x) * (self.size - 1), out, launch)

    def start_reduce_scatter(self, x: torch.Tensor) -> Pending[torch.Tensor]:
        """``reduce_scatter``; ``x`` must not change before ``wait``."""
        if self._group is None:
            return Ready(x)
        self._check_divides(x)
        x = x.contiguous()
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        launch = partial(dist.reduce_scatter_tensor, out, x, group=self._group, async_op=True)
        return self._start("reduce_scatter", x, _num_bytes(x) * (self.size - 1) // self.size, out, launch)

    def start_all_to_all(self, x: torch.Tensor, out: torch.Tensor | None = None) -> Pending[torch.Tensor]:
        """``x: [size, n, ...]``, row r for rank r -> [size, n, ...], row r from rank r. Collective.

        ``out``: where to put them, contiguous; None: a new tensor.
        """
        if self._group is None:
            return Ready(x if out is None else out.copy_(x))
        self._check_divides(x)
        x = x.contiguous()
        out = torch.empty_like(x) if out is None else out
        wire_out, wire_x = _as_wire(out), _as_wire(x)
        launch = partial(dist.all_to_all_single, wire_out, wire_x, group=self._group, async_op=True)
        return self._start("all_to_all", x, _num_bytes(x) * (self.size - 1) // self.size, out, launch)

    # --- uneven along dim 0; zero rows are fine --------------------------------------------------------------------

    def all_gather_v(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """``x: [counts[rank], ...]`` -> [sum(counts), ...]. Pads to the largest count on the wire. Collective."""
        if self._group is None:
            return x
        assert x.shape[0] == counts[self.rank], f"{x.shape[0]} rows, counts {list(counts)}, rank {self.rank}"
        most = max(counts)
        if most == 0:
            return x
        if x.shape[0] < most:
            padded = x.new_empty(most, *x.shape[1:])
            padded[: x.shape[0]] = x
            x = padded
        gathered = self.all_gather(x)
        if _is_front_packed(counts):
            return gathered[: sum(counts)]
        return torch.cat([gathered[i * most : i * most + count] for i, count in enumerate(counts)])

    def reduce_scatter_v(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """``x: [sum(counts), ...]`` -> [counts[rank], ...]. Pads to the largest count on the wire. Collective."""
        if self._group is None:
            return x
        assert x.shape[0] == sum(counts), f"{x.shape[0]} rows, counts {list(counts)}"
        most = max(counts)
        if most == 0:
            return x
        if x.shape[0] < self.size * most:
            # Padding rows are summed with padding rows and cut off: their content does not matter.
            padded = x.new_empty(self.size * most, *x.shape[1:])
            if _is_front_packed(counts):
                padded[: x.shape[0]] = x
            else:
                starts = itertools.accumulate(counts, initial=0)
                for i, (count, start) in enumerate(zip(counts, starts, strict=False)):
                    padded[i * most : i * most + count] = x[start : start + count]
            x = padded
        return self.reduce_scatter(x)[: counts[self.rank]]

    def start_all_to_all_v(
        self, x: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> Pending[torch.Tensor]:
        """``x: [sum(send_counts), ...]``, rows by destination rank -> [sum(recv_counts), ...], by source rank.

        Rank r's ``send_counts[s]`` must be rank s's ``recv_counts[r]``. ``x`` must not change before ``wait``.
        Collective, also for a rank without rows.
        """
        if self._group is None:
            return Ready(x)
        assert x.shape[0] == sum(send_counts), f"{x.shape[0]} rows, send_counts {list(send_counts)}"
        x = x.contiguous()
        out = x.new_empty(sum(recv_counts), *x.shape[1:])
        wire_out, wire_x = _as_wire(out), _as_wire(x)
        num_bytes = (x.shape[0] - send_counts[self.rank]) * _row_bytes(x)
        sends, recvs = list(send_counts), list(recv_counts)
        launch = partial(dist.all_to_all_single, wire_out, wire_x, recvs, sends, group=self._group, async_op=True)
        return self._start("all_to_all_v", x, num_bytes, out, launch)

    # --- one-sided, between cards of one node ----------------------------------------------------------------------

    def share_memory(self, num_words: int, device: torch.device) -> tuple[torch.Tensor, list[int]]:
        """A buffer of zeros, [num_words] int32, and where every rank's is, as this rank's card sees it. Collective.

        Raises:
            RuntimeError: the cards of the axis cannot reach each other's memory.
        """
        assert self._group is not None, f"axis {self.axis} is one rank"
        try:
            buffer = symmetric_memory.empty(num_words, dtype=torch.int32, device=device)
            buffer.zero_()
            handle = symmetric_memory.rendezvous(buffer, self._group.group_name)
            bases = list(handle.buffer_ptrs)
            self._shared.append(handle)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.ranks[self.rank]} of axis {self.axis} on {device} cannot share {num_words * 4} bytes of"
                f" memory with ranks {', '.join(map(str, self.ranks))}, which needs cards of one node with peer access:"
                f" {error}; set --ll-transport collective"
            ) from error
        offset = buffer.data_ptr() - bases[self.rank]  # torch may cut a buffer out of a larger one, everywhere alike
        torch.accelerator.synchronize(device)
        offsets = [each for (each,) in self.all_gather_ints((offset,))]  # so nobody's flags are set before all are zero
        assert offsets == [offset] * self.size, offsets
        return buffer, [base + offset for base in bases]

    def start_puts(self, op: str, rows: torch.Tensor, put: Callable[[], None], finish: Callable[[], T]) -> Pending[T]:
        """``put`` launches what writes ``rows`` into every other rank's memory, ``finish`` what waits for theirs.

        Collective. ``put`` raises RuntimeError for an earlier exchange that failed.
        """
        num_bytes = _num_bytes(rows) * (self.size - 1)
        record = self._record(op, rows, num_bytes)
        try:
            put()
        except RuntimeError as error:
            self._recorder.fail(record, error)
        return PutFlight(record, finish, None if self._recorder.tape is not None else rows.device)

    # --- host integers ---------------------------------------------------------------------------------------------

    def all_gather_ints(self, values: Sequence[int], *, op: str = "all_gather_ints") -> list[list[int]]:
        """Every rank's ``values`` (equally many), in rank order. NOTE(sync): travels between hosts. Collective."""
        if self._host_group is None:
            return [list(values)]
        x = torch.tensor([list(values)], dtype=torch.int64)
        out = torch.empty(self.size, len(values), dtype=torch.int64)
        launch = partial(dist.all_gather_into_tensor, out, x, group=self._host_group, async_op=True)
        gathered: list[list[int]] = (
            self._start(op, x, _num_bytes(x) * (self.size - 1), out, launch, is_host=True).wait().tolist()
        )
        return gathered

    # --- device graphs -----------------------------------------------------------------------------------------------

    def taping(self) -> AbstractContextManager[CollectiveTape]:
        """While a graph is recorded: collectives of every axis of this rank go on the tape."""
        return self._recorder.taping()

    def replay(self, tape: CollectiveTape, launch: Callable[[], T], mark: Callable[[], Completion]) -> T:
        """``launch`` a graph that was recorded with ``tape``: one record on this axis, open until what ``mark`` returns
        is completed, and the bytes of all its collectives. Collective, in the sense of the graph's own collectives."""
        if self.size == 1:
            return launch()
        record = self._recorder.start(self.axis, self.ranks, "replay", self.label, (), "", tape.num_bytes)
        tape.count_replay()
        with self._recorder.taping():  # where nothing can be recorded, the launch starts them once more
            out = launch()
        if self._is_host:
            record.finish()
        else:
            record.work = mark()
        return out

    # --- the one path all operations take --------------------------------------------------------------------------

    def _start(
        self,
        op: str,
        x: torch.Tensor,
        num_bytes: int,
        out: torch.Tensor,
        launch: Callable[[], dist.Work],
        is_host: bool = False,
    ) -> "_Flight":
        record = self._record(op, x, num_bytes)
        try:
            work = launch()
        except RuntimeError as error:
            self._recorder.fail(record, error)
        record.work = work
        waited_s = self.waited_s if is_host or self._is_host else None
        if waited_s is not None:
            waited_s[op] = waited_s.get(op, 0.0) + time.monotonic() - record.started_s
        return _Flight(work, record, out, self._recorder, waited_s)

    def _record(self, op: str, x: torch.Tensor, num_bytes: int) -> CollectiveRecord:
        tape = self._recorder.tape
        if tape is None:
            self.bytes_sent[op] = self.bytes_sent.get(op, 0) + num_bytes
        else:
            tape.add(self.bytes_sent, op, num_bytes)
        dtype = str(x.dtype).removeprefix("torch.")
        return self._recorder.start(self.axis, self.ranks, op, self.label, x.shape, dtype, num_bytes)

    def _check_divides(self, x: torch.Tensor) -> None:
        assert x.shape[0] % self.size == 0, f"{x.shape[0]} rows for {self.size} ranks of axis {self.axis}"


class _Flight:
    """A collective of this module in flight. ``wait`` may be called once or more."""

    __slots__ = ("_out", "_record", "_recorder", "_waited_s", "_work")

    def __init__(
        self,
        work: dist.Work,
        record: CollectiveRecord,
        out: torch.Tensor,
        recorder: FlightRecorder,
        waited_s: dict[str, float] | None,
    ) -> None:
        """``waited_s``: where to count the wait, by operation; None = on a card, where ``wait`` does not wait."""
        self._work = work
        self._record = record
        self._out = out
        self._recorder = recorder
        self._waited_s = waited_s

    def wait(self) -> torch.Tensor:
        started_s = time.monotonic()
        try:
            self._work.wait()
        except RuntimeError as error:
            self._recorder.fail(self._record, error)
        if self._waited_s is not None and self._record.finished_s is None:
            self._record.finish()
            so_far = self._waited_s.get(self._record.op, 0.0)
            self._waited_s[self._record.op] = so_far + time.monotonic() - started_s
        return self._out


def _as_wire(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.dtype in BYTE_SIZED_FLOATS else x


def _num_bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _row_bytes(x: torch.Tensor) -> int:
    return x.shape[1:].numel() * x.element_size()


def _is_front_packed(counts: Sequence[int]) -> bool:
    """Full parts, then at most one partial, then empty ones: padding then sits at the very end."""
    most = max(counts)
    num_full = next((i for i, count in enumerate(counts) if count < most), len(counts))
    return not any(counts[num_full + 1 :])
