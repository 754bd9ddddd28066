"""Expert parallelism on one card, its peers played by itself: no host sync in low latency, and capture in a graph."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from argosy.distributed.ep_arrange import ExpertLayout, sum_rows_in_torch
from argosy.distributed.ep_dispatch import build_dispatcher
from argosy.distributed.ep_payload import PayloadKind
from argosy.distributed.ep_row_ops import TorchRowOps
from argosy.distributed.ep_types import ExchangeMode, ExchangePlan, RowOps, SumRows, TokenDispatcher
from argosy.kernels.select import select_row_ops, select_sum_rows
from argosy.quantization.plain_scheme import PlainExperts
from tests.helpers.loopback import LoopbackCommunicator

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card"),
]
EP_SIZE, NUM_EXPERTS, HIDDEN_SIZE, NUM_TOKENS, NUM_EXPERTS_PER_TOK = 4, 32, 256, 24, 8


@dataclass(frozen=True)
class EPKernels:
    sum_rows: SumRows
    row_ops: RowOps


class Trip:
    """Dispatch, experts, combine over static buffers."""

    def __init__(self, layout: ExpertLayout, payload: PayloadKind, kernels: EPKernels) -> None:
        torch.manual_seed(0)
        with torch.device("cuda"):
            ep = LoopbackCommunicator(EP_SIZE, rank=1)
            self.dispatcher: TokenDispatcher = build_dispatcher(
                ep,
                NUM_EXPERTS,
                payload=payload,
                low_latency_layout=layout,
                sum_rows=kernels.sum_rows,
                row_ops=kernels.row_ops,
            )
            self.experts = PlainExperts(NUM_EXPERTS // EP_SIZE, HIDDEN_SIZE, 128, torch.bfloat16)
            for weight in self.experts.parameters():
                weight.copy_(torch.randn(weight.shape) * 0.1)
            self.x = torch.randn(NUM_TOKENS, HIDDEN_SIZE, dtype=torch.bfloat16)
            self.topk_ids = torch.rand(NUM_TOKENS, NUM_EXPERTS).topk(NUM_EXPERTS_PER_TOK)[1].to(torch.int32)
            self.topk_ids[3] = -1
            self.topk_weights = torch.rand(NUM_TOKENS, NUM_EXPERTS_PER_TOK)

    def run(self, mode: ExchangeMode) -> torch.Tensor:
        plan = ExchangePlan(mode, NUM_TOKENS + 8)
        dispatched = self.dispatcher.start_dispatch(self.x, self.topk_ids, self.topk_weights, plan).wait()
        return self.dispatcher.start_combine(self.experts(dispatched), dispatched.handle).wait()

    def expected(self) -> torch.Tensor:
        """float32, token by token: what this rank's experts give, once for each rank that sent the token here."""
        first = NUM_EXPERTS // EP_SIZE  # of rank 1
        out = torch.zeros(NUM_TOKENS, HIDDEN_SIZE, device="cuda")
        for token, (ids, weights) in enumerate(zip(self.topk_ids.tolist(), self.topk_weights.tolist(), strict=True)):
            for expert, weight in zip(ids, weights, strict=True):
                if first <= expert < 2 * first:
                    gate_up = self.experts.gate_up_proj[expert - first].float() @ self.x[token].float()
                    gate, up = gate_up.chunk(2)
                    hidden = torch.nn.functional.silu(gate) * up
                    out[token] += weight * (self.experts.down_proj[expert - first].float() @ hidden)
        return out * EP_SIZE


@pytest.fixture
def forbid_syncs() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=["torch", "fused"])
def kernels(request: pytest.FixtureRequest) -> EPKernels:
    if request.param == "torch":
        return EPKernels(sum_rows_in_torch, TorchRowOps())
    return EPKernels(select_sum_rows("cuda", sum_rows_in_torch), select_row_ops("cuda") or TorchRowOps())


@pytest.mark.parametrize("payload", ["model", "int8", "fp8"])
@pytest.mark.parametrize("layout", ["padded", "sorted"])
@pytest.mark.parametrize("mode", ["low_latency", "all_gather"])
def test_fixed_exchanges_never_wait_for_the_card(
    mode: ExchangeMode, layout: ExpertLayout, payload: PayloadKind, kernels: EPKernels, forbid_syncs: None
) -> None:
    trip = Trip(layout, payload, kernels)
    trip.run(mode)  # Triton may compile here
    out = trip.run(mode)
    torch.cuda.set_sync_debug_mode("default")
    expected = trip.expected()
    assert (out - expected).norm() < (0.05 if payload == "fp8" else 0.02) * expected.norm()


@pytest.mark.parametrize("layout", ["padded", "sorted"])
def test_low_latency_is_captured_in_a_graph(layout: ExpertLayout, kernels: EPKernels) -> None:
    trip = Trip(layout, "model", kernels)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        trip.run("low_latency")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = trip.run("low_latency")
    trip.x.copy_(torch.randn_like(trip.x))
    trip.topk_ids.copy_(trip.topk_ids.flip(0))  # other counts for every expert
    graph.replay()
    expected = trip.expected()
    assert (out - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("hidden_size", [64, 1000, 7168])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_lines", [0, 1, 7, 128])
def test_fused_sum_of_rows_equals_torch(num_lines: int, dtype: torch.dtype, hidden_size: int) -> None:
    generator = torch.Generator("cuda").manual_seed(num_lines)
    rows = torch.randn(40, hidden_size, generator=generator, device="cuda").to(dtype)
    rows[39] = float("nan")  # nobody's
    row_ids = torch.randint(-1, 39, (8, num_lines), generator=generator, device="cuda").t()  # strided
    weights = torch.rand(num_lines, 8, generator=generator, device="cuda")
    fused = select_sum_rows("cuda", sum_rows_in_torch)
    for factors in (weights, None):
        out = fused(rows, row_ids, factors, torch.float32)
        torch.testing.assert_close(out, sum_rows_in_torch(rows, row_ids, factors, torch.float32), atol=2e-5, rtol=1e-5)
        half = fused(rows, row_ids, factors, dtype)
        assert half.dtype == dtype
        torch.testing.assert_close(half, out.to(dtype))
