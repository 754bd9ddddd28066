"""Which platform this process runs on."""

import torch

from argosy.config import DeviceName
from argosy.platforms.base import Platform
from argosy.platforms.cpu import CpuPlatform
from argosy.platforms.cuda import CudaPlatform


def select_platform(device: DeviceName) -> Platform:
    """``auto`` prefers a card.

    Raises:
        ValueError: ``cuda`` was asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA card; set --device cpu or auto")
    return CudaPlatform() if has_cuda and device != "cpu" else CpuPlatform()
