"""Dispatch and combine through shared memory against collectives, all ranks in this process, in Triton's interpreter.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_one_sided_triton.py

Ranks take turns, each exchange at once, so this shows places, flags and turns; not that cards see writes in order.
"""

import os
from dataclasses import dataclass, replace

import pytest
import torch

from argosy.distributed.communicator import Communicator
from argosy.distributed.ep_dispatch import build_dispatcher, build_expert_tables
from argosy.distributed.ep_message import pack_tokens, unpack
from argosy.distributed.ep_payload import PayloadKind, build_payload
from argosy.distributed.ep_row_ops import TorchRowOps
from argosy.distributed.ep_symmetric import (
    SymmetricAreas,
    SymmetricExchange,
    SymmetricLink,
    SymmetricTransport,
    area_words,
    buffer_words,
    build_areas,
)
from argosy.distributed.ep_types import ExchangePlan, QuantizedRows, ReceivedRows
from argosy.distributed.flight_recorder import FlightRecorder
from argosy.distributed.pending import Pending
from tests.helpers.ep_cases import Case, Routing, decoded, poison_unowned_rows

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
ROUTINGS: tuple[Routing, ...] = ("random", "one_expert", "one_rank", "some_none", "all_none")
UNEVEN = Case(num_tokens=(3, 0, 7, 1), num_experts=8, num_experts_per_tok=3, routing="random")
MAX_TOKENS = 8
NUM_LOOKS_S = 1e-7  # the interpreter counts a look as a nanosecond


class NoTwin:
    """Nothing may be left to collectives."""

    def start(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, plan: ExchangePlan
    ) -> Pending[ReceivedRows]:
        raise AssertionError(f"{x.shape[0]} tokens went to the twin")


@dataclass(frozen=True)
class Rank:
    ep: Communicator
    areas: SymmetricAreas
    transport: SymmetricTransport


def build_ranks(world: int, row_bytes: int) -> list[Rank]:
    from argosy.kernels.triton.one_sided import TritonOneSidedOps

    num_words = buffer_words(world, area_words(world, MAX_TOKENS, row_bytes))
    buffers = [torch.zeros(num_words, dtype=torch.int32) for _ in range(world)]
    addresses = [buffer.data_ptr() for buffer in buffers]
    ranks = []
    for rank, buffer in enumerate(buffers):
        # What nobody puts there is NaN, which is -1 as an id.
        buffer[buffer_words(world, 0) :] = -1
        ep = Communicator(
            "ep", tuple(range(world)), rank, group=None, host_group=None, recorder=FlightRecorder(capacity=99)
        )
        areas = build_areas(rank, buffer, addresses, NUM_LOOKS_S)
        ranks.append(Rank(ep, areas, SymmetricTransport(areas, TritonOneSidedOps())))
    return ranks


def row_bytes(case: Case) -> int:
    return 4 * case.hidden_size + 8 * case.num_experts_per_tok + 256


def exchange_by_hand(
    case: Case, payload: PayloadKind, max_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the twin's all-gather brings to every rank: x, ids, weights of all rows."""
    codec = build_payload(payload)
    tokens = [pack_tokens(*case.tokens(rank), codec) for rank in range(case.world)]
    message = torch.cat([TorchRowOps().pack_rows(each, max_tokens) for each in tokens])
    return unpack(message, tokens[0], codec)


ROW_CASES = [(4, routing, "model") for routing in ROUTINGS] + [(2, "some_none", "int8"), (3, "random", "fp8")]
ROW_CASES += [(16, "some_none", "model")]


@pytest.mark.parametrize(("world", "routing", "payload"), ROW_CASES)
def test_rows_are_those_of_an_all_gather(world: int, routing: Routing, payload: PayloadKind) -> None:
    """Payloads of tokens that have no expert here stay what they were: nobody's. Turn after turn, with other sizes."""
    num_tokens = tuple((3 * rank + 2) % (5 if world < 16 else 2) for rank in range(world))  # one brings none
    case = Case(num_tokens, 2 * world, min(3, 2 * world), routing, hidden_size=1100 if world < 16 else 40)
    ranks = build_ranks(world, row_bytes(case))
    for turn in range(3 if world < 16 else 1):
        case = replace(case, seed=turn, num_tokens=num_tokens[turn:] + num_tokens[:turn])
        max_tokens = max(case.num_tokens) + turn % 2
        flights = []
        for each in ranks:
            link = SymmetricLink(each.ep, each.transport, build_expert_tables(case.num_experts, each.ep)[1])
            exchange = SymmetricExchange(link, build_payload(payload), NoTwin())
            flights.append(exchange.start(*case.tokens(each.ep.rank), ExchangePlan("low_latency", max_tokens)))
        x, topk_ids, topk_weights = exchange_by_hand(case, payload, max_tokens)
        for rank, flight in enumerate(flights):
            received = flight.wait()
            assert torch.equal(received.topk_ids, topk_ids)
            assert torch.equal(received.topk_weights, topk_weights)
            owners = torch.where(topk_ids >= 0, topk_ids // case.num_local_experts, -1)
            is_mine = (owners == rank).any(dim=1)
            assert isinstance(received.x, torch.Tensor)
            assert torch.equal(received.x[is_mine], x[is_mine])
            if turn == 0 and payload == "model":
                assert received.x[~is_mine].isnan().all()


def route_trips(ranks: list[Rank], case: Case, payload: PayloadKind, layout: str) -> list[torch.Tensor]:
    """Through experts whose output is NaN where it is nobody's."""
    plan = ExchangePlan("low_latency", max(case.num_tokens))
    dispatchers = [
        build_dispatcher(
            each.ep,
            case.num_experts,
            payload=payload,
            low_latency_layout=layout,
            symmetric=each.transport,  # type: ignore[arg-type]
        )
        for each in ranks
    ]
    flights = [d.start_dispatch(*case.tokens(rank), plan) for rank, d in enumerate(dispatchers)]
    dispatched = [flight.wait() for flight in flights]
    returns = []
    for rank, (dispatcher, each) in enumerate(zip(dispatchers, dispatched, strict=True)):
        expert_out = poison_unowned_rows(case.local_experts(rank)(each), each)
        returns.append(dispatcher.start_combine(expert_out, each.handle))
    return [flight.wait() for flight in returns]


TRIP_CASES = [(world, routing, "model") for routing in ROUTINGS for world in (2, 3)] + [(16, "random", "model")]


@pytest.mark.parametrize(("world", "routing", "payload"), [*TRIP_CASES, (5, "some_none", "int8")])
def test_round_trips_equal_one_rank(world: int, routing: Routing, payload: PayloadKind) -> None:
    num_tokens = tuple((5 * rank + 3) % (7 if world < 16 else 2) for rank in range(world))
    case = Case(num_tokens, 2 * world, min(4, 2 * world), routing, hidden_size=40)
    ranks = build_ranks(world, row_bytes(case))
    codec = build_payload(payload)
    for turn in range(3 if world < 16 else 1):
        case = replace(case, seed=turn)
        for rank, out in enumerate(route_trips(ranks, case, payload, "sorted")):
            x, topk_ids, topk_weights = case.tokens(rank)
            expected = case.expected(decoded(codec, x), topk_ids, topk_weights)
            torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("has_scale_of_blocks", [False, True])
def test_quantised_rows_travel_as_they_are(has_scale_of_blocks: bool) -> None:
    """Scales of blocks lie as columns, as the kernel that quantises leaves them."""
    case = replace(UNEVEN, hidden_size=1152, routing="some_none")
    world, max_tokens, num_scales = case.world, max(case.num_tokens), 9 if has_scale_of_blocks else 1
    ranks = build_ranks(world, row_bytes(case))
    generator = torch.Generator().manual_seed(1)
    rows, flights = [], []
    for each in ranks:
        x, *routes = case.tokens(each.ep.rank)
        numbers = torch.randint(-127, 128, x.shape, dtype=torch.int8, generator=generator)
        scale = torch.rand(num_scales, x.shape[0], generator=generator).t()
        rows.append(QuantizedRows(numbers, scale, torch.bfloat16))
        link = SymmetricLink(each.ep, each.transport, build_expert_tables(case.num_experts, each.ep)[1])
        exchange = SymmetricExchange(link, build_payload("model"), NoTwin())
        flights.append(exchange.start(rows[-1], *routes, ExchangePlan("low_latency", max_tokens)))
    for rank, flight in enumerate(flights):
        received = flight.wait()
        assert isinstance(received.x, QuantizedRows)
        owners = torch.where(received.topk_ids >= 0, received.topk_ids // case.num_local_experts, -1)
        is_mine = (owners == rank).any(dim=1).view(world, max_tokens)
        for source, sent in enumerate(rows):
            count = case.num_tokens[source]
            mine = is_mine[source, :count]
            for got, given in ((received.x.numbers, sent.numbers), (received.x.scale, sent.scale)):
                assert torch.equal(got.view(world, max_tokens, -1)[source, :count][mine], given[mine])


@pytest.mark.parametrize("has_addend", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_are_the_twins_bit_by_bit(dtype: torch.dtype, has_addend: bool) -> None:
    """An all-to-all, and sums in float32 and rank order; parts that are 0 there are not sent here."""
    case = replace(UNEVEN, hidden_size=1100, routing="some_none")
    world, max_tokens = case.world, max(case.num_tokens)
    ranks = build_ranks(world, row_bytes(case))
    plan = ExchangePlan("low_latency", max_tokens)
    flights, partial_sums = [], []
    for each in ranks:
        link = SymmetricLink(each.ep, each.transport, build_expert_tables(case.num_experts, each.ep)[1])
        exchange = SymmetricExchange(link, build_payload("model"), NoTwin())
        x, topk_ids, topk_weights = case.tokens(each.ep.rank)
        flights.append(exchange.start(x.to(dtype), topk_ids, topk_weights, plan))
    returns, addends = [], []
    for rank, flight in enumerate(flights):
        received = flight.wait()
        has_expert = (received.topk_ids // case.num_local_experts == rank) & (received.topk_ids >= 0)
        sums = torch.randn(world * max_tokens, case.hidden_size).to(dtype)
        partial_sums.append(sums.masked_fill(~has_expert.any(dim=1, keepdim=True), 0.0))
        addends.append(torch.randn(case.num_tokens[rank], case.hidden_size).to(dtype) if has_addend else None)
        returns.append(received.return_path.start(partial_sums[-1], addends[-1]))
    for rank, flight in enumerate(returns):
        mine = torch.stack([sums.view(world, max_tokens, -1)[rank] for sums in partial_sums])[
            :, : case.num_tokens[rank]
        ]
        expected = torch.zeros(mine.shape[1:])
        for part in mine:
            expected += part.float()
        addend = addends[rank]
        out = flight.wait()
        assert out.dtype == (torch.float32 if addend is None else dtype)
        if addend is not None:
            expected += addend.float()
        if dtype == torch.bfloat16 and addend is not None:  # the interpreter cuts where a card rounds
            torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=0.0)
        else:
            assert torch.equal(out, expected)


def test_two_batches_are_in_flight_at_once() -> None:
    cases = (UNEVEN, replace(UNEVEN, num_tokens=(1, 5, 0, 2), routing="one_rank", seed=3))
    ranks = build_ranks(4, row_bytes(UNEVEN))
    dispatchers = [build_dispatcher(each.ep, UNEVEN.num_experts, symmetric=each.transport) for each in ranks]
    for _ in range(2):
        plans = [ExchangePlan("low_latency", max(case.num_tokens)) for case in cases]
        flights = [
            [d.start_dispatch(*case.tokens(rank), plan) for rank, d in enumerate(dispatchers)]
            for case, plan in zip(cases, plans, strict=True)
        ]
        returns = []
        for case, each in zip(cases, flights, strict=True):
            dispatched = [flight.wait() for flight in each]
            returns.append(
                [
                    d.start_combine(poison_unowned_rows(case.local_experts(rank)(tokens), tokens), tokens.handle)
                    for rank, (d, tokens) in enumerate(zip(dispatchers, dispatched, strict=True))
                ]
            )
        for case, each in zip(cases, returns, strict=True):
            for rank, flight in enumerate(each):
                expected = case.expected(*case.tokens(rank))
                torch.testing.assert_close(flight.wait(), expected, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_goes_to_the_twin() -> None:
    ranks = build_ranks(2, row_bytes(UNEVEN))
    link = SymmetricLink(ranks[0].ep, ranks[0].transport, build_expert_tables(8, ranks[0].ep)[1])
    exchange = SymmetricExchange(link, build_payload("model"), NoTwin())
    for max_tokens in (0, 50 * MAX_TOKENS):
        with pytest.raises(AssertionError, match="went to the twin"):
            exchange.start(*UNEVEN.tokens(1), ExchangePlan("low_latency", max_tokens))


def test_a_rank_that_never_comes_is_named_at_the_next_exchange() -> None:
    case = replace(UNEVEN, num_tokens=(2, 2, 2))
    case = replace(case, num_experts=6)
    ranks = build_ranks(3, row_bytes(case))
    link = SymmetricLink(ranks[0].ep, ranks[0].transport, build_expert_tables(6, ranks[0].ep)[1])
    others = SymmetricLink(ranks[2].ep, ranks[2].transport, link.expert_owner)
    plan = ExchangePlan("low_latency", 2)
    SymmetricExchange(others, build_payload("model"), NoTwin()).start(*case.tokens(2), plan)
    exchange = SymmetricExchange(link, build_payload("model"), NoTwin())
    exchange.start(*case.tokens(0), plan).wait()
    with pytest.raises(
        RuntimeError, match=r"put_tokens #2 on axis ep failed: rank 1 of axis ep put nothing into rank 0"
    ):
        exchange.start(*case.tokens(0), plan)
