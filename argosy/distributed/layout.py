"""Parallelism as arithmetic: from sizes to ranks, groups and owners of experts.

Rank order: dp outermost, then cp, tp innermost, so the ranks of a tp group are neighbours and a node of eight cards
holds one whole replica of tp 8. Expert parallelism lays its own groups over the same ranks: blocks of ``ep_size``
neighbours, one block of all ranks by default. No process group is made here (``mesh.py``), no torch is imported.
Invariant: the groups of every axis but ``leaders`` partition the ranks, and every rank computes the same ones.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

# "replica" is the cp x tp ranks that share one dp rank, "leaders" the first rank of every replica.
Axis = Literal["tp", "cp", "dp", "ep", "replica", "leaders"]


@dataclass(frozen=True, slots=True)
class Coords:
    """Where a rank stands: its rank within its group of each axis."""

    dp: int
    cp: int
    tp: int
    ep: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """The sizes of a model that parallelism divides, and ``moe_intermediate_size``, which it must not: experts stay
    whole."""

    num_attention_heads: int
    intermediate_size: int
    moe_intermediate_size: int
    vocab_size: int
    n_routed_experts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """Which rank does what.

    Raises:
        ValueError: a size below 1, or an ``ep_size`` that does not divide the ranks.
    """

    dp_size: int = 1
    cp_size: int = 1
    tp_size: int = 1
    ep_size: int | None = None  # None = all ranks; read ``num_ep_ranks``

    def __post_init__(self) -> None:
        for name in ("dp_size", "cp_size", "tp_size"):
            _check_size(name, getattr(self, name))
        if self.ep_size is None:
            return
        _check_size("ep_size", self.ep_size)
        if self.world_size % self.ep_size:
            raise ValueError(
                f"world_size ({self._product}) must be divisible by ep_size ({self.ep_size}); "
                f"set --ep-size to {_list_divisors(self.world_size)}"
            )

    @property
    def world_size(self) -> int:
        return self.dp_size * self.cp_size * self.tp_size

    @property
    def num_ep_ranks(self) -> int:
        """``ep_size`` with the default filled in: ranks in one expert-parallel group."""
        return self.world_size if self.ep_size is None else self.ep_size

    @property
    def replica_size(self) -> int:
        """Ranks of one replica."""
        return self.cp_size * self.tp_size

    def coords(self, rank: int) -> Coords:
        self._check_rank(rank)
        return Coords(
            dp=rank // self.replica_size,
            cp=rank // self.tp_size % self.cp_size,
            tp=rank % self.tp_size,
            ep=rank % self.num_ep_ranks,
        )

    def groups(self, axis: Axis) -> tuple[tuple[int, ...], ...]:
        """All groups of an axis, each in the order of its ranks' positions; ``leaders`` has one."""
        ranks = range(self.world_size)
        match axis:
            case "tp":
                return _blocks(ranks, self.tp_size)
            case "replica":
                return _blocks(ranks, self.replica_size)
            case "ep":
                return _blocks(ranks, self.num_ep_ranks)
            case "leaders":
                return (tuple(ranks[:: self.replica_size]),)
            case "dp":
                return tuple(tuple(ranks[first :: self.replica_size]) for first in range(self.replica_size))
            case "cp":
                replicas = _blocks(ranks, self.replica_size)
                return tuple(members[first :: self.tp_size] for members in replicas for first in range(self.tp_size))
        raise ValueError(f"axis must be tp, cp, dp, ep, replica or leaders, got {axis!r}")

    def group_of(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """The group of ``axis`` that ``rank`` belongs to.

        Raises:
            ValueError: no such rank, or ``leaders`` asked of a rank that leads nothing.
        """
        self._check_rank(rank)
        for group in self.groups(axis):
            if rank in group:
                return group
        raise ValueError(f"rank {rank} is in no group of {axis}: the leaders are {self.groups('leaders')[0]}")

    def leader_of(self, dp_rank: int) -> int:
        """The first rank of a replica: the one that also schedules."""
        if not 0 <= dp_rank < self.dp_size:
            raise ValueError(f"dp_rank ({dp_rank}) must be in [0, dp_size = {self.dp_size}); raise --dp-size")
        return dp_rank * self.replica_size

    def is_leader(self, rank: int) -> bool:
        self._check_rank(rank)
        return rank % self.replica_size == 0

    def ranks_of_node(self, node_rank: int, nnodes: int) -> range:
        """The ranks that live on one node; nodes hold equal blocks of neighbours, so ``local_rank`` is the index."""
        if nnodes < 1 or self.world_size % nnodes:
            raise ValueError(
                f"world_size ({self._product}) must be divisible by nnodes ({nnodes}); "
                f"set --nnodes to {_list_divisors(self.world_size)}"
            )
        if not 0 <= node_rank < nnodes:
            raise ValueError(f"node_rank ({node_rank}) must be in [0, nnodes = {nnodes}); set --node-rank")
        ranks_per_node = self.world_size // nnodes
        return range(node_rank * ranks_per_node, (node_rank + 1) * ranks_per_node)

    def local_expert_ids(self, ep_rank: int, num_experts: int) -> range:
        """The experts that an ep rank holds.

        Raises:
            ValueError: no such ep rank, or experts that cannot be shared out evenly.
        """
        if not 0 <= ep_rank < self.num_ep_ranks:
            raise ValueError(f"ep_rank ({ep_rank}) must be in [0, ep_size = {self.num_ep_ranks})")
        num_local = self._num_local_experts(num_experts)
        return range(ep_rank * num_local, (ep_rank + 1) * num_local)

    def owner_of_expert(self, expert_id: int, num_experts: int) -> int:
        """The ep rank that holds an expert."""
        if not 0 <= expert_id < num_experts:
            raise ValueError(f"expert_id ({expert_id}) must be in [0, num_experts = {num_experts})")
        return expert_id // self._num_local_experts(num_experts)

    def check_model(self, sizes: ModelSizes) -> None:
        """
        Raises:
            ValueError: a size of the model that this layout cannot divide, with the sizes of the axis that fit.
        """
        for spec in fields(sizes):
            if getattr(sizes, spec.name) < 1:
                raise ValueError(f"{spec.name} must be >= 1, got {getattr(sizes, spec.name)}; fix config.json")
        split_by_tp = ("num_attention_heads", "intermediate_size", "vocab_size")
        fitting = math.gcd(*(getattr(sizes, name) for name in split_by_tp))
        for name in split_by_tp:
            if getattr(sizes, name) % self.tp_size:
                raise ValueError(
                    f"{name} ({getattr(sizes, name)}) must be divisible by tp_size ({self.tp_size}); "
                    f"set --tp-size to {_list_divisors(fitting)}"
                )
        self._num_local_experts(sizes.n_routed_experts)

    def check_world_size(self, num_processes: int) -> None:
        """
        Raises:
            ValueError: another number of processes was started than the sizes ask for.
        """
        if num_processes != self.world_size:
            raise ValueError(
                f"{num_processes} processes were started (WORLD_SIZE) but world_size is {self._product}; "
                f"start {self.world_size} processes, or set --dp-size and --tp-size to a product of {num_processes}"
            )

    @property
    def _product(self) -> str:
        """The world size with the flags it comes from, for messages."""
        cp = f" x cp_size {self.cp_size}" if self.cp_size > 1 else ""
        return f"{self.world_size} = dp_size {self.dp_size}{cp} x tp_size {self.tp_size}"

    def _num_local_experts(self, num_experts: int) -> int:
        if num_experts < 1 or num_experts % self.num_ep_ranks:
            origin = f", which is the world_size {self._product}" if self.ep_size is None else ""
            raise ValueError(
                f"num_experts ({num_experts}) must be divisible by ep_size ({self.num_ep_ranks}{origin}); "
                f"set --ep-size to {_list_divisors(math.gcd(num_experts, self.world_size))}"
            )
        return num_experts // self.num_ep_ranks

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank ({rank}) must be in [0, world_size = {self._product})")


def _check_size(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}; set --{name.replace('_', '-')}")


def _blocks(ranks: range, size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(ranks[first : first + size]) for first in range(0, len(ranks), size))


def _list_divisors(number: int) -> str:
    """The sizes that would have fitted, as text: all of them, for they are few."""
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)
