"""Token embedding."""

import torch
import torch.nn.functional as F
from torch import nn


class Embedding(nn.Module):
    """``input_ids: [T]`` int64 -> [T, D]."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype), requires_grad=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(input_ids, self.weight)
