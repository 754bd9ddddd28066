"""The first traffic over a new mesh: results known beforehand, so that a wrong group, wire or device shows in seconds.

It measures nothing, and repairs nothing. The tiny MoE exchange comes from the caller, for this layer knows no model.
Invariant: every rank runs the same collectives, whatever it finds; the error comes after the last of them.
"""

from collections.abc import Callable

import torch

from argosy.distributed.communicator import Communicator
from argosy.distributed.mesh import ParallelMesh
from argosy.distributed.startup import name_ranks

ROW_BYTES = 4096  # of the parcel from each rank to each other
HASH_FACTOR = 2_654_435_761  # Knuth's; spreads small numbers over 32 bits


def _no_check() -> None:
    """Where there are no experts to exchange tokens with."""


def run_self_test(mesh: ParallelMesh, device: torch.device, moe_check: Callable[[], None] = _no_check) -> None:
    """Collective over world. NOTE(sync): reads results on the host. ``moe_check`` raises where it finds a difference.

    Raises:
        RuntimeError: what arrived is not what was sent; names the axis and the ranks it came from.
    """
    problems = []
    for communicator in (mesh.world, mesh.tp, mesh.ep):
        problems += check_all_reduce(communicator.named("self-test"), device)
        problems += check_all_to_all(communicator.named("self-test"), device)
    # The leaders' traffic stays on their hosts, whatever the device.
    problems += check_all_reduce(mesh.leaders.named("self-test"), torch.device("cpu"))
    if problems:
        raise RuntimeError(f"self-test on rank {mesh.rank}: {'; '.join(problems)}; check the network and the devices")
    moe_check()


def check_all_reduce(communicator: Communicator, device: torch.device) -> list[str]:
    """Each rank adds its row of an identity matrix, times its global rank + 1. Collective."""
    expected = torch.tensor(communicator.ranks, dtype=torch.float32) + 1
    mine = torch.zeros(communicator.size, dtype=torch.float32, device=device)
    mine[communicator.rank] = expected[communicator.rank].item()
    total = communicator.all_reduce(mine).cpu()
    wrong = [
        rank for rank, is_right in zip(communicator.ranks, (total == expected).tolist(), strict=True) if not is_right
    ]
    if not wrong:
        return []
    return [f"all_reduce on axis {communicator.axis}: got {total.tolist()}, wrong for {name_ranks(wrong)}"]


def check_all_to_all(communicator: Communicator, device: torch.device) -> list[str]:
    """Each rank sends each other one bytes that only this pair has, and checks a checksum of what came. Collective."""
    me = communicator.ranks[communicator.rank]
    sent = torch.stack([make_parcel(me, rank) for rank in communicator.ranks]).to(device)
    received = communicator.start_all_to_all(sent).wait().cpu()
    wrong = [
        rank
        for rank, parcel in zip(communicator.ranks, received, strict=True)
        if checksum(parcel) != checksum(make_parcel(rank, me))
    ]
    if not wrong:
        return []
    return [f"all_to_all on axis {communicator.axis}: the checksum is wrong for bytes from {name_ranks(wrong)}"]


def make_parcel(source: int, destination: int) -> torch.Tensor:
    """The bytes from one rank to another: [ROW_BYTES] uint8."""
    places = torch.arange(ROW_BYTES, dtype=torch.int64) + (source * 65_537 + destination) * ROW_BYTES
    return (places * HASH_FACTOR >> 16).bitwise_and(255).to(torch.uint8)


def checksum(parcel: torch.Tensor) -> int:
    """Depends on every byte and its place."""
    places = torch.arange(1, parcel.numel() + 1, dtype=torch.int64)
    return int((parcel.to(torch.int64) * places).sum())
