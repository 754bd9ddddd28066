"""Dispatch -> experts -> combine on 2 to 16 ranks against every expert on every token, written out on one."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from argosy.distributed.communicator import Communicator
from argosy.distributed.ep_arrange import ExpertLayout
from argosy.distributed.ep_dispatch import MAX_PADDED_ROWS, build_dispatcher
from argosy.distributed.ep_local import LocalDispatcher
from argosy.distributed.ep_payload import PayloadKind, build_payload
from argosy.distributed.ep_row_ops import TorchRowOps
from argosy.distributed.ep_types import EXCHANGE_MODES, ExchangeMode, ExchangePlan
from argosy.distributed.expert_load import ExpertLoad
from argosy.quantization.fp8_linear import FP8BlockExperts
from argosy.quantization.w8a8_grouped_gemm import W8A8Experts
from tests.helpers.ep_cases import Case, Routing, decoded, poison_unowned_rows
from tests.helpers.rank_pool import PoolContext, RankPool
from tests.helpers.tolerance import FP32_OP_ATOL

ROUTINGS: tuple[Routing, ...] = ("random", "one_expert", "one_rank", "some_none", "all_none")
LAYOUTS: tuple[ExpertLayout, ...] = ("padded", "sorted")
UNEVEN = Case(num_tokens=(3, 0, 7, 1), num_experts=8, num_experts_per_tok=3, routing="random")


def route_trip(
    ep: Communicator, case: Case, mode: ExchangeMode, layout: ExpertLayout, payload: PayloadKind, dtype: torch.dtype
) -> torch.Tensor:
    x, topk_ids, topk_weights = case.tokens(ep.rank)
    dispatcher = build_dispatcher(ep, case.num_experts, payload=payload, low_latency_layout=layout)
    plan = ExchangePlan(mode, max(case.num_tokens))
    dispatched = dispatcher.start_dispatch(x.to(dtype), topk_ids, topk_weights, plan).wait()
    assert dispatched.is_padded == (mode == "low_latency" and layout == "padded")
    expert_out = case.local_experts(ep.rank).to(dtype)(dispatched)
    expert_out = poison_unowned_rows(expert_out, dispatched)
    out = dispatcher.start_combine(expert_out, dispatched.handle).wait()
    assert out.dtype == torch.float32
    addend = x.to(dtype).flip(0)
    assert torch.equal(dispatcher.combine_onto(expert_out, dispatched.handle, addend), (out + addend).to(dtype))
    return out


def all_forms(
    context: PoolContext, case: Case, payload: PayloadKind = "model", dtype: torch.dtype = torch.float32
) -> dict[tuple[str, str], torch.Tensor]:
    ep = context.communicator()
    forms = [("low_latency", "padded"), *((mode, "sorted") for mode in EXCHANGE_MODES)]
    return {form: route_trip(ep, case, *form, payload, dtype) for form in forms}


def check_all_forms(rank_pool: RankPool, case: Case, payload: PayloadKind = "model") -> None:
    codec = build_payload(payload)
    for rank, outputs in enumerate(rank_pool.run(all_forms, case, payload, world=case.world)):
        x, topk_ids, topk_weights = case.tokens(rank)
        expected = case.expected(decoded(codec, x), topk_ids, topk_weights)
        for form, out in outputs.items():
            torch.testing.assert_close(
                out, expected, atol=FP32_OP_ATOL, rtol=1e-4, msg=lambda text, f=form: f"{f}: {text}"
            )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    world = draw(st.sampled_from((2, 3, 4, 5, 8, 16)))
    num_local_experts = draw(st.integers(1, 4 if world < 8 else 2))
    num_experts = world * num_local_experts
    return Case(
        num_tokens=tuple(draw(st.lists(st.integers(0, 6), min_size=world, max_size=world))),
        num_experts=num_experts,
        num_experts_per_tok=draw(st.integers(1, min(8, num_experts))),
        routing=draw(st.sampled_from(ROUTINGS)),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=40)
@example(case=Case((5, 4), 4, 4, "random"))
@example(case=Case((0, 0, 0), 6, 2, "random"))
@example(case=replace(UNEVEN, routing="one_rank"))
@example(case=Case((2,) * 15 + (0,), 16, 8, "some_none"))
@given(case=cases())
def test_all_exchanges_equal_one_rank(rank_pool: RankPool, case: Case) -> None:
    check_all_forms(rank_pool, case)


@pytest.mark.parametrize("payload", ["int8", "fp8"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_quantised_payload_equals_one_rank_on_the_decoded_tokens(
    rank_pool: RankPool, payload: PayloadKind, routing: Routing
) -> None:
    check_all_forms(rank_pool, replace(UNEVEN, routing=routing, hidden_size=136), payload)


def test_bf16_stays_close_to_float32(rank_pool: RankPool) -> None:
    case = replace(UNEVEN, hidden_size=64)
    for rank, outputs in enumerate(rank_pool.run(all_forms, case, "model", torch.bfloat16, world=case.world)):
        expected = case.expected(*case.tokens(rank)).flatten()
        for form, out in outputs.items():
            error = (out.flatten() - expected).norm() / expected.norm().clamp(min=1e-9)
            assert error < 0.02, (rank, form, error)


def quantised_trips(context: PoolContext, case: Case, kind: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """By mode: what comes home of rows that were quantised before they travelled, and of rows that were not."""
    ep = context.communicator()
    x, topk_ids, topk_weights = case.tokens(ep.rank)
    shape = case.num_local_experts, case.hidden_size, case.hidden_size
    experts = W8A8Experts(*shape) if kind == "w8a8" else FP8BlockExperts(*shape, has_ue8m0_scales=True)
    generator = torch.Generator().manual_seed(ep.rank)
    for parameter in experts.parameters():
        if parameter.dtype == torch.int8:
            parameter.data.random_(-127, 128, generator=generator)
        else:
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator) * 0.02)
    build = partial(build_dispatcher, ep, case.num_experts)
    dispatcher = build(low_latency_layout="sorted", row_ops=TorchRowOps())
    assert dispatcher.takes_quantized
    assert not build(low_latency_layout="sorted", row_ops=TorchRowOps(), payload="int8").takes_quantized
    assert not build(low_latency_layout="padded", row_ops=TorchRowOps()).takes_quantized
    trips = []
    for mode in EXCHANGE_MODES:
        homes = []
        for rows in (experts.preparation.prepare(x), x):
            plan = ExchangePlan(mode, max(case.num_tokens))
            dispatched = dispatcher.start_dispatch(rows, topk_ids, topk_weights, plan).wait()
            assert (dispatched.quantized is None) == (rows is x)
            out = poison_unowned_rows(experts(dispatched), dispatched)
            homes.append(dispatcher.start_combine(out, dispatched.handle).wait())
        trips.append((homes[0], homes[1]))
    return trips


@pytest.mark.parametrize("kind", ["w8a8", "fp8_block"])
def test_rows_quantised_for_the_experts_travel_as_they_are(rank_pool: RankPool, kind: str) -> None:
    case = replace(UNEVEN, routing="some_none", hidden_size=256)
    for trips in rank_pool.run(quantised_trips, case, kind, world=case.world):
        for quantised, plain in trips:
            assert torch.equal(quantised, plain)


def received_tokens(context: PoolContext, case: Case, mode: ExchangeMode) -> tuple[dict[str, int], dict[str, int], int]:
    """Bytes of dispatch, bytes of combine, rows the experts got."""
    ep = context.communicator()
    x, topk_ids, topk_weights = case.tokens(ep.rank)
    dispatcher = build_dispatcher(ep, case.num_experts, low_latency_layout="sorted")
    plan = ExchangePlan(mode, max(case.num_tokens))
    dispatched = dispatcher.start_dispatch(x, topk_ids, topk_weights, plan).wait()
    dispatch_bytes = dict(ep.bytes_sent)
    ep.reset_counters()
    dispatcher.start_combine(dispatched.hidden_states, dispatched.handle).wait()
    return dispatch_bytes, dict(ep.bytes_sent), dispatched.hidden_states.shape[0]


ROW_BYTES = 24 * 4 + 3 * 4 + 3 * 4 + 8  # UNEVEN's hidden state, ids, weights; to whole 16 bytes
SUM_BYTES = 24 * 4


def test_high_throughput_sends_a_token_once_to_each_rank_that_needs_it(rank_pool: RankPool) -> None:
    case = replace(UNEVEN, routing="some_none")
    rows = torch.zeros(4, 4, dtype=torch.int64)  # [source, destination]
    entries = torch.zeros(4, dtype=torch.int64)
    for source in range(4):
        for ids in case.tokens(source)[1].tolist():
            owners = [expert // case.num_local_experts for expert in ids if expert >= 0]
            for owner in owners:
                entries[owner] += 1
            for owner in set(owners):
                rows[source, owner] += 1
    for rank, (dispatch, combine, num_rows) in enumerate(
        rank_pool.run(received_tokens, case, "high_throughput", world=4)
    ):
        sent = int(rows[rank].sum() - rows[rank, rank]) * ROW_BYTES
        assert dispatch == {"all_to_all": 3 * 8, "all_to_all_v": sent}  # two int32 counts a peer, then the rows
        assert combine == {"all_to_all_v": int(rows[:, rank].sum() - rows[rank, rank]) * SUM_BYTES}
        assert num_rows == entries[rank]


def test_fixed_exchanges_send_the_agreed_number_of_rows(rank_pool: RankPool) -> None:
    most = max(UNEVEN.num_tokens)
    for mode, there, back in (
        ("low_latency", "all_gather", "all_to_all"),
        ("all_gather", "all_gather", "reduce_scatter"),
    ):
        for dispatch, combine, _ in rank_pool.run(received_tokens, UNEVEN, mode, world=4):
            assert dispatch == {there: 3 * most * ROW_BYTES}
            assert combine == {back: 3 * most * SUM_BYTES}


def padded_or_not(context: PoolContext, case: Case, max_tokens_per_rank: int) -> tuple[bool, torch.Tensor]:
    ep = context.communicator()
    dispatcher = build_dispatcher(ep, case.num_experts, low_latency_layout="padded")
    plan = ExchangePlan("low_latency", max_tokens_per_rank)
    dispatched = dispatcher.start_dispatch(*case.tokens(ep.rank), plan).wait()
    expert_out = poison_unowned_rows(case.local_experts(ep.rank)(dispatched), dispatched)
    return dispatched.is_padded, dispatcher.start_combine(expert_out, dispatched.handle).wait()


def test_rows_are_padded_only_while_they_are_few(rank_pool: RankPool) -> None:
    case = Case((3, 7), num_experts=8, num_experts_per_tok=3, routing="random")
    expected = [case.expected(*case.tokens(rank)) for rank in range(2)]
    for max_tokens_per_rank in (MAX_PADDED_ROWS // 2, MAX_PADDED_ROWS // 2 + 1):
        for rank, (is_padded, out) in enumerate(rank_pool.run(padded_or_not, case, max_tokens_per_rank, world=2)):
            assert is_padded == (2 * max_tokens_per_rank <= MAX_PADDED_ROWS)
            torch.testing.assert_close(out, expected[rank], atol=FP32_OP_ATOL, rtol=1e-4)


def two_at_once(context: PoolContext, cases: tuple[Case, Case], mode: ExchangeMode) -> list[torch.Tensor]:
    ep = context.communicator()
    dispatcher = build_dispatcher(ep, cases[0].num_experts)
    flights = [
        dispatcher.start_dispatch(*case.tokens(ep.rank), ExchangePlan(mode, max(case.num_tokens))) for case in cases
    ]
    dispatched = [flight.wait() for flight in flights]
    expert_out = [case.local_experts(ep.rank)(each) for case, each in zip(cases, dispatched, strict=True)]
    returns = [dispatcher.start_combine(out, each.handle) for out, each in zip(expert_out, dispatched, strict=True)]
    return [flight.wait() for flight in returns]


@pytest.mark.parametrize("mode", EXCHANGE_MODES)
def test_a_dispatcher_carries_two_batches_at_once(rank_pool: RankPool, mode: ExchangeMode) -> None:
    """It keeps buffers from one dispatch to the next, but nothing in them."""
    cases = (UNEVEN, replace(UNEVEN, num_tokens=(1, 5, 0, 2), routing="one_rank", seed=3))
    for rank, outputs in enumerate(rank_pool.run(two_at_once, cases, mode, world=4)):
        for case, out in zip(cases, outputs, strict=True):
            expected = case.expected(*case.tokens(rank))
            torch.testing.assert_close(out, expected, atol=FP32_OP_ATOL, rtol=1e-4)


def too_many_tokens(context: PoolContext, mode: ExchangeMode) -> None:
    dispatcher = build_dispatcher(context.communicator(), UNEVEN.num_experts)
    tokens = UNEVEN.tokens(2)
    with pytest.raises(RuntimeError, match=r"7 tokens on this rank.*at most 6"):
        dispatcher.start_dispatch(*tokens, ExchangePlan(mode, 6))


@pytest.mark.parametrize("mode", ["low_latency", "all_gather"])
def test_more_tokens_than_agreed_are_refused(rank_pool: RankPool, mode: ExchangeMode) -> None:
    rank_pool.run(too_many_tokens, mode, world=2)


def expert_load(context: PoolContext) -> object:
    ep = context.communicator()
    load = ExpertLoad(num_moe_layers=2, num_local_experts=UNEVEN.num_local_experts)
    dispatcher = build_dispatcher(ep, UNEVEN.num_experts)
    for mode in EXCHANGE_MODES:
        plan = ExchangePlan(mode, max(UNEVEN.num_tokens))
        dispatched = dispatcher.start_dispatch(*UNEVEN.tokens(ep.rank), plan).wait()
        load.layer(1).record(dispatched.num_tokens_per_expert)
    report = load.report(ep)
    load.reset()
    assert load.local_counts() == [[0, 0], [0, 0]]
    return report


def test_expert_load_counts_every_entry_on_every_rank(rank_pool: RankPool) -> None:
    ids = torch.cat([UNEVEN.tokens(rank)[1] for rank in range(4)]).flatten()
    expected = tuple((3 * torch.bincount(ids, minlength=8)).tolist())  # three modes
    for idle, busy in rank_pool.run(expert_load, world=4):
        assert busy.tokens_per_expert == expected
        assert busy.tokens_per_rank == tuple(expected[i] + expected[i + 1] for i in range(0, 8, 2))
        assert busy.expert_imbalance == pytest.approx(max(expected) * 8 / sum(expected))
        assert busy.rank_imbalance == pytest.approx(max(busy.tokens_per_rank) * 4 / sum(expected))
        assert (idle.expert_imbalance, idle.rank_imbalance) == (1.0, 1.0)


def indivisible_experts(context: PoolContext) -> None:
    with pytest.raises(ValueError, match=r"n_routed_experts \(8\).*ep_size \(3\); set --ep to 1, 2, 4, 8"):
        build_dispatcher(context.communicator(), 8)


def test_experts_that_cannot_be_divided_are_refused(rank_pool: RankPool) -> None:
    rank_pool.run(indivisible_experts, world=3)


def test_one_rank_gets_the_local_dispatcher() -> None:
    assert isinstance(build_dispatcher(Communicator.local("ep"), 8), LocalDispatcher)
