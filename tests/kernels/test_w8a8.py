"""W8A8: what runs against the specification's integer loops, bit for bit; and the properties of the specification."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from argosy.kernels import cpu_w8a8, device_w8a8, grouped_mlp_w8a8, linear_w8a8, reference_w8a8
from argosy.quantization.quantize_weight import quantize_per_channel

GroupedMLP = Callable[..., torch.Tensor]

# Inputs and outputs of V3.2's linears, cut where the slow twin would take seconds, and sizes that are multiples of
# nothing.
SHAPES = [(7168, 96), (1536, 64), (2048, 40), (576, 512), (64, 7168), (7, 5), (256, 1)]
COUNTS = [[0, 0, 0], [1, 0, 0], [0, 3, 2], [4, 0, 7], [40, 0, 1]]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw_weight(*shape: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [..., N, K] and its scales [..., N, 1]."""
    quantized, scale = quantize_per_channel(draw(*shape, seed=seed).flatten(0, -2))
    return quantized.view(shape), scale.view(*shape[:-1], 1)


def draw_experts(num_experts: int, hidden_size: int, width: int) -> tuple[torch.Tensor, ...]:
    return (*draw_weight(num_experts, 2 * width, hidden_size), *draw_weight(num_experts, hidden_size, width, seed=2))


# --- quantising -------------------------------------------------------------------------------------------------------


def test_quantising_follows_the_formula() -> None:
    x = torch.tensor([[2.54, -1.27, 0.03, 0.0], [0.5, 1.5, 2.5, 127.0], [0.0, 0.0, 0.0, 0.0]])
    quantized, scale = reference_w8a8.quantize_per_token(x)
    assert quantized[0].tolist() == [127, -64, 2, 0]  # -63.5 -> -64 and 1.5 -> 2: half to even
    assert quantized[1].tolist() == [0, 2, 2, 127]
    assert quantized[2].tolist() == [0, 0, 0, 0]
    assert scale[1].item() == 1.0
    assert scale[2].item() == torch.tensor(reference_w8a8.MIN_AMAX).div(127).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 7), (1, 64), (7, 576), (128, 7168), (3, 200_000)])
def test_cpu_quantising_equals_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = draw(*shape, dtype=dtype)
    x[: shape[0] // 2] *= 1e-14  # below the floor of amax
    for actual, expected in zip(cpu_w8a8.quantize_per_token(x), reference_w8a8.quantize_per_token(x), strict=True):
        assert torch.equal(actual, expected)


@given(st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=20), st.booleans())
@settings(max_examples=300)
def test_no_number_needs_a_clamp(numbers: list[float], has_many: bool) -> None:
    """The largest quotients land on 127 by themselves, which the fast twin relies on, through either of its ways."""
    x = torch.tensor([numbers]).repeat(70_000 // len(numbers) + 1 if has_many else 1, 1)
    quantized, scale = cpu_w8a8.quantize_per_token(x)
    expected, expected_scale = reference_w8a8.quantize_per_token(x)
    assert torch.equal(quantized, expected)
    assert torch.equal(scale, expected_scale)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's word for what is tested
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_shows_in_its_own_output_only(bad: float) -> None:
    x = draw(3, 16)
    clean = linear_w8a8(x, *draw_weight(8, 16))
    x[1, 5] = bad
    out = linear_w8a8(x, *draw_weight(8, 16))
    assert not out[1].isfinite().any()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


# --- linear -----------------------------------------------------------------------------------------------------------


def test_the_reference_multiplies_integers_without_loss() -> None:
    x = torch.full((1, 7168), 127, dtype=torch.int8)
    weight = torch.full((1, 7168), -127, dtype=torch.int8)
    x[0, 0] = weight[0, 0] = 1
    assert reference_w8a8.multiply_int8(x, weight).item() == 1 - 127 * 127 * 7167  # odd, and beyond 24 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 128])
def test_linear_equals_the_integer_loops(shape: tuple[int, int], num_tokens: int, dtype: torch.dtype) -> None:
    x = draw(num_tokens, shape[0], dtype=dtype)
    weight, scale = draw_weight(shape[1], shape[0])
    expected = reference_w8a8.linear_w8a8(x, weight, scale)
    for actual in (cpu_w8a8.linear_w8a8(x, weight, scale), device_w8a8.linear_w8a8(x, weight, scale)):
        assert actual.dtype == dtype
        assert torch.equal(actual, expected)


def test_linear_in_several_pieces_equals_the_integer_loops() -> None:
    x, (weight, scale) = draw(1100, 40), draw_weight(700, 40)
    assert torch.equal(linear_w8a8(x, weight, scale), reference_w8a8.linear_w8a8(x, weight, scale))


@pytest.mark.parametrize("module", [cpu_w8a8, device_w8a8])
@pytest.mark.parametrize("num_tokens", [0, 1, 40])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_rows_quantised_before_give_what_the_integer_loops_give(
    module: ModuleType, num_tokens: int, out_dtype: torch.dtype
) -> None:
    rows = reference_w8a8.quantize_per_token(draw(num_tokens, 64))
    weight = draw_weight(24, 64)
    found = module.linear_w8a8_quantized(*rows, *weight, out_dtype)
    assert found.dtype == out_dtype
    assert torch.equal(found, reference_w8a8.linear_w8a8_quantized(*rows, *weight, out_dtype))


def test_scales_are_multiplied_in_the_order_of_the_specification() -> None:
    """acc * activation_scale first: the other orders differ in the last bit somewhere among these."""
    x, (weight, scale) = draw(64, 96), draw_weight(80, 96)
    quantized, activation_scale = reference_w8a8.quantize_per_token(x)
    products = (quantized.double() @ weight.double().t()).float()
    assert torch.equal(linear_w8a8(x, weight, scale), products * activation_scale * scale.t())
    assert not torch.equal(linear_w8a8(x, weight, scale), products * (activation_scale * scale.t()))


@given(st.integers(0, 2**32), st.lists(st.integers(0, 40), min_size=1, max_size=40), st.sampled_from([16, 1024]))
@settings(max_examples=40)
def test_a_rows_result_does_not_depend_on_the_batch(seed: int, chosen: list[int], num_outputs: int) -> None:
    x = draw(41, 96, seed=seed) * 10 ** draw(41, 1, seed=seed + 1)
    weight, scale = draw_weight(num_outputs, 96)
    assert torch.equal(linear_w8a8(x[chosen], weight, scale), linear_w8a8(x, weight, scale)[chosen])


# --- experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_spare", [0, 3])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("compute", [cpu_w8a8.grouped_mlp_w8a8, device_w8a8.grouped_mlp_w8a8])
def test_grouped_mlp_equals_the_integer_loops(
    compute: GroupedMLP, counts: list[int], num_spare: int, dtype: torch.dtype
) -> None:
    experts = draw_experts(len(counts), 48, 24)
    x = draw(sum(counts) + num_spare, 48, dtype=dtype)
    x[sum(counts) :] = float("nan")
    num_tokens = torch.tensor(counts, dtype=torch.int32)
    out = compute(x, *experts, num_tokens)
    assert out.shape == x.shape and out.dtype == dtype
    expected = reference_w8a8.grouped_mlp_w8a8(x, *experts, num_tokens)
    assert torch.equal(out[: sum(counts)], expected[: sum(counts)])


def test_grouped_mlp_in_pieces_equals_the_integer_loops() -> None:
    experts = draw_experts(4, 300, 600)
    counts = torch.tensor([130, 0, 90, 60], dtype=torch.int32)
    x = draw(280, 300)
    assert torch.equal(grouped_mlp_w8a8(x, *experts, counts), reference_w8a8.grouped_mlp_w8a8(x, *experts, counts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("compute", [cpu_w8a8.grouped_mlp_w8a8_masked, device_w8a8.grouped_mlp_w8a8_masked])
def test_masked_grouped_mlp_equals_the_integer_loops(
    compute: GroupedMLP, counts: list[int], dtype: torch.dtype
) -> None:
    experts = draw_experts(len(counts), 48, 24)
    capacity = max(counts) + 2
    num_tokens = torch.tensor(counts, dtype=torch.int32)
    is_padding = torch.arange(capacity) >= num_tokens.unsqueeze(1)
    x = draw(len(counts), capacity, 48, dtype=dtype).masked_fill(is_padding.unsqueeze(2), float("nan"))
    out = compute(x, *experts, num_tokens)
    assert out.shape == x.shape and out.dtype == dtype
    expected = reference_w8a8.grouped_mlp_w8a8_masked(x, *experts, num_tokens)
    assert torch.equal(out[~is_padding], expected[~is_padding])


@pytest.mark.parametrize("compute", [cpu_w8a8.grouped_mlp_w8a8_masked, device_w8a8.grouped_mlp_w8a8_masked])
def test_masked_grouped_mlp_accepts_no_capacity(compute: GroupedMLP) -> None:
    out = compute(draw(3, 0, 48), *draw_experts(3, 48, 24), torch.zeros(3, dtype=torch.int32))
    assert out.shape == (3, 0, 48)


def test_experts_are_requantised_from_float32() -> None:
    """In bfloat16, rounding between the two products would be another result."""
    experts = draw_experts(1, 256, 64)
    x = draw(16, 256, dtype=torch.bfloat16)
    out = grouped_mlp_w8a8(x, *experts, torch.tensor([16], dtype=torch.int32))
    gate_up = linear_w8a8(x.float(), experts[0][0], experts[1][0])
    hidden = torch.nn.functional.silu(gate_up[:, :64]) * gate_up[:, 64:]
    assert torch.equal(out, linear_w8a8(hidden, experts[2][0], experts[3][0]).bfloat16())
    assert not torch.equal(out, linear_w8a8(hidden.bfloat16(), experts[2][0], experts[3][0]))


@given(st.integers(0, 2**32), st.lists(st.integers(0, 9), min_size=4, max_size=4))
@settings(max_examples=40)
def test_an_experts_rows_do_not_depend_on_each_other(seed: int, counts: list[int]) -> None:
    experts = draw_experts(4, 32, 16)
    x = draw(sum(counts), 32, seed=seed)
    num_tokens = torch.tensor(counts, dtype=torch.int32)
    out = grouped_mlp_w8a8(x, *experts, num_tokens)
    row = 0
    for expert, count in enumerate(counts):
        alone = torch.zeros(4, dtype=torch.int32)
        alone[expert] = 1
        for _ in range(count):
            assert torch.equal(grouped_mlp_w8a8(x[row : row + 1], *experts, alone), out[row : row + 1])
            row += 1


# --- CUDA -------------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (7168, 4096), (2048, 7168)])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 17, 128])
def test_linear_on_a_card_equals_the_cpus(shape: tuple[int, int], num_tokens: int, dtype: torch.dtype) -> None:
    x = draw(num_tokens, shape[0], dtype=dtype)
    weight, scale = draw_weight(shape[1], shape[0])
    out = linear_w8a8(x.cuda(), weight.cuda(), scale.cuda())
    assert torch.equal(out.cpu(), linear_w8a8(x, weight, scale))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
def test_experts_on_a_card_differ_from_the_cpus_by_silu_alone(counts: list[int], is_padded: bool) -> None:
    """A card's exponential differs in its last bit, which may turn a requantised number by one step in 127."""
    experts = draw_experts(len(counts), 512, 128)
    num_tokens = torch.tensor(counts, dtype=torch.int32)
    is_real = torch.arange(max(counts) + 2) < num_tokens.unsqueeze(1)
    padded = draw(len(counts), max(counts) + 2, 512)
    expected = reference_w8a8.grouped_mlp_w8a8_masked(padded, *experts, num_tokens)[is_real]
    on_card = [tensor.cuda() for tensor in (*experts, num_tokens)]
    if is_padded:
        out = device_w8a8.grouped_mlp_w8a8_masked(padded.cuda(), *on_card).cpu()[is_real]
    else:
        out = grouped_mlp_w8a8(padded[is_real].cuda(), *on_card).cpu()
    error = (out - expected).norm() / expected.norm().clamp(min=1e-12)
    assert error < 1e-3
