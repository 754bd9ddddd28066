"""The host's own processor."""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from argosy.platforms.base import DeviceGraph, HostCopy, Mark, MemoryInfo, Platform
from argosy.platforms.side_lane import NoSideLane


@dataclass(frozen=True, slots=True)
class HostTensor:
    """``HostCopy`` of what is on the host anyway."""

    tensor: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.tensor


class PastMark:
    """``Mark``: what was started is done."""

    def is_completed(self) -> bool:
        return True


class CpuPlatform(Platform):
    device_type = "cpu"
    comm_backend = "gloo"
    has_fp8_compute = False
    records_steps = False

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def num_devices(self) -> int | None:
        return None

    def make_current(self, local_rank: int) -> None:
        return None

    def device_name(self) -> str:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"

    def memory_info(self) -> MemoryInfo:
        meminfo = Path("/proc/meminfo")
        if not meminfo.is_file():
            raise RuntimeError("cannot read the host's memory: /proc/meminfo is absent; set --kv-cache-memory-bytes")
        fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines())
        kib = {name: int(value.split()[0]) for name, value in fields.items()}
        return MemoryInfo(free_bytes=kib["MemAvailable"] * 1024, total_bytes=kib["MemTotal"] * 1024)

    def synchronize(self) -> None:
        return None

    def start_copy_to_host(self, tensor: torch.Tensor) -> HostCopy:
        return HostTensor(tensor)

    def mark(self) -> Mark:
        return PastMark()

    def new_graph_pool(self) -> object:
        return None

    def warm_up(self, run: Callable[[], torch.Tensor], pool: object) -> None:
        return None

    def capture(self, run: Callable[[], torch.Tensor], pool: object) -> DeviceGraph:
        """Nothing can be recorded: a replay runs again. It serves to test what replays are asked for."""
        output = run().clone()

        def replay() -> None:
            output.copy_(run())

        return DeviceGraph(output, replay)

    def new_side_lane(self) -> NoSideLane:
        return NoSideLane()

    def peak_bytes(self) -> int | None:
        return None

    def reset_peak(self) -> None:
        return None

    def default_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """float32: small bf16 products are several times slower than float32 ones on CPUs (docs/log.md)."""
        return torch.float32
