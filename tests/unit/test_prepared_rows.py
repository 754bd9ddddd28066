"""An input is quantised once for all linears that take it, and they give what each would give by itself."""

import pytest
import torch
from torch import nn

from argosy.kernels import silu_mul
from argosy.layers.linear import share_preparation
from argosy.quantization.fp8_linear import FP8BlockLinear
from argosy.quantization.plain_scheme import PlainLinear
from argosy.quantization.quantize_weight import quantize_per_channel
from argosy.quantization.w8a8_linear import QuantizedRows, W8A8Linear


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build_w8a8(out_features: int, in_features: int) -> W8A8Linear:
    linear = W8A8Linear(in_features, out_features)
    weight, scale = quantize_per_channel(draw(out_features, in_features, seed=out_features))
    linear.weight.data.copy_(weight)
    linear.weight_scale.data.copy_(scale)
    return linear


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_shared_rows_give_every_linear_its_own_result(num_tokens: int) -> None:
    linears = [build_w8a8(24, 64), build_w8a8(8, 64)]
    x = draw(num_tokens, 64)
    rows = share_preparation(*linears)(x)
    assert isinstance(rows, QuantizedRows) and rows.numbers.shape == (num_tokens, 64)
    for linear in linears:
        assert torch.equal(linear(rows), linear(x))


def test_linears_of_different_kinds_get_the_input_itself() -> None:
    x = draw(3, 64)
    assert share_preparation(build_w8a8(8, 64), PlainLinear(64, 8, torch.float32))(x) is x
    assert share_preparation(PlainLinear(64, 8, torch.float32), PlainLinear(64, 4, torch.float32))(x) is x


@pytest.mark.parametrize(
    "linear",
    [
        build_w8a8(8, 64),
        PlainLinear(64, 8, torch.float32),
        FP8BlockLinear(64, 8, has_ue8m0_scales=False),
    ],
    ids=lambda linear: type(linear).__name__,
)
def test_a_gated_input_is_prepared_as_its_silu_product(linear: nn.Module) -> None:
    gate_up = draw(5, 128)
    found, expected = linear.prepare_gated(gate_up), linear.prepare(silu_mul(gate_up))
    if isinstance(found, QuantizedRows):
        found, expected = found.numbers * found.scale, expected.numbers * expected.scale
    assert torch.equal(found, expected)
