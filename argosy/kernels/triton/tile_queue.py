"""Where the programs of a product take their next tile from: one counter, which is 0 whenever no product runs.

The program that takes the last number writes 0 again (``hopper_tiles.py``), so nothing has to be launched for it.
Invariant: products of one stream run one after another, and those of two streams have two counters.
"""

import torch
import triton

_QUEUES: dict[tuple[torch.device, int], torch.Tensor] = {}


def find_tile_queue(device: torch.device) -> torch.Tensor:
    """[1] int32, of the current stream of ``device``."""
    is_cuda = device.type == "cuda"
    key = device, torch.cuda.current_stream(device).cuda_stream if is_cuda else 0
    queue = _QUEUES.get(key)
    if queue is None:
        queue = torch.zeros(1, dtype=torch.int32, device=device)
        if not (is_cuda and torch.cuda.is_current_stream_capturing()):  # a recording's memory is its own
            _QUEUES[key] = queue
    return queue


def pad_experts(num_experts: int) -> int:
    """Counts that one warp reads at once: a power of two."""
    return max(32, triton.next_power_of_2(num_experts))
