"""Expert exchanges through shared memory between cards of one node, against collectives on the same cards.

    pytest -m cuda tests/dist/test_ep_symmetric_cuda.py

Every test starts a process a card. What one process can show is in ``tests/kernels/test_one_sided_triton.py``.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from argosy.distributed.communicator import Communicator
from argosy.distributed.ep_arrange import sum_rows_in_torch
from argosy.distributed.ep_dispatch import build_dispatcher
from argosy.distributed.ep_payload import PayloadKind
from argosy.distributed.ep_symmetric import SymmetricTransport, connect_areas
from argosy.distributed.ep_types import DispatchedTokens, ExchangePlan, TokenDispatcher
from argosy.distributed.layout import ParallelLayout
from argosy.distributed.mesh import ParallelMesh
from argosy.distributed.rendezvous import StoreAddress, connect_store, host_store
from argosy.kernels.select import select_one_sided_ops, select_row_ops, select_sum_rows
from argosy.platforms import select_platform
from tests.helpers.ep_cases import Case, Routing

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA cards"),
]
WORLD, MAX_TOKENS, HIDDEN_SIZE, TIMEOUT_S = 2, 128, 7168, 60.0
WAIT_LIMIT_S = 2.0
CASE = Case(num_tokens=(64, 64), num_experts=32, num_experts_per_tok=8, routing="random", hidden_size=HIDDEN_SIZE)
SIZES = ((64, 64), (1, 1), (0, 3), (128, 0), (7, 128))
ROUTINGS: tuple[Routing, ...] = ("random", "one_expert", "one_rank", "some_none", "all_none")
RankTest = Callable[[Communicator, torch.device], None]


def run_on_cards(test: RankTest) -> None:
    store = host_store()
    torch.multiprocessing.spawn(start_rank, (store.address, test), nprocs=WORLD)


def start_rank(rank: int, address: StoreAddress, test: RankTest) -> None:
    platform = select_platform("cuda")
    platform.make_current(rank)
    store = connect_store(address, TIMEOUT_S)
    layout = ParallelLayout(dp_size=WORLD)
    ep = ParallelMesh.build(layout, rank, store=store, platform=platform, timeout_s=TIMEOUT_S).ep
    test(ep, platform.device(rank))
    torch.cuda.synchronize()
    dist.destroy_process_group()


def connect(ep: Communicator, device: torch.device, limit_s: float = TIMEOUT_S) -> SymmetricTransport:
    areas = connect_areas(ep, device, MAX_TOKENS, 2 * HIDDEN_SIZE + 256, limit_s)
    return SymmetricTransport(areas, select_one_sided_ops("cuda"))


def build(
    ep: Communicator, device: torch.device, transport: SymmetricTransport | None, payload: PayloadKind = "model"
) -> TokenDispatcher:
    with device:
        return build_dispatcher(
            ep,
            CASE.num_experts,
            payload=payload,
            low_latency_layout="sorted",
            sum_rows=select_sum_rows("cuda", sum_rows_in_torch),
            row_ops=select_row_ops("cuda"),
            symmetric=transport,
        )


def draw(case: Case, rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, topk_ids, topk_weights = case.tokens(rank)
    return x.to(device, torch.bfloat16), topk_ids.to(device), topk_weights.to(device)


def apply_experts(dispatched: DispatchedTokens) -> torch.Tensor:
    """Each expert multiplies by its number; rows of nobody become NaN."""
    rows, counts = dispatched.hidden_states, dispatched.num_tokens_per_expert
    ends = counts.cumsum(0)
    places = torch.arange(rows.shape[0], device=rows.device)
    experts = torch.searchsorted(ends, places, right=True)
    out = rows * (experts + 1).unsqueeze(1).to(rows.dtype)
    return out.masked_fill((places >= ends[-1]).unsqueeze(1), float("nan"))


def round_trip(
    dispatcher: TokenDispatcher, tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor], max_tokens: int
) -> torch.Tensor:
    dispatched = dispatcher.start_dispatch(*tokens, ExchangePlan("low_latency", max_tokens)).wait()
    return dispatcher.start_combine(apply_experts(dispatched), dispatched.handle).wait()


def check_against_the_twin(ep: Communicator, device: torch.device) -> None:
    transport = connect(ep, device)
    for payload in ("model", "int8", "fp8"):
        fast, slow = build(ep, device, transport, payload), build(ep, device, None, payload)
        for seed, num_tokens in enumerate(SIZES):
            for routing in ROUTINGS:
                case = replace(CASE, num_tokens=num_tokens, routing=routing, seed=seed)
                tokens, most = draw(case, ep.rank, device), max(num_tokens)
                out = round_trip(fast, tokens, most)
                assert torch.equal(out, round_trip(slow, tokens, most)), (payload, num_tokens, routing)
    assert ep.bytes_sent["put_tokens"] > 0 and ep.bytes_sent["put_sums"] > 0


def test_sums_are_the_collectives_bit_by_bit() -> None:
    run_on_cards(check_against_the_twin)


def check_many_turns(ep: Communicator, device: torch.device) -> None:
    """Without a wait of the host, and with ranks that are late by turns: what is overwritten, or read, too early shows."""
    dispatcher, twin = build(ep, device, connect(ep, device)), build(ep, device, None)
    cases = [replace(CASE, seed=seed, num_tokens=num_tokens) for seed, num_tokens in enumerate(2 * SIZES)]
    drawn = [(draw(case, ep.rank, device), max(case.num_tokens)) for case in cases]
    expected = [round_trip(twin, *each) for each in drawn]
    num_wrong = torch.zeros(len(cases), dtype=torch.int32, device=device)
    for turn in range(400):
        i = turn % len(cases)
        if turn % 7 == ep.rank:
            torch.cuda._sleep(200_000)
        num_wrong[i] += (round_trip(dispatcher, *drawn[i]) != expected[i]).any()
    assert num_wrong.tolist() == [0] * len(cases)


def test_hundreds_of_turns_overwrite_nothing() -> None:
    run_on_cards(check_many_turns)


def check_graph(ep: Communicator, device: torch.device) -> None:
    fast, slow = build(ep, device, connect(ep, device)), build(ep, device, None)
    tokens = draw(CASE, ep.rank, device)
    layers = 3  # an odd number: the next replay takes the areas in the same order, not in turn
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        round_trip(fast, tokens, 64)
    torch.cuda.synchronize()
    ep.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"), ep.taping():
        outs = [round_trip(fast, tokens, 64) for _ in range(layers)]
    for seed in range(20):
        for static, drawn in zip(tokens, draw(replace(CASE, seed=seed), ep.rank, device), strict=True):
            static.copy_(drawn)
        if seed % 2 == ep.rank:
            torch.cuda._sleep(500_000)
        for _ in range(10):
            graph.replay()
        outs_now = [out.clone() for out in outs]
        eager = round_trip(fast, tokens, 64)
        expected = round_trip(slow, tokens, 64)
        assert all(torch.equal(out, expected) for out in (*outs_now, eager)), seed


def test_a_recording_replays_turns() -> None:
    run_on_cards(check_graph)


def check_missing(ep: Communicator, device: torch.device) -> None:
    dispatcher = build(ep, device, connect(ep, device, WAIT_LIMIT_S))
    tokens = draw(CASE, ep.rank, device)
    round_trip(dispatcher, tokens, 64)
    torch.cuda.synchronize()
    if ep.rank == 0:
        started_s = time.monotonic()
        round_trip(dispatcher, tokens, 64)  # two waits, of which the second knows already
        torch.cuda.synchronize()
        waited_s = time.monotonic() - started_s
        assert WAIT_LIMIT_S * 0.9 < waited_s < WAIT_LIMIT_S * 2, waited_s
        with pytest.raises(
            RuntimeError, match=r"on axis ep failed: rank 1 of axis ep put nothing into rank 0"
        ):
            round_trip(dispatcher, tokens, 64)
    ep.barrier()


def test_a_peer_that_never_comes_is_named_within_the_limit() -> None:
    run_on_cards(check_missing)
