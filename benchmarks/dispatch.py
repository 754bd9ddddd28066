"""What dispatch and combine cost between ranks, against a plain all-to-all of the same bytes on the same group.

    python benchmarks/dispatch.py --device cuda --world 2 [--graphs] [--payload int8] [--symmetric]
    python benchmarks/dispatch.py --device cpu --world 2 --hidden-size 256 --num-experts 32 --tokens 1,8,64

It starts its own ranks. Timed are the exchange alone (packing, flight, reading; adding what came home), the whole
dispatch and combine (with sorting for the experts and summing theirs), and how much of a dispatch the shared experts
hide; rows of the mode that ``--ep-mode auto`` takes at their size are marked, and repeated at the end.
``--symmetric`` adds low_latency through shared memory, for cards of one node. It measures no routed experts. Invariant:
before a shape is timed, a round trip through experts that multiply by known numbers must give the known answer;
otherwise the program ends without numbers.

Shape letters: T tokens of each rank, D hidden, E experts, K experts per token, M rows for the experts, e local experts.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.multiprocessing
from dispatch_report import Cost, print_auto, print_cost, print_head

from argosy.cli.code_version import read_commit
from argosy.distributed.communicator import Communicator
from argosy.distributed.dp_coord import (
    ExchangePolicy,
    StepProposal,
    agree,
    choose_ll_max_tokens_per_rank,
    expected_ranks_visited,
)
from argosy.distributed.ep_arrange import sum_rows_in_torch
from argosy.distributed.ep_dispatch import build_dispatcher, build_expert_tables
from argosy.distributed.ep_fixed import AddAtHome, AddInFlight, FixedExchange
from argosy.distributed.ep_high_throughput import HighThroughputExchange, HighThroughputReturn
from argosy.distributed.ep_message import pack_tokens
from argosy.distributed.ep_payload import PayloadKind, build_payload
from argosy.distributed.ep_row_ops import TorchRowOps
from argosy.distributed.ep_symmetric import SymmetricExchange, SymmetricLink, SymmetricTransport, connect_areas
from argosy.distributed.ep_types import (
    EXCHANGE_MODES,
    WORD_BYTES,
    DispatchedTokens,
    ExchangeMode,
    ExchangePlan,
    RankExchange,
    ReceivedRows,
)
from argosy.distributed.layout import ParallelLayout
from argosy.distributed.mesh import ParallelMesh
from argosy.distributed.rendezvous import StoreAddress, connect_store, host_store
from argosy.kernels.select import select_one_sided_ops, select_row_ops, select_sum_rows
from argosy.layers.mlp import GatedMLP
from argosy.platforms import Platform, select_platform
from argosy.quantization.scheme import build_schemes

TIMEOUT_S = 60.0
NUM_WARMUP = 5
CALLS_PER_GRAPH = 10
MAX_ERROR = 0.03  # of the round trip's norm: bf16 sums, FP8 payloads
US_PER_S = 1e6
SPARE_ROW_BYTES = 256  # of a row beside its hidden state: ids, weights, scales
Call = Callable[[], object]
Way = Literal[
    "low_latency", "high_throughput", "all_gather", "symmetric"
]  # an exchange mode, or low_latency's other way


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What is measured; the same on every rank."""

    num_tokens: int
    hidden_size: int
    num_experts: int
    num_experts_per_tok: int
    expert_width: int
    payload: PayloadKind
    dtype: torch.dtype


class PlainExchange:
    """The yardstick: rows of ``row_bytes`` in preallocated buffers, sent by torch itself."""

    def __init__(self, device: torch.device, row_bytes: int, send_counts: list[int], recv_counts: list[int]) -> None:
        row_words = row_bytes // WORD_BYTES
        self._send_counts, self._recv_counts = send_counts, recv_counts
        self._sent = torch.zeros(sum(send_counts), row_words, dtype=torch.int32, device=device)
        self._received = torch.empty(sum(recv_counts), row_words, dtype=torch.int32, device=device)
        self.num_bytes = self._sent.numel() * WORD_BYTES

    def run(self) -> None:
        dist.all_to_all_single(self._received, self._sent, self._recv_counts, self._send_counts)


class Bench:
    """One rank's tensors of one shape and mode, and the calls to time."""

    def __init__(
        self, ep: Communicator, device: torch.device, shape: Shape, way: Way, symmetric: SymmetricTransport | None
    ) -> None:
        """``symmetric``: for that way."""
        self.ep, self.shape, self.way = ep, shape, way
        self.mode: ExchangeMode = "low_latency" if way == "symmetric" else way
        self.plan = ExchangePlan(self.mode, shape.num_tokens)
        self._symmetric = symmetric if way == "symmetric" else None
        with torch.device(device):
            self._build_dispatcher(device)
            self._draw_tokens(device)
            self.shared_experts = GatedMLP(shape.hidden_size, shape.expert_width, build_schemes(shape.dtype))
            for weight in self.shared_experts.parameters():
                weight.normal_(std=0.02)
        self.received = self.exchange_rows()
        self.partial_sums = self.received.x.contiguous()
        self.dispatched = self.dispatch()
        self._build_yardsticks(device)

    def exchange_rows(self) -> ReceivedRows:
        return self.exchange.start(self.x, self.topk_ids, self.topk_weights, self.plan).wait()

    def dispatch(self) -> DispatchedTokens:
        return self.dispatcher.start_dispatch(self.x, self.topk_ids, self.topk_weights, self.plan).wait()

    def send_home(self) -> torch.Tensor:
        return self.received.return_path.start(self.partial_sums).wait()

    def combine(self) -> torch.Tensor:
        return self.dispatcher.start_combine(self.dispatched.hidden_states, self.dispatched.handle).wait()

    def run_shared_experts(self) -> torch.Tensor:
        return self.shared_experts(self.x)

    def dispatch_under_shared_experts(self) -> None:
        flight = self.dispatcher.start_dispatch(self.x, self.topk_ids, self.topk_weights, self.plan)
        self.run_shared_experts()
        flight.wait()

    def error(self) -> float:
        """Of a round trip through experts that multiply by 1 + id / E, relative to the known answer."""
        factors = 1 + torch.arange(self.shape.num_experts + 1, device=self.x.device) / self.shape.num_experts
        num_local_experts = self.shape.num_experts // self.ep.size
        local_factors = factors[self.ep.rank * num_local_experts :][:num_local_experts]
        ends = self.dispatched.num_tokens_per_expert.cumsum(0)
        rows = torch.arange(self.dispatched.hidden_states.shape[0], device=self.x.device)
        expert = torch.searchsorted(ends, rows, right=True).clamp(max=num_local_experts - 1)
        expert_out = (self.dispatched.hidden_states * local_factors[expert].unsqueeze(1)).to(self.shape.dtype)
        out = self.dispatcher.start_combine(expert_out, self.dispatched.handle).wait()
        expected = self.x.float() * (factors[self.topk_ids] * self.topk_weights).sum(dim=1, keepdim=True)
        return float((out - expected).norm() / expected.norm())

    def _build_dispatcher(self, device: torch.device) -> None:
        shape, ep = self.shape, self.ep
        sum_rows = select_sum_rows(device.type, sum_rows_in_torch)
        row_ops = select_row_ops(device.type) or TorchRowOps()
        self.dispatcher = build_dispatcher(
            ep,
            shape.num_experts,
            payload=shape.payload,
            low_latency_layout="sorted",
            sum_rows=sum_rows,
            row_ops=row_ops,
            symmetric=self._symmetric,
        )
        codec = build_payload(shape.payload)
        owners = build_expert_tables(shape.num_experts, ep)[1]
        low_latency = FixedExchange(ep, codec, row_ops, AddAtHome(ep, row_ops))
        exchanges: dict[Way, RankExchange] = {
            "low_latency": low_latency,
            "all_gather": FixedExchange(ep, codec, row_ops, AddInFlight(ep)),
            "high_throughput": HighThroughputExchange(ep, owners, codec, row_ops, sum_rows),
        }
        if self._symmetric is not None:
            exchanges["symmetric"] = SymmetricExchange(SymmetricLink(ep, self._symmetric, owners), codec, low_latency)
        self.exchange = exchanges[self.way]

    def _draw_tokens(self, device: torch.device) -> None:
        """Experts are chosen evenly, which sends nearly every token to every rank when ranks are few."""
        shape = self.shape
        generator = torch.Generator(device).manual_seed(self.ep.rank)
        self.x = torch.randn(shape.num_tokens, shape.hidden_size, generator=generator).to(shape.dtype)
        scores = torch.rand(shape.num_tokens, shape.num_experts, generator=generator)
        self.topk_ids = scores.topk(shape.num_experts_per_tok)[1].to(torch.int32)
        self.topk_weights = torch.rand(shape.num_tokens, shape.num_experts_per_tok, generator=generator)

    def _build_yardsticks(self, device: torch.device) -> None:
        tokens = pack_tokens(self.x, self.topk_ids, self.topk_weights, build_payload(self.shape.payload))
        way = self.received.return_path
        even = [self.shape.num_tokens] * self.ep.size
        is_uneven = isinstance(way, HighThroughputReturn)
        send_counts, recv_counts = (way.send_counts, way.recv_counts) if is_uneven else (even, even)
        sum_bytes = self.shape.hidden_size * self.shape.dtype.itemsize
        self.plain_dispatch = PlainExchange(device, tokens.row_bytes, send_counts, recv_counts)
        self.plain_combine = PlainExchange(device, sum_bytes, recv_counts, send_counts)


class Clock:
    """Times a call on all ranks together."""

    def __init__(self, ep: Communicator, platform: Platform, num_runs: int) -> None:
        self._ep, self._platform, self._num_runs = ep, platform, num_runs

    def median_us(self, call: Call, calls_per_run: int) -> float:
        """Of the slowest rank; a run is ``calls_per_run`` calls in a row, synchronised at both ends."""
        for _ in range(NUM_WARMUP):
            call()
        runs_us = [self._run_us(call, calls_per_run) for _ in range(self._num_runs)]
        median_ns = round(statistics.median(runs_us) * 1000)
        return max(ns for (ns,) in self._ep.all_gather_ints([median_ns])) / 1000

    def _run_us(self, call: Call, calls_per_run: int) -> float:
        self._platform.synchronize()
        self._ep.barrier()
        start = time.perf_counter()
        for _ in range(calls_per_run):
            call()
        self._platform.synchronize()
        return (time.perf_counter() - start) * US_PER_S / calls_per_run


def choose_auto(shape: Shape, ep_size: int, *, is_card: bool) -> ExchangeMode:
    """What replicas of one rank agree on, by the rules of the engine; these tokens know no groups of experts."""
    ranks_visited = expected_ranks_visited(
        ep_size,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.num_experts_per_tok,
        n_group=1,
        topk_group=1,
    )
    ll_max = choose_ll_max_tokens_per_rank(ep_size, ranks_visited, is_card=is_card)
    return agree([StepProposal(0, shape.num_tokens)] * ep_size, ExchangePolicy("auto", ll_max, 1)).mode


def measure(bench: Bench, clock: Clock, calls_per_run: int, *, is_graph: bool) -> Cost:
    def time_us(call: Call) -> float:
        if is_graph:
            return clock.median_us(capture(call).replay, max(1, calls_per_run // CALLS_PER_GRAPH)) / CALLS_PER_GRAPH
        return clock.median_us(call, calls_per_run)

    return Cost(
        way=bench.way,
        num_tokens=bench.shape.num_tokens,
        is_graph=is_graph,
        is_auto=bench.way == choose_auto(bench.shape, bench.ep.size, is_card=bench.x.device.type != "cpu"),
        dispatch_bytes=bench.plain_dispatch.num_bytes,
        combine_bytes=bench.plain_combine.num_bytes,
        plain_dispatch_us=time_us(bench.plain_dispatch.run),
        exchange_us=time_us(bench.exchange_rows),
        dispatch_us=time_us(bench.dispatch),
        plain_combine_us=time_us(bench.plain_combine.run),
        return_us=time_us(bench.send_home),
        combine_us=time_us(bench.combine),
        shared_us=time_us(bench.run_shared_experts),
        overlapped_us=time_us(bench.dispatch_under_shared_experts),
    )


def capture(call: Call) -> torch.cuda.CUDAGraph:
    """Several calls in one graph, so that its own launch hardly counts."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_GRAPH):
            call()
    return graph


def run_rank(rank: int, arguments: argparse.Namespace, address: StoreAddress) -> None:
    platform = select_platform(arguments.device)
    platform.make_current(rank)
    device = platform.device(rank)
    layout = ParallelLayout(dp_size=arguments.world)
    store = connect_store(address, TIMEOUT_S)
    ep = ParallelMesh.build(layout, rank, store=store, platform=platform, timeout_s=TIMEOUT_S).ep
    clock = Clock(ep, platform, arguments.runs)
    costs: list[Cost] = []
    if rank == 0:
        print_head(arguments, platform, NUM_WARMUP)
    shapes = [build_shape(arguments, platform, int(text)) for text in arguments.tokens.split(",")]
    symmetric = build_symmetric(ep, device, shapes) if arguments.symmetric else None
    ways: tuple[Way, ...] = EXCHANGE_MODES if symmetric is None else (*EXCHANGE_MODES, "symmetric")
    for shape in shapes:
        for way in ways:
            bench = Bench(ep, device, shape, way, symmetric)
            check(bench)
            can_capture = arguments.graphs and way != "high_throughput"
            for is_graph in (False, True) if can_capture else (False,):
                costs.append(measure(bench, clock, arguments.calls, is_graph=is_graph))
                if rank == 0:
                    print_cost(costs[-1])
    if rank == 0:
        print_auto(costs)
        print_result(arguments, platform, costs)
    dist.destroy_process_group()


def build_symmetric(ep: Communicator, device: torch.device, shapes: list[Shape]) -> SymmetricTransport:
    """Room for the largest shape. Collective over ep."""
    most = max(shapes, key=lambda shape: shape.num_tokens)
    row_bytes = most.hidden_size * most.dtype.itemsize + SPARE_ROW_BYTES
    ops = select_one_sided_ops(device.type)
    return SymmetricTransport(connect_areas(ep, device, most.num_tokens, row_bytes, TIMEOUT_S), ops)


def build_shape(arguments: argparse.Namespace, platform: Platform, num_tokens: int) -> Shape:
    return Shape(
        num_tokens=num_tokens,
        hidden_size=arguments.hidden_size,
        num_experts=arguments.num_experts,
        num_experts_per_tok=arguments.num_experts_per_tok,
        expert_width=arguments.expert_width,
        payload=arguments.payload,
        dtype=platform.default_dtype(torch.bfloat16),
    )


def check(bench: Bench) -> None:
    """On all ranks or on none: a rank that left alone would hang the others."""
    error = bench.error()
    parts_per_million = round(error * 1e6) if error < 1 else 10**6  # also for NaN
    errors = [number / 1e6 for (number,) in bench.ep.all_gather_ints([parts_per_million])]
    if max(errors) > MAX_ERROR:
        sys.exit(
            f"{bench.way}, {bench.shape.num_tokens} tokens: errors by rank {errors} exceed {MAX_ERROR}; no numbers"
        )


def print_result(arguments: argparse.Namespace, platform: Platform, costs: list[Cost]) -> None:
    result = {
        "benchmark": "dispatch",
        "hardware": f"{arguments.world} x {platform.device_name()}",
        "commit": read_commit(),
        "command": " ".join(["python", "benchmarks/dispatch.py", *sys.argv[1:]]),
        "arguments": vars(arguments),
        "results": [asdict(cost) for cost in costs],
    }
    print("\n" + json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--world", type=int, default=2, help="ranks; on CUDA one a card")
    parser.add_argument("--tokens", default="1,8,64,128,512,2048,8192", help="of each rank")
    parser.add_argument("--hidden-size", type=int, default=7168)
    parser.add_argument("--num-experts", type=int, default=256)
    parser.add_argument("--num-experts-per-tok", type=int, default=8)
    parser.add_argument("--expert-width", type=int, default=2048)
    parser.add_argument("--payload", default="model", choices=("model", "int8", "fp8"))
    parser.add_argument("--graphs", action="store_true", help="CUDA: also time device graphs, where the mode allows")
    parser.add_argument("--symmetric", action="store_true", help="CUDA: also low_latency through shared memory")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--calls", type=int, default=20, help="timed calls a run")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    store = host_store()
    torch.multiprocessing.spawn(run_rank, (arguments, store.address), nprocs=arguments.world)


if __name__ == "__main__":
    main()
