"""Rows that are quantised once, and products that are joined: the same numbers as each by itself, on a CPU."""

import pytest
import torch
from torch import nn

from argosy.distributed.ep_arrange import sum_rows_in_torch
from argosy.distributed.ep_local import FusedRows, LocalDispatcher
from argosy.distributed.ep_row_ops import TorchRowOps
from argosy.distributed.ep_types import QuantizedRows
from argosy.layers.linear import JoinedLinears, group_linears, share_preparation
from argosy.layers.norm import RMSNorm
from argosy.platforms import NoSideLane
from argosy.quantization.fp8_linear import FP8BlockExperts, FP8BlockLinear
from argosy.quantization.plain_scheme import PlainLinear
from argosy.quantization.preparation import FP8Preparation, Int8Preparation, NoPreparation, Preparation
from argosy.quantization.w8a8_grouped_gemm import W8A8Experts
from argosy.quantization.w8a8_linear import W8A8Linear

PREPARATIONS = (NoPreparation(), Int8Preparation(), FP8Preparation(True), FP8Preparation(False))
HIDDEN_SIZE, WIDTH, NUM_EXPERTS, K = 256, 128, 6, 2


def fill(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.dtype == torch.int8:
            parameter.data.random_(-127, 128, generator=generator)
        else:
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator) * 0.02)


def assert_same(found: object, expected: object) -> None:
    for ours, theirs in zip(parts_of(found), parts_of(expected), strict=True):
        assert torch.equal(ours, theirs)


def parts_of(prepared: object) -> list[torch.Tensor]:
    if isinstance(prepared, QuantizedRows):
        return [prepared.numbers.float(), prepared.scale]
    assert isinstance(prepared, torch.Tensor)
    return [prepared]


@pytest.mark.parametrize("preparation", PREPARATIONS, ids=str)
@pytest.mark.parametrize("has_delta", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_a_norm_prepares_what_is_prepared_of_its_output(
    preparation: Preparation, has_delta: bool, num_tokens: int
) -> None:
    norm = RMSNorm(HIDDEN_SIZE, 1e-6)
    fill(norm)
    x, delta = torch.randn(2, num_tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(2)).unbind(0)
    normed = norm.prepare(x, delta if has_delta else None, preparation)
    expected, total = norm.add(x, delta) if has_delta else (norm(x), x)
    assert torch.equal(normed.rows, expected) and torch.equal(normed.total, total)
    assert_same(normed.prepared, preparation.prepare(expected))


def test_linears_of_one_format_share_their_preparation() -> None:
    int8, plain = W8A8Linear(HIDDEN_SIZE, 8), PlainLinear(HIDDEN_SIZE, 8, torch.float32)
    fp8, other_fp8 = (FP8BlockLinear(HIDDEN_SIZE, 128, has_ue8m0_scales=flag) for flag in (True, False))
    assert share_preparation(int8, W8A8Linear(HIDDEN_SIZE, 4)) == Int8Preparation()
    assert share_preparation(int8, plain) == share_preparation(fp8, other_fp8) == NoPreparation()


@pytest.mark.parametrize("kind", ["plain", "w8a8", "fp8_block"])
def test_joined_linears_give_the_outputs_of_each(kind: str) -> None:
    def build(size: int) -> PlainLinear | W8A8Linear | FP8BlockLinear:
        if kind == "plain":
            return PlainLinear(HIDDEN_SIZE, size, torch.float32)
        if kind == "w8a8":
            return W8A8Linear(HIDDEN_SIZE, size)
        return FP8BlockLinear(HIDDEN_SIZE, size, has_ue8m0_scales=True)

    linears = [build(size) for size in (256, 128, 72)]
    group = group_linears(*linears, is_joined=True)
    assert isinstance(group, JoinedLinears)
    for linear in linears:  # loaded later, into the shared memory
        fill(linear)
    x = torch.randn(5, HIDDEN_SIZE, generator=torch.Generator().manual_seed(3))
    prepared = share_preparation(*linears).prepare(x)
    for out, linear in zip(group(prepared), linears, strict=True):
        assert torch.allclose(out, linear(x), rtol=1e-6, atol=1e-6)
    assert [set(linear.state_dict()) for linear in linears] == [set(build(4).state_dict())] * 3


def test_linears_that_cannot_be_joined_are_asked_one_by_one() -> None:
    ragged = [FP8BlockLinear(HIDDEN_SIZE, size, has_ue8m0_scales=True) for size in (72, 128)]
    mixed = [W8A8Linear(HIDDEN_SIZE, 8), PlainLinear(HIDDEN_SIZE, 4, torch.float32)]
    for linears in (ragged, mixed):
        assert not isinstance(group_linears(*linears, is_joined=True), JoinedLinears)


@pytest.mark.parametrize("kind", ["w8a8", "fp8_block"])
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_experts_take_rows_that_were_quantised_before_they_were_sorted(kind: str, num_tokens: int) -> None:
    experts: W8A8Experts | FP8BlockExperts = (
        W8A8Experts(NUM_EXPERTS, HIDDEN_SIZE, WIDTH)
        if kind == "w8a8"
        else FP8BlockExperts(NUM_EXPERTS, HIDDEN_SIZE, WIDTH, has_ue8m0_scales=True)
    )
    fill(experts)
    generator = torch.Generator().manual_seed(num_tokens)
    x, shared = torch.randn(2, num_tokens, HIDDEN_SIZE, generator=generator).unbind(0)
    ids = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).topk(K)[1].to(torch.int32)
    weights = torch.rand(num_tokens, K, generator=generator)
    dispatcher = LocalDispatcher(NUM_EXPERTS, fused=FusedRows(TorchRowOps(), sum_rows_in_torch))
    assert dispatcher.takes_quantized
    outs = []
    for rows in (x, experts.preparation.prepare(x)):
        dispatched = dispatcher.start_dispatch(rows, ids, weights).wait()
        outs.append(dispatcher.combine_onto(experts(dispatched), dispatched.handle, shared))
    assert torch.equal(*outs) and outs[0].shape == (num_tokens, HIDDEN_SIZE)
    plain = dispatcher.start_dispatch(x, ids, weights).wait()
    combined = dispatcher.start_combine(experts(plain), plain.handle).wait()
    assert torch.equal(outs[0], (combined + shared).to(x.dtype))


@pytest.mark.parametrize("is_wanted_first", [False, True])
def test_without_a_lane_work_is_done_once_when_it_is_asked_for(is_wanted_first: bool) -> None:
    done: list[int] = []
    work = NoSideLane().start(lambda: done.append(1))
    assert done == []
    if is_wanted_first:
        work.compute()
        assert done == [1]
    work.wait()
    work.wait()
    assert done == [1]
