"""Every fast twin for the CPU against the specification of the same name."""

import pytest
import torch

from argosy.kernels import cpu, reference, reference_experts
from tests.helpers.tolerance import FP32_OP_ATOL


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 128])
@pytest.mark.parametrize("size", [1536, 7168])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(num_tokens: int, size: int, dtype: torch.dtype) -> None:
    x, weight = _random(num_tokens, size).to(dtype), _random(size, seed=1)
    x[:1] *= 1e-4  # so small that eps counts
    fast, slow = cpu.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)
    assert fast.dtype == dtype
    # bfloat16: the float32 results may fall on two sides of a rounding boundary.
    assert torch.allclose(fast.float(), slow.float(), rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_rms_norm_of_a_slice_of_a_wider_tensor() -> None:
    x, weight = _random(5, 24)[:, :16], _random(16, seed=1)
    assert torch.allclose(cpu.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), atol=FP32_OP_ATOL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_mul(dtype: torch.dtype) -> None:
    gate_up = _random(5, 48).to(dtype)
    fast, slow = cpu.silu_mul(gate_up), reference.silu_mul(gate_up)
    assert fast.dtype == dtype
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("has_one_row_of_blocks", [True, False])
@pytest.mark.parametrize("num_keys", [1, 3, 40, 200, 5000])
@pytest.mark.parametrize("num_rows", [0, 1, 50])
def test_select_topk_slots(num_rows: int, num_keys: int, has_one_row_of_blocks: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = (_random(num_rows, num_keys) * 3).round() / 2  # many ties, both signs, -0.0
    num_visible = torch.randint(0, num_keys + 1, (num_rows,), generator=generator)
    num_blocks = -(-num_keys // 16)
    shape = (1 if has_one_row_of_blocks else num_rows, num_blocks)
    block_table = torch.randint(0, 2**31 // 16, shape, generator=generator, dtype=torch.int32)
    for topk in (1, 16, 64):
        fast = cpu.select_topk_slots(scores, num_visible, topk, block_table, 16)
        slow = reference.select_topk_slots(scores, num_visible, topk, block_table, 16)
        assert fast.dtype == slow.dtype
        assert torch.equal(fast, slow)


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 15, 16, 40])
def test_weighted_mlp(num_tokens: int) -> None:
    """Few tokens and many take two orders of the first product; the second's matrix is stored in another order."""
    x, weights = _random(num_tokens, 32), _random(num_tokens, 6, seed=3)
    weights[:, 2] = 0.0
    gate_up, down = _random(6, 48, 32, seed=1), _random(32, 6, 24, seed=2).transpose(0, 1)
    slow = reference_experts.weighted_mlp(x, gate_up, down, weights)
    for order in (down, down.contiguous()):
        fast = cpu.weighted_mlp(x, gate_up, order, weights)
        assert fast.shape == slow.shape
        assert torch.allclose(fast, slow, rtol=1e-5, atol=1e-3)  # sums of 144 numbers around 100


@pytest.mark.parametrize(
    "counts", [[0, 0, 0], [4, 0, 3], [0, 9, 0], [1, 1, 1], [400, 500, 300], [0, 1, 0], [1, 0, 0, 0, 1, 0, 0, 0]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_mlp(counts: list[int], dtype: torch.dtype) -> None:
    """The counts reach the padded product, the busy experts alone, and no expert at all."""
    x = _random(sum(counts), 32).to(dtype)
    gate_up, down = _random(len(counts), 48, 32, seed=1).to(dtype), _random(len(counts), 32, 24, seed=2).to(dtype)
    num_tokens = torch.tensor(counts, dtype=torch.int32)
    fast, slow = cpu.grouped_mlp(x, gate_up, down, num_tokens), reference.grouped_mlp(x, gate_up, down, num_tokens)
    assert torch.allclose(fast.float(), slow.float(), rtol=2**-6 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)


@pytest.mark.parametrize("num_tokens", [0, 1, 9, 300])
@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (8, 4), (8, 8)])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_route_grouped_topk(num_tokens: int, n_group: int, topk_group: int, norm_topk_prob: bool) -> None:
    logits, bias = _random(num_tokens, 32), _random(32, seed=1)  # a bias as large as the scores: some are negative
    settings = {"n_group": n_group, "topk_group": topk_group, "num_experts_per_tok": 4}
    fast_ids, fast = cpu.route_grouped_topk(
        logits, bias, norm_topk_prob=norm_topk_prob, routed_scaling_factor=2.5, **settings
    )
    slow_ids, slow = reference.route_grouped_topk(
        logits, bias, norm_topk_prob=norm_topk_prob, routed_scaling_factor=2.5, **settings
    )
    assert fast_ids.dtype == slow_ids.dtype and torch.equal(fast_ids, slow_ids)
    assert fast.dtype == slow.dtype and torch.allclose(fast, slow, atol=FP32_OP_ATOL)
