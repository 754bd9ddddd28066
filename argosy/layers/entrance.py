"""What stands between the residual stream and a block of linears: the sum, the norm, the tokens of all ranks, 8 bits.

On one rank all of it can be one launch; with tensor parallelism the tokens are gathered between norm and quantisation.
Which it is, is chosen when the model is built. Invariant: both give the block the same rows.

Shape letters: T tokens of the batch, t tokens of this rank's slice, D hidden.
"""

from typing import Protocol

import torch

from argosy.distributed.communicator import Communicator
from argosy.distributed.tp_comm import TokenSlices, build_token_slices
from argosy.layers.norm import RMSNorm
from argosy.quantization.preparation import NormedRows, Preparation


class Entrance(Protocol):
    """Into attention, or into an MLP."""

    def __call__(self, x: torch.Tensor, delta: torch.Tensor | None, num_tokens: int) -> NormedRows:
        """``x: [t, D]``, ``delta: [t, D]`` to be added or None, ``num_tokens``: T -> rows [T, D], total [t, D].
        Collective over tp."""
        ...


class WholeEntrance:
    """One rank holds every token that the block sees."""

    def __init__(self, norm: RMSNorm, preparation: Preparation) -> None:
        self._norm, self._preparation = norm, preparation

    def __call__(self, x: torch.Tensor, delta: torch.Tensor | None, num_tokens: int) -> NormedRows:
        return self._norm.prepare(x, delta, self._preparation)


class GatheringEntrance:
    """Every rank norms its own tokens."""

    def __init__(self, norm: RMSNorm, preparation: Preparation, slices: TokenSlices) -> None:
        self._norm, self._preparation, self._slices = norm, preparation, slices

    def __call__(self, x: torch.Tensor, delta: torch.Tensor | None, num_tokens: int) -> NormedRows:
        normed, total = (self._norm(x), x) if delta is None else self._norm.add(x, delta)
        rows = self._slices.all_gather(normed, num_tokens)
        return NormedRows(rows, self._preparation.prepare(rows), total)


def build_entrance(norm: RMSNorm, preparation: Preparation, tp: Communicator) -> Entrance:
    if tp.size == 1:
        return WholeEntrance(norm, preparation)
    return GatheringEntrance(norm, preparation, build_token_slices(tp))
