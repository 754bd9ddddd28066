"""NVIDIA cards."""

import torch

from argosy.platforms.base import MemoryInfo, Platform


class CudaPlatform(Platform):
    device_type = "cuda"
    comm_backend = "nccl"

    @property
    def has_fp8_compute(self) -> bool:
        return torch.cuda.get_device_capability() >= (9, 0)

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cuda", local_rank)

    def num_devices(self) -> int | None:
        return torch.cuda.device_count()

    def make_current(self, local_rank: int) -> None:
        torch.cuda.set_device(local_rank)

    def device_name(self) -> str:
        return torch.cuda.get_device_name()

    def memory_info(self) -> MemoryInfo:
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        return MemoryInfo(free_bytes=free_bytes, total_bytes=total_bytes)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def computes_fp8(self) -> bool:
        return torch.cuda.get_device_capability() >= (9, 0)

    def default_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        return checkpoint_dtype
