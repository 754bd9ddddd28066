"""INT8 weights per output channel: the formula, its edges, and the piece-wise arithmetic that must equal it."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from argosy.quantization.convert_rows import FP8Decoder, RowQuantizer
from argosy.quantization.fp8_block import dequantize_fp8_block
from argosy.quantization.quantize_weight import MIN_AMAX, dequantize_per_channel, quantize_per_channel
from tests.helpers.checkpoints import quantize_fp8_block


@given(st.integers(0, 2**32 - 1), st.floats(-30, 30), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_error_is_at_most_half_a_step(seed: int, exponent: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 37, generator=generator)
    weight = (weight * 2.0**exponent).to(dtype) if dtype is not torch.float16 else weight.to(dtype)
    quantized, scale = quantize_per_channel(weight)
    assert quantized.dtype is torch.int8 and scale.dtype is torch.float32 and scale.shape == (5, 1)
    assert int(quantized.abs().amax(dim=1).min()) == 127  # the largest of a row always takes the last step
    exact = quantized.double() * scale.double()
    assert bool(((exact - weight.double()).abs() <= scale.double() * 0.5 * (1 + 1e-5)).all())


def test_half_steps_round_to_even_as_the_spec_says() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0]])
    quantized, scale = quantize_per_channel(weight)
    assert scale.item() == 1.0
    assert quantized.tolist() == [[127, 0, 2, 2, 0, -2, -127]]


def test_row_of_zeros_stays_zero_with_a_finite_scale() -> None:
    quantized, scale = quantize_per_channel(torch.tensor([[0.0, -0.0], [1e-20, 0.0], [3.0, -1.0]]))
    assert quantized.tolist() == [[0, 0], [0, 0], [127, -42]]
    assert scale[0, 0].item() == pytest.approx(MIN_AMAX / 127) and bool((scale > 0).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_number_that_is_not_finite_is_named(bad: float) -> None:
    weight = torch.ones(4, 6)
    weight[2, 5] = bad
    with pytest.raises(ValueError, match=rf"row 2 holds {abs(bad)}; weights must be finite"):
        quantize_per_channel(weight)


def test_no_rows_are_quantised_to_no_rows() -> None:
    quantized, scale = quantize_per_channel(torch.empty(0, 7))
    assert quantized.shape == (0, 7) and scale.shape == (0, 1)


def test_dequantising_rounds_once() -> None:
    quantized, scale = torch.tensor([[127, -3]], dtype=torch.int8), torch.tensor([[0.1]])
    assert dequantize_per_channel(quantized, scale, torch.bfloat16).tolist() == [
        (torch.tensor([12.7, -0.3]).bfloat16()).tolist()
    ]


def test_rows_equal_the_whole_bit_by_bit_and_count_their_error() -> None:
    weight = torch.randn(9, 50, generator=torch.Generator().manual_seed(1))
    quantized, scale = quantize_per_channel(weight)
    rows = RowQuantizer(9, 50)
    for start, stop in ((4, 9), (0, 4)):
        rows.add(start, weight[start:stop].clone())
    sums = rows.finish(first_row=0)
    assert torch.equal(rows.quantized, quantized) and torch.equal(rows.scale, scale)
    error = dequantize_per_channel(quantized, scale, torch.float64) - weight.double()
    assert sums.error_sq == pytest.approx(float(error.square().sum()), rel=1e-4)
    assert sums.weight_sq == pytest.approx(float(weight.double().square().sum()), rel=1e-5)


def test_every_fp8_code_decodes_as_torch_does() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    decoded = torch.empty(1, 254)
    FP8Decoder(3, 254).decode(codes.numpy(), decoded, torch.tensor([1.0]), block_columns=254)
    assert torch.equal(decoded[0], codes.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_fp8_nan_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match="is NaN"):
        FP8Decoder(1, 3).decode(np.array([0, code, 1], dtype=np.uint8), torch.empty(1, 3), torch.ones(1), 128)


@pytest.mark.parametrize("num_columns", [1, 127, 128, 256, 300])
def test_fp8_rows_equal_the_dequantised_block(num_columns: int) -> None:
    weight = torch.randn(40, num_columns, generator=torch.Generator().manual_seed(num_columns))
    quantized, scale_inv = quantize_fp8_block(weight)
    data = quantized.view(torch.uint8).numpy().reshape(-1)
    decoded = torch.empty(40, num_columns)
    FP8Decoder(40, num_columns).decode(data, decoded, scale_inv[0], block_columns=128)
    assert torch.equal(decoded, dequantize_fp8_block(quantized, scale_inv, torch.float32))
