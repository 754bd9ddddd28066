"""INT8 products on the tensor cores against their specification: bit by bit, but for silu's last bits.

On an NVIDIA card, or without one in Triton's interpreter, at small sizes:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_w8a8_triton.py
"""

import os
from types import ModuleType

import pytest
import torch

from argosy.kernels import reference_w8a8

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
# The interpreter cuts bfloat16 where a card rounds.
DTYPES = (torch.float32,) if IS_INTERPRETED else (torch.float32, torch.bfloat16)
# (in, out) of linears: DeepSeek's on a card; here such that tiles end inside a row, a column and a block of K.
SIZES = ((80, 48),) if IS_INTERPRETED else ((7168, 1536), (1536, 24576), (16384, 7168), (7168, 576), (2048, 7168))
NUMS_ROWS = (0, 1, 7, 40) if IS_INTERPRETED else (0, 1, 7, 33, 128, 200, 4096)

pytestmark = pytest.mark.skipif(
    not IS_INTERPRETED and not torch.cuda.is_available(), reason="needs an NVIDIA card, or TRITON_INTERPRET=1"
)


@pytest.fixture
def fused() -> ModuleType:
    pytest.importorskip("triton")
    from argosy.kernels.triton import w8a8

    return w8a8


def draw(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 matrices [..., N, K], scales [..., N, 1]."""
    weight = torch.randint(-127, 128, shape, dtype=torch.int8, device=DEVICE)
    return weight, torch.rand(*shape[:-1], 1, device=DEVICE) * 1e-3 + 1e-6


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The specification's product is exact; so is this one, and fast: sums stay below 2^53."""
    return x.double() @ weight.double().t()


@pytest.fixture(autouse=True)
def fast_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_w8a8, "multiply_int8", multiply)


@pytest.mark.parametrize("num_rows", NUMS_ROWS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(fused: ModuleType, dtype: torch.dtype, size: tuple[int, int], num_rows: int) -> None:
    torch.manual_seed(num_rows)
    x = (torch.randn(num_rows, size[0], device=DEVICE) * 3).to(dtype)
    weight, scale = draw(size[1], size[0])
    assert torch.equal(fused.linear_w8a8(x, weight, scale), reference_w8a8.linear_w8a8(x, weight, scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_quantised_as_specified(fused: ModuleType, dtype: torch.dtype) -> None:
    """Zeros, the smallest numbers, numbers in the middle between two steps, and strided rows."""
    torch.manual_seed(0)
    wide = torch.randn(9, 200, device=DEVICE)
    wide[1] = 0.0
    wide[2] *= 1e-30
    wide[3] = torch.arange(200, device=DEVICE) + 0.5
    wide[3, 0] = 127.0 * 2
    x = wide.to(dtype)[:, :150]
    quantized, scale = fused.quantize_per_token(x)
    expected, expected_scale = reference_w8a8.quantize_per_token(x)
    assert torch.equal(quantized, expected) and torch.equal(scale, expected_scale)


# Rows of each expert: none at all, one, few, a tile and one more; 8 rows behind the last are nobody's.
COUNTS = (
    ((3, 0, 1, 17, 0, 33), (0, 0, 0, 0, 0, 0)) if IS_INTERPRETED else ((3, 0, 1, 129, 300, 0), (700, 0, 650, 0, 0, 1))
)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(fused: ModuleType, dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    torch.manual_seed(len(counts))
    hidden_size, width = (48, 32) if IS_INTERPRETED else (7168, 2048)
    gate_up, down = draw(len(counts), 2 * width, hidden_size), draw(len(counts), hidden_size, width)
    num_tokens = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    real = sum(counts)
    x = torch.randn(real + 8, hidden_size, device=DEVICE).to(dtype)
    x[real:] = float("nan")
    out = fused.grouped_mlp_w8a8(x, *gate_up, *down, num_tokens)[:real]
    expected = reference_w8a8.grouped_mlp_w8a8(x, *gate_up, *down, num_tokens)[:real]
    assert out.isfinite().all()
    # A last bit of silu now and then moves a number by one step of 127.
    assert (out.float() - expected.float()).norm() <= 2e-3 * expected.float().norm()


def test_padded_experts(fused: ModuleType) -> None:
    torch.manual_seed(1)
    gate_up, down = draw(3, 64, 48), draw(3, 48, 32)
    num_tokens = torch.tensor([5, 0, 2], dtype=torch.int32, device=DEVICE)
    x = torch.randn(3, 5, 48, device=DEVICE)
    out = fused.grouped_mlp_w8a8_masked(x, *gate_up, *down, num_tokens)
    expected = reference_w8a8.grouped_mlp_w8a8_masked(x, *gate_up, *down, num_tokens)
    for expert, count in enumerate(num_tokens.tolist()):
        assert torch.allclose(out[expert, :count], expected[expert, :count], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("in_features", (16, 24))
def test_rows_that_tiles_cannot_load_go_another_way(fused: ModuleType, in_features: int) -> None:
    torch.manual_seed(2)
    weight, scale = draw(32, in_features)
    x = torch.randn(5, in_features, device=DEVICE)
    assert torch.equal(fused.linear_w8a8(x, weight, scale), reference_w8a8.linear_w8a8(x, weight, scale))
