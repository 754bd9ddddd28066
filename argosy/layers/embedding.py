"""Token embedding, whole or one tensor-parallel rank's part of the vocabulary. It never communicates."""

import torch
from torch import nn

from argosy.kernels import look_up


class Embedding(nn.Module):
    """``input_ids: [T]`` int64 -> [T, D]."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype), requires_grad=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return look_up(self.weight, input_ids)


class VocabParallelEmbedding(Embedding):
    """Holds ``vocab_size / tp_size`` entries; zeros for the others, so the caller sums over tp."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype, tp_rank: int, tp_size: int) -> None:
        super().__init__(vocab_size // tp_size, hidden_size, dtype)
        self._first_id = tp_rank * self.weight.shape[0]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        local_ids = input_ids - self._first_id
        is_elsewhere = (local_ids < 0) | (local_ids >= self.weight.shape[0])
        embedded = look_up(self.weight, local_ids.masked_fill(is_elsewhere, 0))
        return embedded.masked_fill_(is_elsewhere.unsqueeze(1), 0.0)


def build_embedding(vocab_size: int, hidden_size: int, dtype: torch.dtype, *, tp_rank: int, tp_size: int) -> Embedding:
    if tp_size == 1:
        return Embedding(vocab_size, hidden_size, dtype)
    return VocabParallelEmbedding(vocab_size, hidden_size, dtype, tp_rank, tp_size)
