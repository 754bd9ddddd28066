"""Log probabilities between the sampler, which leaves them on the device, and the output, which is plain numbers.

It computes none. Invariant: reading changes no value.

Shape letters: N sampled rows, M rows that asked, k the most alternatives that one of them asked for.
"""

from dataclasses import dataclass

import numpy as np
import torch

from argosy.messages import TokenLogprobs


@dataclass(frozen=True, slots=True)
class SampledLogprobs:
    """Of the rows that asked, packed into two tensors, so that two copies bring them to the host."""

    num_lines: int  # N
    lines: np.ndarray  # [M] int64: which of the sampled rows
    num_top: np.ndarray  # [M] int64: how many alternatives each asked for
    ids: torch.Tensor  # [M, 2 + k] int64: the token, its rank, the likeliest tokens
    values: torch.Tensor  # [M, 1 + k] f32: the token's log probability, then theirs

    def read(self, ids: torch.Tensor, values: torch.Tensor) -> list[TokenLogprobs | None]:
        """``ids`` and ``values``: copies on the host. An entry for each sampled row; None where a row did not ask."""
        result: list[TokenLogprobs | None] = [None] * self.num_lines
        columns = zip(self.lines.tolist(), self.num_top.tolist(), ids.tolist(), values.tolist(), strict=True)
        for line, num, (token_id, rank, *top_ids), (logprob, *top_values) in columns:
            result[line] = TokenLogprobs(token_id, logprob, rank, top_ids[:num], top_values[:num])
        return result
