"""The head, the router and the index weights, routing, and sorting tokens for experts that are all on this card."""

from collections.abc import Callable, Iterator

import torch

from argosy.distributed.ep_local import sort_by_expert
from argosy.kernels import device_linear, reference
from argosy.kernels.triton import route
from argosy.kernels.triton.arrange_rows import arrange_sorted
from argosy.kernels.triton.linear_fp32 import Tile, multiply_parts
from argosy.kernels.triton.sum_parts import sum_parts
from benchmarks.gpu.measure import Case, relative_error

HIDDEN_SIZE, VOCAB_SIZE, NUM_EXPERTS, INDEX_HEADS, IDS_PER_TOKEN = 7168, 129280, 256, 64, 8
NUMS_TOKENS = (1, 16, 64, 128, 4096)
HEAD_NUMS_TOKENS = (1, 16, 32, 64, 128, 256)
OPTIONS = {"n_group": 8, "topk_group": 4, "num_experts_per_tok": IDS_PER_TOKEN}
OPTIONS |= {"norm_topk_prob": True, "routed_scaling_factor": 2.5}
# Other tiles for prefill: one that sums blocks of K and reads more, and one that has fewer parts to add; and for a
# decode step: as it is, and half and twice as many programs.
OTHER_TILES = {
    "128x128 tile": Tile(128, 128, 64, 3584, 4, 8),
    "64x128 tile": Tile(64, 128, 64, 1792, 4, 4),
    "decode tile": Tile(64, 64, 64, 256, 5, 4),
    "decode tile of 128": Tile(64, 64, 64, 128, 2, 4),
    "decode tile of 512": Tile(64, 64, 64, 512, 5, 4),
}
TOLERANCE = 1e-5  # of the norm: the tensor instruction cuts where float32 sums round
MAX_CHOICES_APART = 1e-3  # of all: near ties


def cases() -> Iterator[Case]:
    for num_tokens in HEAD_NUMS_TOKENS:
        yield head_case(num_tokens)
    for name, out_features in (("router", NUM_EXPERTS), ("index weights", INDEX_HEADS)):
        for num_tokens in NUMS_TOKENS:
            yield fp32_weight_case(name, num_tokens, out_features)
    for num_tokens in NUMS_TOKENS:
        yield route_case(num_tokens)
    for num_tokens in NUMS_TOKENS:
        yield route_hidden_case(num_tokens)
    for num_tokens in NUMS_TOKENS:
        yield sort_case(num_tokens)


def head_case(num_tokens: int) -> Case:
    x, weight = draw_hidden(num_tokens), draw_weight(VOCAB_SIZE).bfloat16()
    num_bytes = x.nbytes + weight.nbytes + 4 * num_tokens * VOCAB_SIZE
    return Case(
        name="head bf16 x bf16",
        rows=num_tokens,
        run=lambda: device_linear.linear_fp32(x, weight),
        check=lambda: check_linear(x, weight),
        num_ops=2 * num_tokens * VOCAB_SIZE * HIDDEN_SIZE,
        num_bytes=num_bytes,
        alternatives={
            "reference": lambda: reference.linear_fp32(x, weight),
            "mm out_dtype": lambda: torch.mm(x, weight.t(), out_dtype=torch.float32),
            "mm bf16, float()": lambda: torch.mm(x, weight.t()).float(),
            "own kernel": lambda: multiply_parts(x, weight),
        },
    )


def fp32_weight_case(name: str, num_tokens: int, out_features: int) -> Case:
    x, weight = draw_hidden(num_tokens), draw_weight(out_features)
    others: dict[str, Callable[[], object]] = {
        "reference": lambda: reference.linear_fp32(x, weight),
        "products alone": lambda: multiply_parts(x, weight),
    }
    for label, tile in OTHER_TILES.items():
        others[label] = lambda tile=tile: sum_parts(multiply_parts(x, weight, tile), num_tokens)
    return Case(
        name=f"{name} bf16 x f32",
        rows=num_tokens,
        run=lambda: device_linear.linear_fp32(x, weight),
        check=lambda: check_linear(x, weight),
        num_ops=3 * 2 * num_tokens * out_features * HIDDEN_SIZE,  # a float32 weight is three of bfloat16
        num_bytes=x.nbytes + weight.nbytes + 4 * num_tokens * out_features,
        alternatives=others,
    )


def route_case(num_tokens: int) -> Case:
    logits, bias = torch.randn(num_tokens, NUM_EXPERTS, device="cuda"), draw_bias()
    expected = reference.route_grouped_topk(logits, bias, **OPTIONS)
    return Case(
        name="route logits",
        rows=num_tokens,
        run=lambda: route.route_grouped_topk(logits, bias, **OPTIONS),
        check=lambda: check_choice(route.route_grouped_topk(logits, bias, **OPTIONS), expected),
        num_ops=0,
        num_bytes=logits.nbytes + bias.nbytes + 8 * num_tokens * IDS_PER_TOKEN,
        alternatives={"reference": lambda: reference.route_grouped_topk(logits, bias, **OPTIONS)},
    )


def route_hidden_case(num_tokens: int) -> Case:
    x, weight, bias = draw_hidden(num_tokens), draw_weight(NUM_EXPERTS), draw_bias()
    expected = reference.route_grouped_topk(reference.linear_fp32(x, weight), bias, **OPTIONS)
    return Case(
        name="hidden -> routes",
        rows=num_tokens,
        run=lambda: route_hidden(x, weight, bias),
        check=lambda: check_choice(route_hidden(x, weight, bias), expected),
        num_ops=3 * 2 * num_tokens * NUM_EXPERTS * HIDDEN_SIZE,
        num_bytes=x.nbytes + weight.nbytes + 8 * num_tokens * IDS_PER_TOKEN,
        alternatives={
            "three kernels": lambda: route.route_grouped_topk(device_linear.linear_fp32(x, weight), bias, **OPTIONS),
            "reference": lambda: reference.route_grouped_topk(reference.linear_fp32(x, weight), bias, **OPTIONS),
        },
    )


def sort_case(num_tokens: int) -> Case:
    x = draw_hidden(num_tokens)
    topk_ids = torch.rand(num_tokens, NUM_EXPERTS, device="cuda").topk(IDS_PER_TOKEN, dim=1)[1].to(torch.int32)
    expert_map = torch.arange(NUM_EXPERTS + 1, dtype=torch.int32, device="cuda")

    def sort() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        order, inverse, counts = sort_by_expert(topk_ids.flatten(), NUM_EXPERTS)
        return x.index_select(0, order // IDS_PER_TOKEN), counts, inverse

    def check() -> None:
        rows, counts, row_ids = arrange_sorted(x, topk_ids, expert_map, NUM_EXPERTS, None)
        expected_rows, expected_counts, inverse = sort()
        assert torch.equal(rows, expected_rows) and torch.equal(counts, expected_counts)
        assert torch.equal(row_ids.flatten(), inverse)

    return Case(
        name="sort tokens by expert",
        rows=num_tokens,
        run=lambda: arrange_sorted(x, topk_ids, expert_map, NUM_EXPERTS, None),
        check=check,
        num_ops=0,
        num_bytes=x.nbytes * (1 + IDS_PER_TOKEN),
        alternatives={"torch sort, gather": sort},
    )


def route_hidden(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return route.route_parts(device_linear.linear_fp32_parts(x, weight), bias, **OPTIONS)


def draw_hidden(num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, HIDDEN_SIZE, device="cuda").bfloat16()


def draw_weight(out_features: int) -> torch.Tensor:
    return torch.randn(out_features, HIDDEN_SIZE, device="cuda") * HIDDEN_SIZE**-0.5


def draw_bias() -> torch.Tensor:
    return torch.randn(NUM_EXPERTS, device="cuda") * 0.05


def check_linear(x: torch.Tensor, weight: torch.Tensor) -> None:
    out = device_linear.linear_fp32(x, weight)
    for part, chunk in zip(out.split(8192, dim=1), weight.split(8192), strict=True):
        error = relative_error(part, x.double() @ chunk.double().t())
        assert error <= TOLERANCE, error


def check_choice(routes: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    is_same = routes[0] == expected[0]
    assert is_same.double().mean() >= 1 - MAX_CHOICES_APART
    # A near tie that turned changes its token's sum of weights, hence all of them.
    is_same_token = is_same.all(dim=1)
    assert torch.allclose(routes[1][is_same_token], expected[1][is_same_token], rtol=1e-4)
