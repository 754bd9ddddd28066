"""FP8 blocks: the specification against arithmetic on dequantised numbers, and cards against the specification."""

import pytest
import torch

from argosy.kernels import linear_fp8, reference_fp8
from tests.helpers.quantized_twin import cosine, quantize_blocks

E4M3_HALF_STEP = 1 / 16  # relative, of a normal number


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dequantize(quantized: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Activations, by their own groups."""
    return quantized.double() * scale.double().repeat_interleave(128, dim=1)[:, : quantized.shape[1]]


def test_each_group_of_a_token_has_its_own_scale() -> None:
    x = torch.zeros(2, 300)
    x[0, 5], x[0, 130], x[0, 299], x[1, 0] = 448.0, -44.8, 2.0, 0.5
    quantized, scale = reference_fp8.quantize_groups(x, has_ue8m0_scales=False)
    assert scale.shape == (2, 3) and quantized.shape == (2, 300)
    assert torch.allclose(scale[0], torch.tensor([1.0, 0.1, 2 / 448]))
    assert quantized[0, [5, 130, 299]].tolist() == [448.0, -448.0, 448.0]
    assert scale[1, 1].item() == pytest.approx(1e-4 / 448)  # amax's floor


@pytest.mark.parametrize(("amax", "exponent"), [(448.0, 0), (448.0001, 1), (300.0, 0), (224.0, -1), (0.875, -9)])
def test_ue8m0_scales_are_rounded_up_to_powers_of_two(amax: float, exponent: int) -> None:
    x = torch.full((1, 128), amax)
    quantized, scale = reference_fp8.quantize_groups(x, has_ue8m0_scales=True)
    assert scale.item() == 2.0**exponent
    assert quantized.float().abs().max() <= 448


@pytest.mark.parametrize("has_ue8m0_scales", [False, True])
def test_quantising_loses_half_a_step(has_ue8m0_scales: bool) -> None:
    x = draw(50, 640) * 10 ** draw(50, 1, seed=1)
    quantized, scale = reference_fp8.quantize_groups(x, has_ue8m0_scales=has_ue8m0_scales)
    smallest_normal = 2.0**-6 * scale.repeat_interleave(128, dim=1)
    bound = E4M3_HALF_STEP * torch.maximum(x.abs(), smallest_normal) * (1 + 1e-6)
    assert ((dequantize(quantized, scale) - x).abs() <= bound).all()


@pytest.mark.parametrize("has_ue8m0_scales", [False, True])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(7168, 576), (1536, 128), (256, 16), (300, 200)])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 128])
def test_the_product_is_that_of_the_dequantised_numbers(
    num_tokens: int, num_inputs: int, num_outputs: int, has_ue8m0_scales: bool
) -> None:
    x, weight = draw(num_tokens, num_inputs), draw(num_outputs, -(-num_inputs // 128) * 128, seed=2)
    quantized, scale = quantize_blocks(weight)
    quantized = quantized[:, :num_inputs]
    out = linear_fp8(x, quantized, scale, has_ue8m0_scales=has_ue8m0_scales)
    block_scale = scale.double().repeat_interleave(128, dim=0)[:num_outputs].repeat_interleave(128, dim=1)
    rounded = dequantize(*reference_fp8.quantize_groups(x, has_ue8m0_scales=has_ue8m0_scales))
    expected = rounded @ (quantized.double() * block_scale[:, :num_inputs]).t()
    assert out.dtype == torch.float32
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-6 * num_inputs)


def test_the_result_is_rounded_to_the_inputs_dtype_once() -> None:
    x, (weight, scale) = draw(3, 256).bfloat16(), quantize_blocks(draw(128, 256, seed=2))
    out = linear_fp8(x, weight, scale, has_ue8m0_scales=True)
    assert torch.equal(out, linear_fp8(x.float(), weight, scale, has_ue8m0_scales=True).bfloat16())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_ue8m0_scales", [False, True])
@pytest.mark.parametrize(
    ("num_inputs", "num_outputs"), [(7168, 576), (7168, 4096), (1536, 24576), (2048, 7168), (128, 256), (384, 16)]
)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 128])
def test_cards_give_what_the_specification_gives(
    num_tokens: int, num_inputs: int, num_outputs: int, has_ue8m0_scales: bool, dtype: torch.dtype
) -> None:
    x = draw(num_tokens, num_inputs).to("cuda", dtype)
    weight, scale = quantize_blocks(draw(num_outputs, num_inputs, seed=2))
    arguments = x, weight.cuda(), scale.cuda()
    out = linear_fp8(*arguments, has_ue8m0_scales=has_ue8m0_scales)
    expected = reference_fp8.linear_fp8(*arguments, has_ue8m0_scales=has_ue8m0_scales)
    assert out.shape == expected.shape and out.dtype == dtype
    if num_tokens:
        assert cosine(out, expected) > 0.99999
        assert ((out - expected).norm() / expected.norm()).item() < (4e-3 if dtype == torch.bfloat16 else 1e-3)
