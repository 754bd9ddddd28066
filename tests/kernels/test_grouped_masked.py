"""Grouped products over rows of which some are nobody's: padding between experts, or spare rows behind the last."""

import pytest
import torch

from argosy.kernels import grouped_gemm, grouped_gemm_loop, grouped_mlp_masked, grouped_mlp_masked_loop
from tests.helpers.tolerance import FP32_OP_ATOL


@pytest.mark.parametrize(
    "counts", [[2, 0, 5, 1], [0, 0, 0, 0], [5, 5, 5, 5], [0, 0, 0, 3]], ids=["mixed", "none", "full", "last only"]
)
def test_masked_mlp_equals_one_expert_after_another(counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, 24, generator=generator)
    gate_up = torch.randn(4, 32, 24, generator=generator) * 0.2
    down = torch.randn(4, 24, 16, generator=generator) * 0.2
    num_tokens = torch.tensor(counts, dtype=torch.int32)
    is_real = (torch.arange(5) < num_tokens.unsqueeze(1)).unsqueeze(2)
    expected = grouped_mlp_masked_loop(x, gate_up, down, num_tokens)
    for padding in (0.0, float("nan")):  # a real row must not feel its expert's padding
        out = grouped_mlp_masked(torch.where(is_real, x, padding), gate_up, down, num_tokens)
        assert out.shape == x.shape
        torch.testing.assert_close(torch.where(is_real, out, 0.0), expected, atol=FP32_OP_ATOL, rtol=0)


def test_masked_mlp_accepts_no_capacity() -> None:
    out = grouped_mlp_masked(torch.zeros(4, 0, 24), torch.ones(4, 32, 24), torch.ones(4, 24, 16), torch.zeros(4).int())
    assert out.shape == (4, 0, 24)


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 0], [4, 4, 0]])
def test_grouped_products_accept_spare_rows_behind_the_last_expert(counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    num_rows = sum(counts)
    x = torch.randn(num_rows + 4, 24, generator=generator)
    x[num_rows:] = float("nan")
    weight = torch.randn(3, 32, 24, generator=generator) * 0.2
    owners = torch.arange(3).repeat_interleave(torch.tensor(counts))
    expected = torch.einsum("mn,mkn->mk", x[:num_rows], weight[owners])
    for product in (grouped_gemm, grouped_gemm_loop):
        out = product(x, weight, torch.tensor(counts, dtype=torch.int32))
        assert out.shape == (num_rows + 4, 32)
        torch.testing.assert_close(out[:num_rows], expected, atol=FP32_OP_ATOL, rtol=0)
