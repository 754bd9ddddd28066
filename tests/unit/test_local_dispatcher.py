"""One rank's dispatcher: sorted rows and the whole form give the same sums, and both leave out what goes nowhere."""

import pytest
import torch

from argosy.distributed.ep_arrange import sum_rows_in_torch
from argosy.distributed.ep_local import MIN_WHOLE_TOKENS, FusedRows, LocalDispatcher
from argosy.distributed.ep_row_ops import TorchRowOps
from argosy.kernels import grouped_mlp, weighted_mlp

NUM_EXPERTS, K, HIDDEN_SIZE, WIDTH = 8, 3, 32, 24


def compute(dispatcher: LocalDispatcher, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    gate_up = torch.randn(NUM_EXPERTS, 2 * WIDTH, HIDDEN_SIZE, generator=generator) * 0.2
    down = torch.randn(NUM_EXPERTS, HIDDEN_SIZE, WIDTH, generator=generator) * 0.2
    dispatched = dispatcher.start_dispatch(x, ids, weights).wait()
    expected_counts = [int((ids == expert).sum()) for expert in range(NUM_EXPERTS)]
    if dispatched.expert_weights is None:
        out = grouped_mlp(dispatched.hidden_states, gate_up, down, dispatched.num_tokens_per_expert)
    else:
        assert dispatched.num_tokens_per_expert.tolist() == expected_counts
        out = weighted_mlp(dispatched.hidden_states, gate_up, down, dispatched.expert_weights)
    return dispatcher.start_combine(out, dispatched.handle).wait()


def draw(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator)
    ids = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).topk(K)[1].to(torch.int32)
    ids[torch.rand(num_tokens, K, generator=generator) < 0.2] = -1
    ids[-1:] = -1
    return x, ids, torch.rand(num_tokens, K, generator=generator)


@pytest.mark.parametrize("num_tokens", [MIN_WHOLE_TOKENS, 9, 20])
def test_the_whole_form_gives_the_sums_of_sorted_rows(num_tokens: int) -> None:
    tokens = draw(num_tokens)
    whole = LocalDispatcher(NUM_EXPERTS, max_whole_tokens=20)
    assert whole.start_dispatch(*tokens).wait().expert_weights is not None
    found, expected = compute(whole, *tokens), compute(LocalDispatcher(NUM_EXPERTS), *tokens)
    assert found.dtype == expected.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(found[-1], torch.zeros(HIDDEN_SIZE))


@pytest.mark.parametrize("num_tokens", [0, 1, MIN_WHOLE_TOKENS - 1, 21])
def test_rows_are_sorted_where_the_whole_form_does_not_pay(num_tokens: int) -> None:
    tokens = draw(num_tokens)
    dispatcher = LocalDispatcher(NUM_EXPERTS, max_whole_tokens=20)
    assert dispatcher.start_dispatch(*tokens).wait().expert_weights is None
    assert compute(dispatcher, *tokens).shape == (num_tokens, HIDDEN_SIZE)


@pytest.mark.parametrize("num_tokens", [0, 1, 20])
def test_rows_arranged_as_received_ones_give_the_same_sums(num_tokens: int) -> None:
    """What a card does with fused kernels, here with their plain twins."""
    tokens = draw(num_tokens)
    arranged = LocalDispatcher(NUM_EXPERTS, fused=FusedRows(TorchRowOps(), sum_rows_in_torch))
    found, expected = compute(arranged, *tokens), compute(LocalDispatcher(NUM_EXPERTS), *tokens)
    assert found.dtype == expected.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-5)
    dispatched = arranged.start_dispatch(*tokens).wait()
    assert int(dispatched.num_tokens_per_expert.sum()) == int((tokens[1] >= 0).sum())


def test_many_experts_are_never_taken_whole() -> None:
    x, ids, weights = draw(9)
    dispatched = LocalDispatcher(256, max_whole_tokens=20).start_dispatch(x, ids, weights).wait()
    assert dispatched.expert_weights is None
