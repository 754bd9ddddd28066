"""Sixteen processes that stay: each test borrows the first few as ranks, with process groups made once and kept.

A test hands over a top-level function of its module; every rank runs it with a ``PoolContext`` and its result comes
back. After a failure the processes may be stuck in a collective, so the pool starts new ones for the next test.
Invariant: ``run`` returns the results of all ranks, or raises with the traceback of the first rank that failed.
"""

import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from argosy.distributed.communicator import Communicator
from argosy.distributed.flight_recorder import FlightRecorder
from argosy.distributed.layout import ParallelLayout
from argosy.distributed.mesh import Groups, ParallelMesh, build_communicator, build_mesh
from argosy.distributed.rendezvous import RankStore, StoreAddress, connect_store, host_store

START_TIMEOUT_S = 60.0
GROUP_TIMEOUT_S = 40.0  # until gloo gives up on a rank
AFTER_FAILURE_S = 1.0  # for the other ranks' own errors to arrive
MULTIPROCESSING = multiprocessing.get_context("forkserver")


class PoolGroups:
    """Groups of the ranks that ask, without a default group: the pool's other ranks take no part."""

    def __init__(self, store: RankStore) -> None:
        self._store = store
        self._made: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def get(self, backend: str, groups: Groups, rank: int) -> dist.ProcessGroup | None:
        assert backend == "gloo"
        ranks = next((ranks for ranks in groups if rank in ranks), None)
        if ranks is not None and ranks not in self._made:
            self._made[ranks] = self._make(ranks, ranks.index(rank))
        return self._made[ranks] if ranks is not None else None

    def _make(self, ranks: tuple[int, ...], position: int) -> dist.ProcessGroup:
        store = dist.PrefixStore("-".join(map(str, ranks)), self._store.group_store())
        group = dist.ProcessGroup(store, position, len(ranks))
        backend = dist.ProcessGroupGloo(store, position, len(ranks), timedelta(seconds=GROUP_TIMEOUT_S))
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        return group


class PoolContext:
    """What a rank's function gets. Meshes and communicators are kept: ask freely."""

    def __init__(self, rank: int, groups: PoolGroups) -> None:
        self.rank = rank
        self.world = 0  # ranks that run this function
        self._groups = groups
        self._recorder = FlightRecorder()
        self._meshes: dict[ParallelLayout, ParallelMesh] = {}
        self._communicators: dict[tuple[str, int], Communicator] = {}

    def mesh(self, layout: ParallelLayout) -> ParallelMesh:
        """For the first ``layout.world_size`` ranks. Collective over them when it is new."""
        if layout not in self._meshes:
            self._meshes[layout] = build_mesh(layout, self.rank, self._groups, "gloo", self._recorder)
        return self._meshes[layout]

    def communicator(self, world: int | None = None, axis: str = "ep") -> Communicator:
        """Over the first ``world`` ranks; None: those that run. Counters start at zero. Collective when it is new."""
        key = (axis, world or self.world)
        if key not in self._communicators:
            ranks = tuple(range(key[1]))
            self._communicators[key] = build_communicator(
                axis, (ranks,), rank=self.rank, source=self._groups, comm_backend="gloo", recorder=self._recorder
            )
        self._communicators[key].reset_counters()
        return self._communicators[key]


class RankPool:
    """Starts its processes at the first ``run``."""

    def __init__(self, world_size: int = 16) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._store: RankStore | None = None

    def run(
        self, function: Callable[..., Any], *args: Any, world: int | None = None, timeout_s: float = 60.0
    ) -> list[Any]:
        """``function(context, *args)`` on ranks 0 .. world - 1; their results in rank order.

        ``function`` is top-level in an importable module; arguments and results are pickled (tensors as they are).
        """
        world = world or self.world_size
        assert world <= self.world_size, f"world ({world}) of a pool of {self.world_size} ranks"
        if not self._processes:
            self._start()
        for pipe in self._pipes[:world]:
            pipe.send((function, args, world))
        results, failures = self._collect(world, timeout_s)
        if failures:
            self.close()
            raise RuntimeError("\n".join(failures[rank] for rank in sorted(failures)))
        return [results[rank] for rank in range(world)]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._store = [], [], None

    def _start(self) -> None:
        MULTIPROCESSING.set_forkserver_preload(["torch", "argosy.distributed.mesh", "argosy.kernels.loops"])
        self._store = host_store()
        for rank in range(self.world_size):
            ours, theirs = MULTIPROCESSING.Pipe()
            arguments = (rank, self.world_size, self._store.address, theirs)
            process = MULTIPROCESSING.Process(target=_serve_rank, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        _, failures = self._collect(self.world_size, START_TIMEOUT_S)
        if failures:
            self.close()
            raise RuntimeError("\n".join(failures.values()))

    def _collect(self, world: int, timeout_s: float) -> tuple[dict[int, Any], dict[int, str]]:
        """Results, and tracebacks; after the first failure the others have ``AFTER_FAILURE_S`` left."""
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        missing = {pipe: rank for rank, pipe in enumerate(self._pipes[:world])}
        deadline = time.monotonic() + timeout_s
        while missing:
            ready = wait(list(missing), timeout=max(0.0, deadline - time.monotonic()))
            if not ready and not failures:
                failures[-1] = f"ranks {sorted(missing.values())} did not answer within {timeout_s} s"
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = missing.pop(pipe)
                try:
                    is_ok, value = pipe.recv()
                except EOFError:
                    is_ok, value = False, "the process died"
                if is_ok:
                    results[rank] = value
                else:
                    failures[rank] = f"rank {rank}: {value}"
                    deadline = min(deadline, time.monotonic() + AFTER_FAILURE_S)
        return results, failures


def _serve_rank(rank: int, world_size: int, address: StoreAddress, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    warnings.filterwarnings("ignore", message="`torch.distributed.*_tensor` is deprecated", category=FutureWarning)
    store = connect_store(address, START_TIMEOUT_S)
    os.environ["GLOO_SOCKET_IFNAME"] = store.interface
    context = PoolContext(rank, PoolGroups(store))
    pipe.send((True, None))
    while True:
        try:
            function, args, context.world = pipe.recv()
        except EOFError:  # the pool is closed
            return
        try:
            answer = (True, function(context, *args))
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
