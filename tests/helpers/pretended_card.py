"""A Hopper card that is not there: the host's side of every launch runs, and nothing is compiled or computed.

It shows which kernels a step asks for, with which constants, and what Triton would compile them for. Tensors lie on the
CPU and say that they do not; what a kernel would have written stays 0. Large products of torch's are left out.
Invariant: a launch's key is Triton's own, made by the code that makes it on a card.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

NUM_MULTIPROCESSORS = 132  # of an H200


class NoDriver:
    """What launches ask of the card."""

    utils = SimpleNamespace(get_device_properties=lambda index: {"multiprocessor_count": NUM_MULTIPROCESSORS})

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Launches:
    """Triton's hook before it compiles: remembers, and says that somebody else did it."""

    def __init__(self) -> None:
        self.keys: set[tuple[str, str]] = set()

    def __call__(self, *, key: str, fn: SimpleNamespace, **details: object) -> bool:
        self.keys.add((fn.name, key))
        return True


@contextmanager
def pretend_card() -> Iterator[Launches]:
    """Until the end, every tensor is a card's. Modules of kernels must be imported inside."""
    import triton

    from argosy.kernels import card as card_of_tensors
    from argosy.kernels.triton import card, fp8_gemm

    launches, previous = Launches(), triton.knobs.runtime.jit_cache_hook
    driver = triton.runtime.driver._active
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
        patch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)
        patch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
        patch.setattr(torch, "empty", torch.zeros)
        patch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
        patch.setattr(torch, "mm", _mm)
        patch.setattr(torch, "bmm", _bmm)
        patch.setattr(torch.nn.functional, "linear", lambda x, weight: x.new_zeros(*x.shape[:-1], weight.shape[0]))
        patch.setattr(torch.nn.functional, "grouped_mm", lambda x, w, offs: x.new_zeros(x.shape[0], w.shape[2]))
        patch.setattr(fp8_gemm, "INTERPRETED_MULTIPROCESSORS", NUM_MULTIPROCESSORS)
        triton.runtime.driver.set_active(NoDriver())
        triton.knobs.runtime.jit_cache_hook = launches
        try:
            yield launches
        finally:
            triton.knobs.runtime.jit_cache_hook = previous
            triton.runtime.driver._active = driver
            for answer in (card.capability, card.count_multiprocessors, card_of_tensors._is_new_enough):
                answer.cache_clear()


def _mm(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    return x.new_zeros(x.shape[0], weight.shape[1], dtype=out_dtype or x.dtype)


def _bmm(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_zeros(x.shape[0], x.shape[1], weight.shape[2]) if out is None else out
