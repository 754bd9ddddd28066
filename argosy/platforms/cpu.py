"""The host's own processor."""

import platform
from pathlib import Path

import torch

from argosy.platforms.base import MemoryInfo, Platform


class CpuPlatform(Platform):
    device_type = "cpu"
    comm_backend = "gloo"
    has_fp8_compute = False

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

    def computes_fp8(self) -> bool:
        return False

    def default_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """float32: small bf16 products are several times slower than float32 ones on CPUs (docs/log.md)."""
        return torch.float32
