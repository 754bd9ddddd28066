"""Two machines on one: network namespaces with a link between them, plain or slow and lossy.

The plain link is a veth pair. The slow one is a pair of TUN devices and a process that carries packets from one to the
other, late, and drops some: kernels without netem can run it too. Needs root and ``ip``. Invariant: after ``close``
the namespaces, the devices and the carrier are gone.
"""

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
_DEVICE = "link0"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_MTU = 65_000  # a Python process carries every packet: fewer, larger ones


def can_make_nodes() -> bool:
    return os.geteuid() == 0 and shutil.which("ip") is not None and os.path.exists("/dev/net/tun")


class TwoNodes:
    """``delay_s`` one way; ``loss``: share of packets dropped. Both 0: a veth pair."""

    def __init__(self, *, delay_s: float = 0.0, loss: float = 0.0) -> None:
        self._names = tuple(f"argosy{os.getpid()}-{node}" for node in range(2))
        self._carrier: subprocess.Popen[bytes] | None = None
        try:
            self._build(delay_s, loss)
        except BaseException:
            self.close()
            raise

    def _build(self, delay_s: float, loss: float) -> None:
        for name in self._names:
            _ip("netns", "add", name)
        if delay_s or loss:
            self._start_carrier(delay_s, loss)
        else:
            peer = ["type", "veth", "peer", "name", _DEVICE, "netns", self._names[1]]
            _ip("link", "add", _DEVICE, "netns", self._names[0], *peer)
        for name, address in zip(self._names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", _DEVICE)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", _DEVICE, "up")

    def popen(self, node: int, command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[str]":
        """A process on one node, in a session of its own; stdout and stderr are pipes of text."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self._names[node], *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def close(self) -> None:
        if self._carrier is not None:
            self._carrier.kill()
            self._carrier.wait()
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def _start_carrier(self, delay_s: float, loss: float) -> None:
        command = [sys.executable, __file__, *self._names, str(delay_s), str(loss)]
        self._carrier = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._carrier.stdout is not None
        assert self._carrier.stdout.readline() == b"ready\n", "the carrier did not start"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def carry(names: Sequence[str], delay_s: float, loss: float) -> None:
    """Carries packets both ways until killed."""
    devices = [_open_tun(name) for name in names]
    print("ready", flush=True)
    rng = random.Random(0)
    late: list[tuple[float, int, int, bytes]] = []  # (due, number, to, packet): the number keeps equal times in order
    number = 0
    while True:
        timeout_s = max(0.0, late[0][0] - time.monotonic()) if late else None
        for device in select.select(devices, [], [], timeout_s)[0]:
            packet = os.read(device, 2**17)
            if rng.random() >= loss:
                other = devices[1 - devices.index(device)]
                heapq.heappush(late, (time.monotonic() + delay_s, number, other, packet))
                number += 1
        while late and late[0][0] <= time.monotonic():
            _, _, device, packet = heapq.heappop(late)
            with contextlib.suppress(OSError):  # the other side is not up (yet): lost, as on a real link
                os.write(device, packet)


def _open_tun(namespace: str) -> int:
    """A TUN device in ``namespace``; the file stays bound to it wherever this process goes next."""
    with Path("/run/netns", namespace).open() as handle:
        if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter namespace {namespace}")
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", _DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    _ip("link", "set", _DEVICE, "mtu", str(_MTU))
    return device


if __name__ == "__main__":
    carry(sys.argv[1:3], float(sys.argv[3]), float(sys.argv[4]))
