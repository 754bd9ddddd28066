"""The specification, checked against independent arithmetic: definitions written out, or ``transformers``."""

import math

import pytest
import torch
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as oracle

from argosy.cache.rope import RotarySettings, build_rotary_table, yarn_frequencies
from argosy.kernels import (
    RotaryRows,
    RotaryTable,
    attend_absorbed,
    attend_expanded,
    attend_sparse,
    device_linear,
    gather_cache,
    grouped_gemm,
    grouped_gemm_loop,
    grouped_mlp,
    index_scores,
    positions_to_slots,
    reference,
    rms_norm,
    rope_half_split_,
    rope_interleaved_,
    route_grouped_topk,
    select_topk_positions,
    silu_mul,
    write_cache,
)
from tests.helpers.tolerance import FP32_OP_ATOL

V32_ROPE = RotarySettings(
    rotary_dim=64,
    max_positions=4096,
    theta=10000.0,
    factor=40.0,
    original_max_positions=4096,
    beta_fast=32.0,
    beta_slow=1.0,
)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _angles(num_tokens: int, half: int) -> tuple[torch.Tensor, RotaryRows]:
    angles = _random(num_tokens, half, seed=9)
    return angles, RotaryTable(angles.cos(), angles.sin()).at(torch.arange(num_tokens))


def test_yarn_blends_between_pairs_10_and_23_at_the_real_dimensions() -> None:
    frequencies = yarn_frequencies(V32_ROPE)
    base = 10000.0 ** (torch.arange(0, 64, 2, dtype=torch.float64) / -64)
    assert torch.equal(frequencies[:11], base[:11])
    assert torch.allclose(frequencies[23:], base[23:] / 40, rtol=1e-12)
    ramp = (17 - 10) / (23 - 10)
    assert frequencies[17].item() == pytest.approx((base[17] * (1 - ramp) + base[17] / 40 * ramp).item(), rel=1e-12)


def test_rotary_table_holds_cos_and_sin_of_position_times_frequency() -> None:
    table = build_rotary_table(V32_ROPE, torch.device("cpu"))
    frequency = yarn_frequencies(V32_ROPE)[5].item()
    assert table.cos[1000, 5].item() == pytest.approx(math.cos(1000 * frequency), abs=1e-4)
    assert table.sin[1000, 5].item() == pytest.approx(math.sin(1000 * frequency), abs=1e-4)


def test_mla_rope_rotates_neighbours_and_indexer_rope_rotates_halves() -> None:
    """The mistake of the first published code: with the layouts swapped, the model still talks, and scores badly."""
    angles, table = _angles(3, 4)
    x = _random(3, 2, 8)
    turns = torch.polar(torch.ones(3, 1, 4), angles[:, None])
    interleaved = torch.view_as_real(torch.complex(x[..., 0::2], x[..., 1::2]) * turns).flatten(-2)
    halves = torch.complex(x[..., :4], x[..., 4:]) * turns
    for rotate, expected in (
        (rope_interleaved_, interleaved),
        (rope_half_split_, torch.cat((halves.real, halves.imag), -1)),
    ):
        for dtype, atol in ((torch.float32, FP32_OP_ATOL), (torch.bfloat16, 2**-6)):
            wide = torch.zeros(3, 2, 12, dtype=dtype)  # the rotated part is a slice of a wider tensor, as in the model
            wide[..., 2:10] = x
            rotate(wide[..., 2:10], table)
            assert torch.allclose(wide[..., 2:10].float(), expected, atol=atol)
            assert not wide[..., :2].any() and not wide[..., 10:].any()


def test_rms_norm_and_silu_mul_compute_in_float32() -> None:
    x = (_random(5, 64) * 30).bfloat16()
    weight = _random(64, seed=1)
    exact = x.double() * (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    assert torch.allclose(rms_norm(x, weight, 1e-6).double(), exact, rtol=2**-8)
    gate, up = x.double().chunk(2, -1)
    exact = gate / (1 + (-gate).exp()) * up
    assert torch.allclose(silu_mul(x).double(), exact, rtol=2**-7, atol=1e-4)


def test_cache_write_skips_minus_one_and_gather_follows_the_block_table() -> None:
    cache = torch.zeros(4, 2, 3)
    values = torch.arange(1.0, 13.0).view(4, 3)
    write_cache(cache, torch.tensor([6, 3, -1, 2]), values)
    assert torch.equal(cache[3, 0], values[0])
    assert torch.equal(cache[1], values[[3, 1]])
    assert not cache[2].any() and not cache[3, 1].any()
    assert torch.equal(gather_cache(cache, torch.tensor([[1, 3]]), 3)[0], values[[3, 1, 0]])


def test_index_scores_are_weighted_sums_of_relu_over_heads() -> None:
    query, key, weights = _random(2, 3, 4, 8), _random(2, 5, 8, seed=1), _random(2, 3, 4, seed=2)
    for b, t, s in ((0, 0, 0), (1, 2, 4), (1, 0, 3)):
        expected = sum(weights[b, t, h] * max(0.0, float(query[b, t, h] @ key[b, s])) for h in range(4))
        assert index_scores(query, key, weights)[b, t, s].item() == pytest.approx(float(expected), abs=1e-5)


def test_topk_takes_the_lowest_positions_among_equal_scores() -> None:
    scores = torch.tensor([[1.0, 0.0, -0.0, 2.0, 0.0, -1.0, 0.0]])
    chosen = select_topk_positions(scores, torch.tensor([7]), 4)
    assert sorted(chosen[0].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("num_keys", [3, 40, 200])
def test_topk_equals_a_stable_sort_of_the_visible_keys(num_keys: int) -> None:
    scores = (_random(50, num_keys) * 3).round() / 2  # many ties, both signs
    num_visible = torch.randint(1, num_keys + 1, (50,), generator=torch.Generator().manual_seed(3))
    chosen = select_topk_positions(scores, num_visible, 16)
    for row, visible in enumerate(num_visible.tolist()):
        expected = sorted(range(visible), key=lambda s: (-scores[row, s].item(), s))[:16]  # noqa: B023
        assert chosen[row].tolist() == expected + [-1] * (16 - len(expected))


def test_positions_become_slots_through_the_block_table() -> None:
    slots = positions_to_slots(torch.tensor([[0, 5, -1], [4, -1, -1]]), torch.tensor([[7, 2], [3, 9]]), 4)
    assert slots.tolist() == [[28, 9, -1], [36, -1, -1]]


@pytest.mark.parametrize("num_computed", [0, 5])
def test_expanded_attention_is_causal_softmax(num_computed: int) -> None:
    query, key, value = (
        _random(4, 2, 6),
        _random(4 + num_computed, 2, 6, seed=1),
        _random(4 + num_computed, 2, 5, seed=2),
    )
    out = attend_expanded(query, key, value, num_computed, 0.3)
    for t in range(4):
        last = num_computed + t + 1
        weights = torch.einsum("hd,shd->hs", query[t], key[:last]).mul(0.3).softmax(-1)
        assert torch.allclose(out[t], torch.einsum("hs,shd->hd", weights, value[:last]), atol=FP32_OP_ATOL)


def test_sparse_attention_over_all_positions_equals_dense_absorbed() -> None:
    query, cache = _random(3, 4, 12), _random(5, 4, 12, seed=1)
    table = torch.tensor([[2, 4], [1, 3], [3, 2]])
    lengths = torch.tensor([8, 5, 1])
    is_visible = torch.arange(8) < lengths[:, None]
    dense = attend_absorbed(query, gather_cache(cache, table, 8), ~is_visible, 8, 0.2)
    positions = torch.where(is_visible, torch.arange(8), -1).flip(1)  # any order, padded in front
    sparse = attend_sparse(query, cache, positions_to_slots(positions, table, 4), 8, 0.2)
    assert torch.allclose(dense, sparse, atol=FP32_OP_ATOL)


def test_sparse_attention_needs_no_mask_when_every_slot_is_known() -> None:
    query, cache = _random(3, 4, 12), _random(5, 4, 12, seed=1)
    slots = torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(2))
    masked, full = (attend_sparse(query, cache, slots, 8, 0.2, is_full=is_full) for is_full in (False, True))
    assert torch.equal(masked, full)


def _route(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return route_grouped_topk(
        logits,
        bias,
        n_group=8,
        topk_group=4,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )


def test_router_follows_the_published_rule_at_real_size() -> None:
    logits, bias = _random(6, 256), _random(256, seed=1) * 0.1
    topk_ids, topk_weights = _route(logits, bias)
    for t in range(6):
        scores = [1 / (1 + math.exp(-x)) for x in logits[t].tolist()]
        biased = [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        groups = sorted(range(8), key=lambda g: -sum(sorted(biased[32 * g : 32 * g + 32])[-2:]))[:4]
        allowed = [e for e in range(256) if e // 32 in groups]
        best = sorted(allowed, key=lambda e: -biased[e])[:8]
        assert set(topk_ids[t].tolist()) == set(best)
        total = sum(scores[e] for e in best)
        for expert_id, weight in zip(topk_ids[t].tolist(), topk_weights[t].tolist(), strict=True):
            assert weight == pytest.approx(2.5 * scores[expert_id] / total, rel=1e-5)


def test_router_never_leaves_its_groups_even_when_biased_scores_are_negative() -> None:
    """With 0 in place of -inf, a dropped group's experts would beat kept ones whose biased score is below 0."""
    bias = torch.full((256,), -2.0)
    for group in range(4):
        bias[32 * group : 32 * group + 2] = 3.0
    topk_ids, _ = _route(_random(20, 256), bias)
    assert topk_ids.max().item() < 128


def test_router_equals_transformers() -> None:
    config = oracle.DeepseekV32Config(hidden_size=64, n_routed_experts=64, n_group=8, topk_group=4)
    router = oracle.DeepseekV32TopkRouter(config)
    logits, bias = _random(9, 64), _random(64, seed=5)
    router.weight.data.copy_(torch.eye(64))
    router.e_score_correction_bias.copy_(bias)
    _, expected_weights, expected_ids = router(logits)
    topk_ids, topk_weights = _route(logits, bias)
    for ours, theirs in zip(topk_ids, expected_ids, strict=True):
        assert sorted(ours.tolist()) == sorted(theirs.tolist())
    assert torch.allclose(topk_weights.sort()[0], expected_weights.sort()[0], atol=FP32_OP_ATOL)


@pytest.mark.parametrize("counts", [[0, 0, 0], [4, 0, 3], [0, 9, 0], [1, 1, 1], [400, 500, 300], [0, 1, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_mlp_equals_one_expert_after_another(counts: list[int], dtype: torch.dtype) -> None:
    """The counts reach the padded product, the grouped one, and neither."""
    x = _random(sum(counts), 32).to(dtype)
    gate_up, down = _random(3, 48, 32, seed=1).to(dtype), _random(3, 32, 24, seed=2).to(dtype)
    num_tokens = torch.tensor(counts, dtype=torch.int32)
    slow = [silu_mul(part @ w.T) @ d.T for part, w, d in zip(x.split(counts), gate_up, down, strict=True)]
    fast = grouped_mlp(x, gate_up, down, num_tokens)
    assert torch.allclose(
        fast.float(), torch.cat(slow).float(), rtol=2**-6 if dtype == torch.bfloat16 else 1e-5, atol=1e-3
    )


@pytest.mark.parametrize("counts", [[0, 0, 0], [4, 0, 3], [0, 9, 0], [1, 1, 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_gemm_equals_one_expert_after_another(counts: list[int], dtype: torch.dtype) -> None:
    x, weight = _random(sum(counts), 64).to(dtype), _random(3, 32, 64, seed=1).to(dtype)
    num_tokens = torch.tensor(counts, dtype=torch.int32)
    fast, slow = grouped_gemm(x, weight, num_tokens), grouped_gemm_loop(x, weight, num_tokens)
    assert fast.shape == (sum(counts), 32)
    assert torch.allclose(fast.float(), slow.float(), rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_working_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With little scratch memory, index scores and sparse attention take a few tokens at a time; here 2 and 3 of 7."""
    index_q, index_k, weights = _random(1, 7, 4, 8), _random(1, 5, 8, seed=1), _random(1, 7, 4, seed=2)
    query, cache = _random(7, 2, 12, seed=3), _random(4, 4, 12, seed=4)
    slots = torch.randint(-1, 16, (7, 6), generator=torch.Generator().manual_seed(5))
    slots[:, 0] = 3
    scores, attended = index_scores(index_q, index_k, weights), attend_sparse(query, cache, slots, 8, 0.2)
    monkeypatch.setattr(reference, "_SCRATCH_BYTES", 4 * 4 * 5 * 2)
    assert torch.allclose(index_scores(index_q, index_k, weights), scores, atol=FP32_OP_ATOL)
    monkeypatch.setattr(reference, "_SCRATCH_BYTES", 6 * 12 * 4 * 3)
    assert torch.allclose(attend_sparse(query, cache, slots, 8, 0.2), attended, atol=FP32_OP_ATOL)


def test_every_operation_accepts_zero_tokens() -> None:
    none = torch.empty(0, 8)
    assert rms_norm(none, torch.ones(8), 1e-6).shape == (0, 8)
    assert silu_mul(none).shape == (0, 4)
    table = RotaryTable(torch.empty(5, 2), torch.empty(5, 2)).at(torch.empty(0, dtype=torch.int64))
    rope_interleaved_(torch.empty(0, 3, 4), table)
    rope_half_split_(torch.empty(0, 3, 4), table)
    assert index_scores(torch.empty(1, 0, 2, 4), torch.empty(1, 5, 4), torch.empty(1, 0, 2)).shape == (1, 0, 5)
    assert select_topk_positions(torch.empty(0, 5), torch.empty(0), 3).shape == (0, 3)
    topk_ids, topk_weights = _route(torch.empty(0, 256), torch.zeros(256))
    assert topk_ids.shape == topk_weights.shape == (0, 8)
    for is_hidden in (torch.empty(0, 3) > 0, None):
        assert attend_absorbed(torch.empty(0, 2, 6), torch.empty(0, 3, 6), is_hidden, 4, 1.0).shape == (0, 2, 4)
    cache = torch.zeros(2, 2, 8)
    write_cache(cache, torch.empty(0, dtype=torch.int64), none)
    assert not cache.any()


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_products_by_head_written_into_place_are_the_plain_ones(num_tokens: int) -> None:
    """The slices that a layer hands over are strided."""
    torch.manual_seed(num_tokens)
    query, kv_b = torch.randn(num_tokens, 3, 12), torch.randn(3, 16, 6)
    q_nope, q_rope, w_uk, w_uv = query[..., :8], query[..., 8:], kv_b[:, :8], kv_b[:, 8:].transpose(1, 2)
    found = torch.cat((torch.empty(num_tokens, 3, 6), q_rope), dim=-1)
    expected = found.clone()
    device_linear.absorb_into(q_nope, w_uk, found)
    reference.absorb_into(q_nope, w_uk, expected)
    assert torch.equal(found, expected)
    expected = torch.einsum("tij,ijk->tik", q_nope, w_uk)
    assert torch.allclose(found[..., :6], expected, atol=FP32_OP_ATOL) and torch.equal(found[..., 6:], q_rope)
    attended = torch.randn(num_tokens, 3, 6)
    values = device_linear.linear_by_head(attended, w_uv)
    assert values.is_contiguous() and torch.equal(values, reference.linear_by_head(attended, w_uv))
    assert torch.allclose(values, torch.einsum("tij,ijk->tik", attended, w_uv), atol=FP32_OP_ATOL)
