"""How many tokens each expert received: counted on the device, read when somebody asks.

Data for balancing later; nothing is balanced here. Invariant: recording never waits for the device, and costs one
addition a layer.

Shape letters: L MoE layers, e local experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from argosy.distributed.communicator import Communicator


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """One MoE layer's tokens since the last reset, over all ranks of the ep axis."""

    tokens_per_expert: tuple[int, ...]  # by expert id
    tokens_per_rank: tuple[int, ...]  # by ep rank

    @property
    def expert_imbalance(self) -> float:
        """The busiest expert's tokens over the mean: 1 is even."""
        return _imbalance(self.tokens_per_expert)

    @property
    def rank_imbalance(self) -> float:
        """The busiest rank's tokens over the mean: the factor by which a step's experts are slower than even ones."""
        return _imbalance(self.tokens_per_rank)


class LoadCounter(Protocol):
    """What a MoE layer tells of each dispatch."""

    def record(self, num_tokens_per_expert: torch.Tensor) -> None:
        """``num_tokens_per_expert: [e]`` int32, on the device."""
        ...


class NoLoadCounter:
    """The null twin."""

    def record(self, num_tokens_per_expert: torch.Tensor) -> None:
        """Counts nothing."""


class LayerLoadCounter:
    """Adds into one line of an ``ExpertLoad``."""

    def __init__(self, tokens_per_expert: torch.Tensor) -> None:
        self._tokens_per_expert = tokens_per_expert  # [e] int64, a view

    def record(self, num_tokens_per_expert: torch.Tensor) -> None:
        if num_tokens_per_expert.is_cpu:  # numpy's addition is one call, torch's a conversion too
            counted = self._tokens_per_expert.numpy()
            counted += num_tokens_per_expert.numpy()
        else:
            self._tokens_per_expert.add_(num_tokens_per_expert)


class ExpertLoad:
    """This rank's counters of all MoE layers; made on the current default device."""

    def __init__(self, num_moe_layers: int, num_local_experts: int) -> None:
        self._tokens = torch.zeros(num_moe_layers, num_local_experts, dtype=torch.int64)  # [L, e]

    def layer(self, moe_layer: int) -> LoadCounter:
        """The counter of MoE layer number ``moe_layer``, counted from 0 without the dense layers."""
        return LayerLoadCounter(self._tokens[moe_layer])

    def reset(self) -> None:
        self._tokens.zero_()

    def local_counts(self) -> list[list[int]]:
        """Tokens by layer and local expert. NOTE(sync): waits for the device."""
        counts: list[list[int]] = self._tokens.tolist()
        return counts

    def report(self, ep: Communicator) -> list[LayerLoad]:
        """By layer. NOTE(sync): waits for the device. Collective over ep: every rank must call."""
        num_moe_layers, num_local_experts = self._tokens.shape
        gathered = ep.all_gather(self._tokens).view(ep.size, num_moe_layers, num_local_experts)
        return merge_local_counts(gathered.tolist())


def merge_local_counts(counts_by_rank: Sequence[Sequence[Sequence[int]]]) -> list[LayerLoad]:
    """``ExpertLoad.local_counts`` of every ep rank, in rank order -> the load by layer."""
    return [
        LayerLoad(
            tokens_per_expert=tuple(tokens for experts in experts_by_rank for tokens in experts),
            tokens_per_rank=tuple(sum(experts) for experts in experts_by_rank),
        )
        for experts_by_rank in zip(*counts_by_rank, strict=True)
    ]


def _imbalance(tokens: Sequence[int]) -> float:
    total = sum(tokens)
    return max(tokens) * len(tokens) / total if total else 1.0
