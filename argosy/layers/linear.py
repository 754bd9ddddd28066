"""Linear layers without bias, whole or one tensor-parallel rank's share. They never communicate.

What a linear is made of is its scheme's business; here is which share of it a rank holds. Invariant: weights are
[out_features, in_features], as checkpoints store them.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from argosy.kernels import linear_fp32
from argosy.quantization.linear_shape import LinearShape
from argosy.quantization.plain_scheme import PlainLinear
from argosy.quantization.scheme import Schemes


class PreparingLinear(Protocol):
    """A linear of any format: ``x: [T, in]``, or what ``prepare`` made of it -> [T, out].

    ``prepare`` is the part of its work that depends on the input alone; linears of one kind prepare alike.
    """

    def prepare(self, x: torch.Tensor) -> object: ...

    def prepare_gated(self, gate_up: torch.Tensor) -> object:
        """``gate_up: [T, 2 * in]`` -> ``prepare`` of silu(gate) * up."""
        ...

    def __call__(self, x: object) -> torch.Tensor: ...


def share_preparation(*linears: PreparingLinear) -> Callable[[torch.Tensor], object]:
    """What to do once with an input that all ``linears`` take: nothing, if they are of different kinds."""
    is_alike = len({type(linear) for linear in linears}) == 1
    return linears[0].prepare if is_alike else _leave


def _leave(x: torch.Tensor) -> torch.Tensor:
    return x


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_fp32(x, self.weight)


class VocabParallelHead(Fp32Linear):
    """Logits of rank r's ``vocab_size / tp_size`` entries, float32."""

    def __init__(self, hidden_size: int, vocab_size: int, dtype: torch.dtype, tp_size: int) -> None:
        super().__init__(hidden_size, vocab_size // tp_size, dtype)
