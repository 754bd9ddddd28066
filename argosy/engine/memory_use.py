"""What an accelerator's memory is spent on, as the engine reports it at its start.

Plain numbers; nothing is measured here. Invariant: the parts are what tensors take; what the driver, libraries and
allocators take beside them is the rest.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryUse:
    """Bytes of one rank's device."""

    total: int
    weights: int
    cache: int
    num_cache_tokens: int
    graphs: int
    num_graphs: int
    workspace: int  # kept free for the largest step
    free: int  # when everything was set up, the workspace included

    def lines(self) -> tuple[str, ...]:
        """A table for people."""
        rest = self.total - self.free - self.weights - self.cache - self.graphs
        parts = (
            ("weights", self.weights, ""),
            ("cache", self.cache, f"{self.num_cache_tokens:,} tokens"),
            ("graphs", self.graphs, f"{self.num_graphs} recordings"),
            ("workspace", self.workspace, "kept free for the largest step"),
            ("free beside", self.free - self.workspace, "raise --device-memory-utilization to use it"),
            ("other", rest, "driver, libraries"),
        )
        rows = (f"  {name:12}{size / GIB:8.2f} GiB  {remark}".rstrip() for name, size, remark in parts)
        return (f"device memory, {self.total / GIB:.1f} GiB:", *rows)
