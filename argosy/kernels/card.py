"""Where the kernels of ``triton/`` run. Importing this needs no Triton."""

import functools

import torch

MIN_CAPABILITY = 90  # Hopper: kernels load tiles by descriptors


def has_kernels(x: torch.Tensor) -> bool:
    """Whether ``x`` lies on a card that they run on; older ones get the plain operations."""
    return x.is_cuda and _is_new_enough()


@functools.cache
def _is_new_enough() -> bool:
    # Triton is installed with CUDA's torch only.
    from argosy.kernels.triton.card import capability

    return capability() >= MIN_CAPABILITY
