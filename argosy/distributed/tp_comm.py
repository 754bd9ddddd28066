"""How tensor-parallel ranks share a batch's tokens: each holds a slice of the residual stream.

The all-reduce after a row-parallel product is written as its two halves. After the reduce-scatter every rank owns
``ceil(T / tp_size)`` consecutive tokens (the last ranks fewer, or none), so norms and residuals are computed once, each
token enters expert parallelism once, and the all-gather comes where the next column-parallel product needs all tokens.
The bytes are those of one all-reduce. Which weights are split is the model's business. Invariant: slices in rank order,
put together, are the batch.

Shape letters: T tokens of the batch, t tokens of this rank's slice, D hidden, N sampled rows, V vocabulary.
"""

from typing import Protocol

import torch
import torch.nn.functional as F

from argosy.distributed.communicator import Communicator


class TokenSlices(Protocol):
    """This rank's share of every batch's tokens."""

    def all_gather(self, x: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """``x: [t, D]``, ``num_tokens``: T -> [T, D] on every rank. Collective."""
        ...

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """``x: [T, D]``, this rank's partial sum -> [t, D], summed over ranks. Collective."""
        ...

    def take_rows(self, x: torch.Tensor, rows: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """``x: [t, D]``, ``rows: [N]`` int64 in [0, T), ascending, equal on every rank -> [N, D] on every rank, which
        may be x. Collective."""
        ...


class WholeTokens:
    """The null twin: one rank holds every token."""

    def all_gather(self, x: torch.Tensor, num_tokens: int) -> torch.Tensor:
        return x

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def take_rows(self, x: torch.Tensor, rows: torch.Tensor, num_tokens: int) -> torch.Tensor:
        return x if rows.shape[0] == x.shape[0] else x.index_select(0, rows)  # as many as there are: all, in order


class TensorParallelTokens:
    """Slices over the ranks of ``tp``."""

    def __init__(self, tp: Communicator) -> None:
        self._tp = tp

    def all_gather(self, x: torch.Tensor, num_tokens: int) -> torch.Tensor:
        width = slice_width(num_tokens, self._tp.size)
        return self._tp.all_gather(_pad_rows(x, width))[:num_tokens]

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        num_tokens, size = x.shape[0], self._tp.size
        summed = self._tp.reduce_scatter(_pad_rows(x, slice_width(num_tokens, size) * size))
        start, stop = slice_bounds(num_tokens, size, self._tp.rank)
        return summed[: stop - start]

    def take_rows(self, x: torch.Tensor, rows: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Each row has one owner; the others add zeros, so the sum is exact."""
        start, stop = slice_bounds(num_tokens, self._tp.size, self._tp.rank)
        if start == stop:
            return self._tp.all_reduce(x.new_zeros(rows.shape[0], x.shape[1]))
        is_elsewhere = (rows < start) | (rows >= stop)
        mine = x.index_select(0, (rows - start).clamp(0, stop - start - 1))
        return self._tp.all_reduce(mine.masked_fill_(is_elsewhere.unsqueeze(1), 0.0))


def build_token_slices(tp: Communicator) -> TokenSlices:
    return WholeTokens() if tp.size == 1 else TensorParallelTokens(tp)


def slice_width(num_tokens: int, tp_size: int) -> int:
    """Tokens of a full slice."""
    return -(-num_tokens // tp_size)


def slice_bounds(num_tokens: int, tp_size: int, tp_rank: int) -> tuple[int, int]:
    """First token of a rank's slice, and the one behind its last."""
    width = slice_width(num_tokens, tp_size)
    return min(tp_rank * width, num_tokens), min((tp_rank + 1) * width, num_tokens)


def gather_vocabulary(logits: torch.Tensor, tp: Communicator) -> torch.Tensor:
    """``logits: [N, V / tp_size]`` of this rank's part of the vocabulary -> [N, V] on every rank. Collective."""
    if tp.size == 1:
        return logits
    num_rows, width = logits.shape
    by_rank = tp.all_gather(logits).view(tp.size, num_rows, width)
    return by_rank.transpose(0, 1).reshape(num_rows, tp.size * width)


def _pad_rows(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    missing = num_rows - x.shape[0]
    return F.pad(x, (0, 0, 0, missing)) if missing else x
