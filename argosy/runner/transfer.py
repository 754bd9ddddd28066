"""Host arrays become device tensors, without a wait for the device.

Nothing is read back here. Invariant: the array may be changed once the call has returned, except on a CPU, where array
and tensor are one.
"""

import numpy as np
import torch


def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The values of ``array``, on ``device`` once the work started so far is done."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    # NOTE(sync): from memory that is not pinned a large copy would wait for the stream, and so for the step in flight.
    return tensor.pin_memory().to(device, non_blocking=True)
