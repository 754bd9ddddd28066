"""Linears with float32 results, and the router, on the card's tensor instructions, against their specifications.

On an NVIDIA card, or without one in Triton's interpreter, at small sizes and in float32, which the interpreter
multiplies where a card has bfloat16:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_route_triton.py
"""

import itertools
import os
from types import ModuleType

import pytest
import torch

from argosy.kernels import device_linear, reference

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
X_DTYPE = torch.float32 if IS_INTERPRETED else torch.bfloat16
# (in, out): such that tiles end inside a row, a column and a part of K; on a card also DeepSeek's.
SIZES = ((520, 80),) if IS_INTERPRETED else ((7168, 256), (7168, 64), (520, 80), (7168, 129280))
NUMS_TOKENS = (0, 1, 7, 40, 130) if IS_INTERPRETED else (0, 1, 7, 16, 33, 64, 128, 129, 1100)
# Norm of the error over the norm: the tensor instruction cuts where float32 sums round.
TOLERANCE = 5e-7 if IS_INTERPRETED else 1e-5

pytestmark = pytest.mark.skipif(
    not IS_INTERPRETED and not torch.cuda.is_available(), reason="needs an NVIDIA card, or TRITON_INTERPRET=1"
)


@pytest.fixture
def route() -> ModuleType:
    pytest.importorskip("triton")
    from argosy.kernels.triton import route

    return route


@pytest.fixture
def linear() -> ModuleType:
    pytest.importorskip("triton")
    from argosy.kernels.triton import linear_fp32

    return linear_fp32


# --- linears ----------------------------------------------------------------------------------------------------------


def multiply(linear: ModuleType, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The tiles' way, whatever the dtypes."""
    from argosy.kernels.triton.sum_parts import sum_parts

    return sum_parts(linear.multiply_parts(x, weight), x.shape[0])


def relative_error(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    """In chunks: a head in float64 does not fit."""
    errors, norms = [], []
    for chunk, part in zip(weight.split(8192), out.split(8192, dim=1), strict=True):
        exact = x.double() @ chunk.double().t()
        errors.append((part.double() - exact).norm())
        norms.append(exact.norm())
    return (torch.stack(errors).norm() / torch.stack(norms).norm()).item()


@pytest.mark.parametrize("num_tokens", NUMS_TOKENS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weight_dtype", dict.fromkeys((torch.float32, X_DTYPE)))
def test_linear(linear: ModuleType, weight_dtype: torch.dtype, size: tuple[int, int], num_tokens: int) -> None:
    torch.manual_seed(num_tokens)
    x = torch.randn(num_tokens, size[0], device=DEVICE).to(X_DTYPE)
    weight = torch.randn(size[1], size[0], device=DEVICE).to(weight_dtype)
    out = device_linear.linear_fp32(x, weight)
    assert out.shape == (num_tokens, size[1]) and out.dtype == torch.float32
    if num_tokens:
        assert relative_error(out, x, weight) <= TOLERANCE
        assert relative_error(multiply(linear, x, weight), x, weight) <= TOLERANCE


@pytest.mark.parametrize("num_tokens", (40,) if IS_INTERPRETED else (1, 16, 32, 64, 128, 1000, 4096))
def test_no_bit_of_a_float32_weight_is_lost(linear: ModuleType, num_tokens: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(80, 520, device=DEVICE)
    columns = torch.randint(0, 520, (num_tokens,), device=DEVICE)
    x = torch.nn.functional.one_hot(columns, 520).to(X_DTYPE)
    assert torch.equal(multiply(linear, x, weight), weight.t()[columns])


@pytest.mark.parametrize("name", ("ROUTER_TILES", "NARROW_TILES", "HEAD_TILES"))
def test_every_tile(linear: ModuleType, name: str) -> None:
    """Tokens and features that end inside a tile, whichever it is."""
    torch.manual_seed(1)
    x = torch.randn(3, 136, device=DEVICE).to(X_DTYPE)
    weight = torch.randn(72, 136, device=DEVICE).to(X_DTYPE if name == "HEAD_TILES" else torch.float32)
    for _, tile in getattr(linear, name):
        assert relative_error(linear.multiply_parts(x, weight, tile).sum(dim=0), x, weight) <= TOLERANCE, tile


@pytest.mark.parametrize("num_tokens", (1, 17, 33))
@pytest.mark.parametrize("weight_dtype", dict.fromkeys((torch.float32, X_DTYPE)))
def test_a_token_does_not_see_the_others(linear: ModuleType, weight_dtype: torch.dtype, num_tokens: int) -> None:
    torch.manual_seed(2)
    x = torch.randn(40, 520, device=DEVICE).to(X_DTYPE)
    weight = torch.randn(80, 520, device=DEVICE).to(weight_dtype)
    few, all_tokens = multiply(linear, x[:num_tokens], weight), multiply(linear, x, weight)[:num_tokens]
    # The interpreter multiplies with whatever numpy finds for a size.
    assert torch.allclose(few, all_tokens, atol=1e-4) if IS_INTERPRETED else torch.equal(few, all_tokens)


def test_float32_tokens_leave_a_bfloat16_weight_as_it_is() -> None:
    torch.manual_seed(3)
    x = torch.randn(5, 64, device=DEVICE)
    weight = torch.randn(32, 64, device=DEVICE).bfloat16()
    if IS_INTERPRETED:
        high, middle, low = device_linear.split_in_three(x)
        assert torch.equal(high.float() + (middle.float() + low.float()), x)
    else:
        assert relative_error(device_linear.linear_fp32(x, weight), x, weight) <= TOLERANCE


def test_rows_that_tiles_cannot_load_go_another_way(linear: ModuleType) -> None:
    torch.manual_seed(4)
    rows = torch.randn(5, 64, device=DEVICE)
    assert linear.has_aligned_rows(rows) and linear.has_aligned_rows(rows[:, 4:40])
    assert not any(linear.has_aligned_rows(view) for view in (rows[:, 1:], rows.t(), rows.new_empty(5, 30)))
    x, weight = torch.randn(5, 30, device=DEVICE).to(X_DTYPE), torch.randn(20, 30, device=DEVICE)
    assert relative_error(device_linear.linear_fp32(x, weight), x, weight) <= TOLERANCE


# --- the router -------------------------------------------------------------------------------------------------------

# Experts, groups, groups chosen: one group, DeepSeek's, sizes that are no power of two.
ROUTERS = ((32, 1, 1), (64, 8, 4), (40, 4, 2), (96, 3, 2)) + (() if IS_INTERPRETED else ((256, 8, 4), (160, 8, 3)))
MIN_MARGIN = 1e-5  # above what two float32 sigmoids differ by


def draw_logits(num_tokens: int, bias: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Tokens whose scores all stand clearly apart, so that any correct float32 arithmetic chooses alike."""
    clear = torch.empty(0, bias.shape[0], device=DEVICE)
    while clear.shape[0] < num_tokens:
        logits = torch.randn(2 * num_tokens + 8, bias.shape[0], device=DEVICE) * 3
        biased = logits.double().sigmoid() + bias
        sums = biased.view(logits.shape[0], num_groups, -1).topk(2, dim=-1)[0].sum(dim=-1)
        apart = [(-values.sort(dim=-1, descending=True)[0].diff(dim=-1))[:, :8] for values in (biased, sums)]
        clear = torch.cat((clear, logits[(torch.cat(apart, dim=1) > MIN_MARGIN).all(dim=1)]))
    return clear[:num_tokens]


@pytest.mark.parametrize(
    ("router", "num_tokens"),
    [*itertools.product(ROUTERS, (0, 1, 7)), *itertools.product(ROUTERS[-1:], (130,))]
    if IS_INTERPRETED
    else itertools.product(ROUTERS, (0, 1, 7, 128, 512, 4097)),
)
def test_routes(route: ModuleType, router: tuple[int, int, int], num_tokens: int) -> None:
    num_experts, num_groups, topk_group = router
    torch.manual_seed(num_tokens)
    bias = torch.randn(num_experts, device=DEVICE) * 0.1
    logits = draw_logits(num_tokens, bias, num_groups)
    is_normed = num_tokens != 7
    options = {"n_group": num_groups, "topk_group": topk_group, "num_experts_per_tok": 6 if num_tokens == 1 else 8}
    options |= {"norm_topk_prob": is_normed, "routed_scaling_factor": 2.5}
    topk_ids, topk_weights = route.route_grouped_topk(logits, bias, **options)
    expected_ids, expected_weights = reference.route_grouped_topk(logits, bias, **options)
    assert topk_ids.dtype == torch.int32 and torch.equal(topk_ids, expected_ids)
    assert torch.allclose(topk_weights, expected_weights, rtol=1e-6, atol=0.0)


def test_equal_scores_go_to_the_lowest_id(route: ModuleType) -> None:
    """Groups 1 and 3 hold the best, 0 and 2 tie for the last place; expert 5 beats its equals by its bias."""
    logits = torch.zeros(5, 16, device=DEVICE)
    logits[:, [6, 7, 12, 13]] = 1.0
    bias = torch.zeros(16, device=DEVICE)
    bias[5] = 0.125
    options = {"n_group": 4, "topk_group": 3, "norm_topk_prob": False, "routed_scaling_factor": 1.0}
    topk_ids, topk_weights = route.route_grouped_topk(logits, bias, num_experts_per_tok=8, **options)
    assert topk_ids.tolist() == [[6, 7, 12, 13, 5, 0, 1, 2]] * 5
    assert torch.equal(topk_weights[:, 4:], torch.full((5, 4), 0.5, device=DEVICE))  # without the bias


def test_experts_of_dropped_groups_come_last(route: ModuleType) -> None:
    """More experts a token than the chosen group has; biased scores may be below 0."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 9.0, -9.0]], device=DEVICE)
    bias = torch.tensor([-2.0, -2.0, 0.0, 0.0, -1.0, 0.0], device=DEVICE)
    options = {"n_group": 3, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0}
    topk_ids, _ = route.route_grouped_topk(logits, bias, num_experts_per_tok=4, **options)
    assert topk_ids.tolist() == [[3, 2, 0, 1]]


def test_far_scores_keep_their_precision(route: ModuleType) -> None:
    logits = torch.linspace(-40.0, 40.0, 64, device=DEVICE).repeat(3, 1)
    options = {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0}
    bias = -2 * torch.arange(64.0, device=DEVICE)
    topk_ids, topk_weights = route.route_grouped_topk(logits, bias, num_experts_per_tok=8, **options)
    expected = logits.double().sigmoid().gather(1, topk_ids.long())
    assert topk_ids[0].tolist() == list(range(8))
    assert torch.allclose(topk_weights.double(), expected, rtol=4e-6, atol=0.0)


def test_very_far_scores_are_numbers_and_broken_ones_are_not(route: ModuleType) -> None:
    logits = torch.tensor([[-300.0, -100.0, 100.0, 300.0], [float("nan")] * 4], device=DEVICE)
    options = {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0}
    bias = -2 * torch.arange(4.0, device=DEVICE)
    topk_ids, topk_weights = route.route_grouped_topk(logits[:1], bias, num_experts_per_tok=4, **options)
    assert topk_ids.tolist() == [[0, 1, 2, 3]]
    assert torch.allclose(topk_weights, torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=DEVICE), atol=1e-37)
    options["norm_topk_prob"] = True
    _, topk_weights = route.route_grouped_topk(logits[1:], bias, num_experts_per_tok=2, **options)
    assert not topk_weights.isfinite().any()


@pytest.mark.parametrize("num_tokens", (0, 3) if IS_INTERPRETED else (0, 1, 64, 128, 129, 1000, 4096))
def test_hidden_states_are_routed_as_their_logits(route: ModuleType, linear: ModuleType, num_tokens: int) -> None:
    torch.manual_seed(num_tokens)
    x = torch.randn(num_tokens, 520, device=DEVICE).to(X_DTYPE)
    weight, bias = torch.randn(64, 520, device=DEVICE) * 0.05, torch.randn(64, device=DEVICE) * 0.1
    options = {"n_group": 8, "topk_group": 4, "num_experts_per_tok": 8}
    options |= {"norm_topk_prob": True, "routed_scaling_factor": 2.5}
    # In float32 the interpreter's tokens would go another way.
    is_tiled = num_tokens and IS_INTERPRETED
    parts = linear.multiply_parts(x, weight) if is_tiled else device_linear.linear_fp32_parts(x, weight)
    topk_ids, topk_weights = route.route_parts(parts, bias, **options)
    if num_tokens == 0:
        assert topk_ids.shape == topk_weights.shape == (0, 8)
        return
    expected_ids, expected_weights = route.route_grouped_topk(multiply(linear, x, weight), bias, **options)
    assert torch.equal(topk_ids, expected_ids) and torch.equal(topk_weights, expected_weights)


def test_weights_are_split_without_loss(linear: ModuleType) -> None:
    """Whatever their size and sign: one column of 1 gives every weight back."""
    torch.manual_seed(5)
    weight = torch.randn(64, 256, device=DEVICE) * 10.0 ** torch.randint(-20, 20, (64, 256), device=DEVICE)
    x = torch.eye(256, device=DEVICE)[:33].to(X_DTYPE)
    assert torch.equal(linear.multiply_parts(x, weight).sum(dim=0), weight.t()[:33])
