"""Linear layers without bias, whole or one tensor-parallel rank's share. They never communicate.

What a linear is made of is its scheme's business; here is which share of it a rank holds. Invariant: weights are
[out_features, in_features], as checkpoints store them.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from argosy.kernels import linear_fp32
from argosy.quantization.linear_shape import LinearShape
from argosy.quantization.plain_scheme import PlainLinear
from argosy.quantization.preparation import NoPreparation, Preparation
from argosy.quantization.scheme import Schemes


class PreparingLinear(Protocol):
    """A linear of any format: ``x: [T, in]``, or what its ``preparation`` made of it -> [T, out]."""

    preparation: Preparation

    def __call__(self, x: object) -> torch.Tensor: ...


def share_preparation(*linears: PreparingLinear) -> Preparation:
    """What to do once with an input that all ``linears`` take: nothing, if they are of different formats."""
    is_alike = all(linear.preparation == linears[0].preparation for linear in linears)
    return linears[0].preparation if is_alike else NoPreparation()


class LinearGroup:
    """Linears that take the same input: ``x: [T, in]``, or what was prepared for all of them -> [T, out] of each."""

    def __init__(self, linears: Sequence[PreparingLinear]) -> None:
        self._linears = linears

    def __call__(self, x: object) -> tuple[torch.Tensor, ...]:
        return tuple(linear(x) for linear in self._linears)


class JoinedLinears(LinearGroup):
    """The same as one product, whose columns are handed out: their rows are strided."""

    def __init__(self, linears: Sequence[nn.Module], joined: nn.Module) -> None:
        self._joined = joined
        self._sizes = [linear.weight.shape[0] for linear in linears]

    def __call__(self, x: object) -> tuple[torch.Tensor, ...]:
        product: torch.Tensor = self._joined(x)
        return product.split(self._sizes, dim=1)


def group_linears(*linears: nn.Module, is_joined: bool) -> LinearGroup:
    """``is_joined``: as one product, where their format can. Before weights are loaded: parameters are made anew."""
    kind = type(linears[0])
    joined = kind.try_join(linears) if is_joined and all(type(linear) is kind for linear in linears) else None
    return LinearGroup(linears) if joined is None else JoinedLinears(linears, joined)


def build_linear(schemes: Schemes, name: str, in_features: int, out_features: int) -> nn.Module:
    """Whole on every rank: ``x: [T, in]`` -> [T, out]."""
    return schemes.build_linear((name,), LinearShape(in_features=in_features, out_features=out_features))


def build_column_parallel(
    schemes: Schemes, names: str | tuple[str, ...], in_features: int, out_features: int, tp_size: int
) -> nn.Module:
    """Rank r's ``out_features / tp_size`` outputs, from all inputs: its heads, or its part of an MLP's width.

    Several ``names`` are computed as one: each gives ``out_features`` outputs, in their order.
    """
    names = (names,) if isinstance(names, str) else names
    shape = LinearShape(in_features=in_features, out_features=out_features, out_parts=tp_size, num_joined=len(names))
    return schemes.build_linear(names, shape)


def build_row_parallel(schemes: Schemes, name: str, in_features: int, out_features: int, tp_size: int) -> nn.Module:
    """All outputs from rank r's ``in_features / tp_size`` inputs: a partial sum, which the caller reduces over tp."""
    return schemes.build_linear(
        (name,), LinearShape(in_features=in_features, out_features=out_features, in_parts=tp_size)
    )


class Fp32Linear(PlainLinear):
    """A linear whose output is float32 whatever its input, and which is never quantised: index weights."""

    def forward(self, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """``factor``: what every output is multiplied by."""
        return linear_fp32(x, self.weight, factor)


class VocabParallelHead(Fp32Linear):
    """Logits of rank r's ``vocab_size / tp_size`` entries, float32."""

    def __init__(self, hidden_size: int, vocab_size: int, dtype: torch.dtype, tp_size: int) -> None:
        super().__init__(hidden_size, vocab_size // tp_size, dtype)
