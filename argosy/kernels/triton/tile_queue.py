"""Where the programs of a product take their next tile from: one counter, which is 0 whenever no product runs.

The program that takes the last number writes 0 again (``hopper_tiles.py``), so nothing has to be launched for it.
Invariant: products of one stream run one after another, and those of two streams have two counters.
"""

import torch
import triton

_QUEUES: dict[tuple[torch.device, int], torch.Tensor] = {}


def find_tile_queue(device: torch.device) -> torch.Tensor:
    """[1] int32, of the current stream of ``device``.

    NOTE(order): made when a stream's first product is launched, which must not be while a graph is recorded: the 0
    would be written by the graph alone. Recordings are preceded by a run on their stream (``runner/graph_runner.py``).
    """
    stream = triton.runtime.driver.active.get_current_stream(device.index) if device.type == "cuda" else 0
    queue = _QUEUES.get((device, stream))
    if queue is None:
        queue = _QUEUES[device, stream] = torch.zeros(1, dtype=torch.int32, device=device)
    return queue


def pad_experts(num_experts: int) -> int:
    """Counts that one warp reads at once: a power of two."""
    padded: int = triton.next_power_of_2(num_experts)
    return max(32, padded)
