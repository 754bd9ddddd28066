"""``ParallelMesh``: the process groups of one rank, built once, as Communicators.

Which ranks form a group is arithmetic (``layout.py``); what travels is ``communicator.py``. An axis of one rank gets
the null twin and no group; axes with the same ranks share one group. Invariant: every rank builds its groups in the
same order, so that building, too, is a collective that cannot cross.
"""

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Protocol

import torch.distributed as dist

from argosy.distributed.communicator import Communicator
from argosy.distributed.flight_recorder import FlightRecorder
from argosy.distributed.layout import Axis, Coords, ParallelLayout
from argosy.distributed.rendezvous import RankStore
from argosy.platforms.base import Platform

# gloo's own limit is the last resort: the watchdog must speak first, for it can say who is missing.
GROUP_TIMEOUT_FACTOR = 4

Groups = tuple[tuple[int, ...], ...]  # of global ranks, as ``ParallelLayout.groups`` lists them


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelMesh:
    """One rank's place and its Communicators."""

    layout: ParallelLayout
    rank: int
    coords: Coords
    world: Communicator
    tp: Communicator
    ep: Communicator
    leaders: Communicator  # host only, size 1 on ranks that lead nothing
    recorder: FlightRecorder

    @classmethod
    def local(cls) -> "ParallelMesh":
        """The null twin: one rank, no groups."""
        layout = ParallelLayout()
        return cls(
            layout=layout,
            rank=0,
            coords=layout.coords(0),
            world=Communicator.local("world"),
            tp=Communicator.local("tp"),
            ep=Communicator.local("ep"),
            leaders=Communicator.local("leaders"),
            recorder=FlightRecorder(capacity=1),
        )

    @classmethod
    def unconnected(cls, layout: ParallelLayout, rank: int) -> "ParallelMesh":
        """It knows sizes and places, and can send nothing: for building a rank's share without the other ranks."""
        recorder = FlightRecorder(capacity=1)

        def communicator(axis: Axis) -> Communicator:
            ranks = layout.group_of(axis, rank)
            return Communicator(axis, ranks, ranks.index(rank), group=None, host_group=None, recorder=recorder)

        return cls(
            layout=layout,
            rank=rank,
            coords=layout.coords(rank),
            world=communicator("replica"),
            tp=communicator("tp"),
            ep=communicator("ep"),
            leaders=Communicator.local("leaders"),
            recorder=recorder,
        )

    @classmethod
    def build(
        cls,
        layout: ParallelLayout,
        rank: int,
        *,
        store: RankStore,
        platform: Platform,
        timeout_s: float,
        recorder: FlightRecorder | None = None,
    ) -> "ParallelMesh":
        """Join the world, then this rank's groups. Once a process; the device must be current. Collective over world.

        Raises:
            RuntimeError: the ranks did not meet within ``timeout_s`` times ``GROUP_TIMEOUT_FACTOR``.
        """
        if layout.world_size == 1:
            return cls.local()
        join_world(rank, layout.world_size, store=store, platform=platform, timeout_s=timeout_s)
        groups = WorldGroups(layout.world_size, platform.comm_backend, timeout_s)
        return build_mesh(layout, rank, groups, platform.comm_backend, recorder or FlightRecorder())


class GroupSource(Protocol):
    """Where a mesh gets its process groups from."""

    def get(self, backend: str, groups: Groups, rank: int) -> dist.ProcessGroup | None:
        """The one of ``groups`` that ``rank`` is in, None for none; the same each time. Collective when it is new."""
        ...


def join_world(rank: int, world_size: int, *, store: RankStore, platform: Platform, timeout_s: float) -> None:
    """torch's default group, which every other group is cut from. Collective over world."""
    # torch 2.13 renames two collectives that 2.11 knows under the old names only.
    warnings.filterwarnings("ignore", message="`torch.distributed.*_tensor` is deprecated", category=FutureWarning)
    # NVLink multicast needs fabric rights that containers often lack; NCCL then hangs or fails at its first reduction,
    # and torch where it shares memory.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", store.interface)
    dist.init_process_group(
        platform.comm_backend,
        store=store.group_store(),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s * GROUP_TIMEOUT_FACTOR),
    )


class WorldGroups:
    """Groups cut from torch's default group. ``get`` is collective over world: every rank makes every group."""

    def __init__(self, world_size: int, comm_backend: str, timeout_s: float) -> None:
        self._world_groups = (tuple(range(world_size)),)
        self._comm_backend = comm_backend
        self._timeout = timedelta(seconds=timeout_s * GROUP_TIMEOUT_FACTOR)
        self._made: dict[tuple[str, Groups], dist.ProcessGroup | None] = {}

    def get(self, backend: str, groups: Groups, rank: int) -> dist.ProcessGroup | None:
        key = (backend, groups)
        if key not in self._made:
            is_world = groups == self._world_groups and backend == self._comm_backend
            self._made[key] = dist.group.WORLD if is_world else self._make(backend, groups, rank)
        return self._made[key]

    def _make(self, backend: str, groups: Groups, rank: int) -> dist.ProcessGroup | None:
        mine = None
        for ranks in groups:
            group = dist.new_group(list(ranks), timeout=self._timeout, backend=backend)
            if rank in ranks:
                mine = group
        return mine


def build_mesh(
    layout: ParallelLayout, rank: int, groups: GroupSource, comm_backend: str, recorder: FlightRecorder
) -> ParallelMesh:
    """Collective over the layout's ranks."""
    connect = partial(build_communicator, rank=rank, source=groups, comm_backend=comm_backend, recorder=recorder)
    return ParallelMesh(
        layout=layout,
        rank=rank,
        coords=layout.coords(rank),
        world=connect("world", (tuple(range(layout.world_size)),)),
        tp=connect("tp", layout.groups("tp")),
        ep=connect("ep", layout.groups("ep")),
        leaders=connect("leaders", layout.groups("leaders"), comm_backend="gloo"),
        recorder=recorder,
    )


def build_communicator(
    axis: str, groups: Groups, *, rank: int, source: GroupSource, comm_backend: str, recorder: FlightRecorder
) -> Communicator:
    """Over the one of ``groups`` that ``rank`` is in; the null twin if that is one rank, or none. Collective."""
    if len(groups[0]) == 1:
        return Communicator.local(axis)
    group = source.get(comm_backend, groups, rank)
    host_group = source.get("gloo", groups, rank)
    ranks = next((ranks for ranks in groups if rank in ranks), (rank,))
    if len(ranks) == 1:
        return Communicator.local(axis)
    return Communicator(
        axis,
        ranks,
        ranks.index(rank),
        group=group,
        host_group=host_group,
        recorder=recorder,
        is_host=comm_backend == "gloo",
    )
