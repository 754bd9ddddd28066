"""Host arrays become device tensors, without a wait for the device.

Nothing is read back here. Invariant: the array may be changed once the call has returned, except on a CPU, where array
and tensor are one.
"""

from collections.abc import Sequence

import numpy as np
import torch

ALIGNMENT_BYTES = 16  # of each array in a shared copy: what a card's vector loads ask for


def send_together(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """``send`` of each. On a device they are views of one copy: a small copy costs its start, whatever it holds."""
    if device.type == "cpu":
        return [send(array, device) for array in arrays]
    joined, starts = join_bytes(arrays)
    return split_bytes(send(joined, device), arrays, starts)


def join_bytes(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """One array [bytes] uint8, and where each begins in it."""
    padded = [-(-array.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for array in arrays]
    starts = [0, *np.cumsum(padded).tolist()]
    joined = np.zeros(starts[-1], dtype=np.uint8)
    for array, start in zip(arrays, starts, strict=False):
        joined[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return joined, starts[:-1]


def split_bytes(joined: torch.Tensor, arrays: Sequence[np.ndarray], starts: Sequence[int]) -> list[torch.Tensor]:
    """What ``join_bytes`` joined, as views with the dtypes and shapes of ``arrays``."""
    return [
        joined[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for array, start in zip(arrays, starts, strict=True)
    ]


def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The values of ``array``, on ``device`` once the work started so far is done."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    # NOTE(sync): from memory that is not pinned a large copy would wait for the stream, and so for the step in flight.
    return tensor.pin_memory().to(device, non_blocking=True)
