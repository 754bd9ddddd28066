"""The questions the engine asks of a device; one subclass a kind of device, chosen once by ``select_platform``."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from argosy.platforms.side_lane import SideLane


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Bytes of the memory that the device computes in."""

    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceGraph:
    """Recorded work of a device."""

    output: torch.Tensor  # what the recorded run returned; every replay writes it anew
    replay: Callable[[], None]


class Mark(Protocol):
    """A point in the device's work."""

    def is_completed(self) -> bool:
        """Whether the device has come past it. May be asked from another thread."""


class HostCopy(Protocol):
    """A tensor on its way from the device to the host."""

    def wait(self) -> torch.Tensor:
        """The values, on the host, to be read only. NOTE(sync): waits for what made them, not for what came later."""


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
    def start_copy_to_host(self, tensor: torch.Tensor) -> HostCopy:
        """Copy once the work started so far is done; the host goes on. Nobody may write to ``tensor`` afterwards."""

    @abstractmethod
    def mark(self) -> Mark:
        """Behind everything started so far."""

    @property
    @abstractmethod
    def records_steps(self) -> bool:
        """Whether decode steps are worth recording, and have no operation that waits for the host."""

    @abstractmethod
    def new_graph_pool(self) -> object:
        """What graphs share which are never replayed at the same time, above all memory: for ``capture``."""

    @abstractmethod
    def warm_up(self, run: Callable[[], torch.Tensor], pool: object) -> None:
        """Run what will be captured, once: it compiles kernels and connects ranks, which a recording cannot."""

    @abstractmethod
    def capture(self, run: Callable[[], torch.Tensor], pool: object) -> DeviceGraph:
        """Record what ``run`` starts on the device. It must not wait for the device.

        Later replays read the same input tensors and write the same output.
        """

    @abstractmethod
    def new_side_lane(self) -> SideLane:
        """For small work of recorded steps, which leaves room for more beside it; the null twin where there is none."""

    @abstractmethod
    def peak_bytes(self) -> int | None:
        """The most that tensors of this process took since ``reset_peak``; None where nobody counts."""

    @abstractmethod
    def reset_peak(self) -> None:
        """Give memory that no tensor holds back to the device, and count ``peak_bytes`` anew."""

    @abstractmethod
    def default_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """What ``--dtype auto`` means here."""
