"""The questions the engine asks of a device; one subclass a kind of device, chosen once by ``select_platform``."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Bytes of the memory that the device computes in."""

    free_bytes: int
    total_bytes: int


class Platform(ABC):
    """A kind of device. Constructed once and passed down; holds no state of a step."""

    device_type: str
    comm_backend: str  # what torch.distributed calls the library that connects such devices

    @property
    @abstractmethod
    def has_fp8_compute(self) -> bool:
        """Whether the device multiplies FP8 numbers, in blocks with scales."""

    @abstractmethod
    def device(self, local_rank: int) -> torch.device:
        """The device of the ``local_rank``-th process on this node."""

    @abstractmethod
    def num_devices(self) -> int | None:
        """Devices of this node; None where ranks can share one."""

    @abstractmethod
    def make_current(self, local_rank: int) -> None:
        """From now on this process computes on ``device(local_rank)``."""

    @abstractmethod
    def device_name(self) -> str:
        """For people: what the hardware calls itself."""

    @abstractmethod
    def memory_info(self) -> MemoryInfo:
        """NOTE(sync): asks the driver."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything started on the device is done."""

    @abstractmethod
    def computes_fp8(self) -> bool:
        """Whether matrix units take FP8, so that weights stored in it need no dequantising."""

    @abstractmethod
    def default_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """What ``--dtype auto`` means here."""
