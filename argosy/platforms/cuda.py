"""NVIDIA cards."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from argosy.platforms.base import DeviceGraph, HostCopy, Mark, MemoryInfo, Platform


@dataclass(frozen=True, slots=True)
class PinnedCopy:
    """``HostCopy`` into pinned memory: an event tells when it is there."""

    tensor: torch.Tensor
    event: torch.cuda.Event

    def wait(self) -> torch.Tensor:
        self.event.synchronize()
        return self.tensor


@dataclass(frozen=True, slots=True)
class EventMark:
    """``Mark`` by an event on the current stream."""

    event: torch.cuda.Event

    def is_completed(self) -> bool:
        return self.event.query()


@dataclass(frozen=True, slots=True)
class GraphPool:
    """What the graphs of one pool are recorded on, and where their tensors lie."""

    handle: object
    stream: torch.cuda.Stream


T = TypeVar("T")


class StreamWork(Generic[T]):
    """Work on another stream. It holds on to what was computed from, so that nobody gets that memory before."""

    def __init__(self, value: T, is_done: torch.cuda.Event, compute: Callable[[], T]) -> None:
        self._value, self._is_done, self._compute = value, is_done, compute

    def compute(self) -> None:
        """It is being computed."""

    def wait(self) -> T:
        self._is_done.wait()
        return self._value


class StreamLane:
    """A second stream.

    NOTE(order): torch gives memory that was freed to the stream that had it. The lane's own is given out again from
    ``start`` on, which waits for all that read it; what it reads of others' is held until the work is dropped.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def start(self, compute: Callable[[], T]) -> StreamWork[T]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            value = compute()
            is_done = torch.cuda.Event()
            is_done.record()
        return StreamWork(value, is_done, compute)


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

    def start_copy_to_host(self, tensor: torch.Tensor) -> HostCopy:
        # Pinned memory comes from torch's cache of it, which gives it out again only after the copy.
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        pinned.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return PinnedCopy(pinned, event)

    @property
    def records_steps(self) -> bool:
        return torch.cuda.get_device_capability() >= (9, 0)  # others run plain operations, of which some wait

    def mark(self) -> Mark:
        event = torch.cuda.Event()
        event.record()
        return EventMark(event)

    def new_graph_pool(self) -> GraphPool:
        return GraphPool(torch.cuda.graph_pool_handle(), torch.cuda.Stream())

    def warm_up(self, run: Callable[[], torch.Tensor], pool: object) -> None:
        assert isinstance(pool, GraphPool)
        pool.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(pool.stream):
            run()
        torch.cuda.current_stream().wait_stream(pool.stream)

    def capture(self, run: Callable[[], torch.Tensor], pool: object) -> DeviceGraph:
        """NOTE(order): waits for all that was started, on other ranks too where they exchange: no collective is in
        flight while one records. "thread_local": a watchdog asks for events from its own thread meanwhile."""
        assert isinstance(pool, GraphPool)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool.handle, stream=pool.stream, capture_error_mode="thread_local"):
            output = run()
        return DeviceGraph(output, graph.replay)

    def new_side_lane(self) -> StreamLane:
        return StreamLane()

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def default_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        return checkpoint_dtype
