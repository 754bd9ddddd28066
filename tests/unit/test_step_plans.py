"""What measurements of steps are made of, where it needs no card: plans, traces, parts, floors and the loopback."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from argosy.config import CacheDTypes
from argosy.distributed.ep_dispatch import build_dispatcher
from argosy.distributed.ep_row_ops import TorchRowOps
from argosy.distributed.ep_types import ExchangeMode, ExchangePlan, QuantizedRows
from argosy.models.deepseek.config import ModelConfig, parse_model_config
from argosy.quantization.preparation import FP8Preparation, Int8Preparation, NoPreparation, Preparation
from argosy.runner.row_table import RowTable
from benchmarks.steps.floors import CacheSizes, ExpertSizes, StepSizes, floors_us, linear_flop_per_token
from benchmarks.steps.loopback import EvenLoopback
from benchmarks.steps.models import model_settings
from benchmarks.steps.parts import OUTSIDE, UNKNOWN, LabelledSpan, Labels, label, label_run, part_of_module
from benchmarks.steps.plans import longest_row, plan_decode, plan_prefill
from benchmarks.steps.routing import draw_even, imbalance
from benchmarks.steps.trace import Span, device_spans, split_steps, summarise, trace_steps

BLOCK_SIZE = 64


def config(num_layers: int = 4, num_dense_layers: int = 1, *, is_tiny: bool = False) -> ModelConfig:
    return parse_model_config(model_settings(num_layers, num_dense_layers, is_tiny=is_tiny))


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 64, 65, 65536])
def test_a_prefill_asks_for_the_blocks_that_its_tokens_fill(num_tokens: int) -> None:
    batches = plan_prefill(num_tokens, chunk=8192, block_size=BLOCK_SIZE, vocab_size=4096)
    (request,) = batches[0].admitted
    assert len(request.block_ids) == -(-num_tokens // BLOCK_SIZE)
    assert request.block_ids == list(range(1, 1 + len(request.block_ids)))
    assert sum(batch.num_tokens for batch in batches) == num_tokens
    table = RowTable(max_num_seqs=1, max_model_len=longest_row(0, 1, [num_tokens]), block_size=BLOCK_SIZE)
    table.apply(batches[0])
    table.count_sampled(np.array([0]))  # the token behind the prompt has a place too


@pytest.mark.parametrize(("context", "num_steps"), [(4096, 35), (63, 1), (63, 2), (64, 64)])
def test_decode_plans_fit_their_rows_to_the_last_step(context: int, num_steps: int) -> None:
    batches = plan_decode(3, context, num_steps, block_size=BLOCK_SIZE, vocab_size=4096)
    table = RowTable(max_num_seqs=3, max_model_len=longest_row(context, num_steps, []), block_size=BLOCK_SIZE)
    rows = np.arange(3)
    for batch in batches:
        table.apply(batch)
        lengths = np.array(batch.num_computed_tokens) + np.array(batch.num_scheduled_tokens)
        assert (lengths == table.num_tokens[rows]).all()  # every row is sampled
        assert (table.block_table[rows, (lengths - 1) // BLOCK_SIZE] > 0).all()
        table.learn(rows, table.count_sampled(rows), np.full(3, 7))
    blocks = [block for request in batches[0].admitted for block in request.block_ids]
    assert len(set(blocks)) == len(blocks) == 3 * -(-(context + num_steps) // BLOCK_SIZE)


# --- traces and parts -------------------------------------------------------------------------------------------------


def event(name: str, device: DeviceType, start: float, end: float, *, is_user_annotation: bool = False) -> object:
    return SimpleNamespace(
        name=name,
        device_type=device,
        time_range=SimpleNamespace(start=start, end=end),
        is_user_annotation=is_user_annotation,
        cpu_children=[],
    )


def test_a_cuda_trace_gives_each_kernel_once_and_no_wait_of_the_host() -> None:
    events = [
        event("cudaGraphLaunch", DeviceType.CPU, 0, 5),
        event("cudaEventSynchronize", DeviceType.CPU, 5, 100),
        event("step", DeviceType.CUDA, 9, 31, is_user_annotation=True),
        event("_narrow_kernel", DeviceType.CUDA, 20, 30),
        event("_narrow_kernel", DeviceType.CUDA, 10, 20),
        event("_narrow_kernel", DeviceType.CUDA, 10, 20),
    ]
    assert device_spans(events, is_cuda=True) == [Span("_narrow_kernel", 10, 20), Span("_narrow_kernel", 20, 30)]  # type: ignore[arg-type]


STEP_OF_20 = (("Memcpy HtoD", 0, 2), ("a", 4, 12), ("b", 5, 7), ("c", 15, 18), ("Memcpy DtoH", 18, 20))


def make_steps(starts: list[float]) -> list[Span]:
    return [Span(name, at + start, at + end) for at in starts for name, start, end in STEP_OF_20]


def test_gaps_end_at_a_step_s_first_kernel_and_pauses_come_after_it() -> None:
    steps = split_steps([*make_steps([0, 21, 50]), Span("unfinished", 80, 81)], "DtoH")
    assert [len(step) for step in steps] == [5, 5, 5]
    second, third = trace_steps(steps)
    assert (second.period, second.gap, second.inside, second.longest_pause) == (21, 5, 3, 3)
    assert (third.period, third.gap, third.inside) == (29, 13, 3)
    medians = summarise(steps)
    assert medians.gap_share == pytest.approx(18 / 50)
    assert medians.inside_share == pytest.approx(6 / 50)
    assert medians.kernels_us == 2 + 8 + 2 + 3 + 2


def test_a_kernel_that_starts_before_the_step_in_front_has_ended_leaves_no_gap() -> None:
    (trace,) = trace_steps([[Span("a", 0, 10)], [Span("b", 8, 20), Span("Memcpy DtoH", 21, 22)]])
    assert (trace.period, trace.gap, trace.inside) == (12, 0, 1)


def spans_of(names: str) -> list[Span]:
    return [Span(name, i, i + 1) for i, name in enumerate(names.split())]


def test_markers_label_what_names_do_not() -> None:
    labelled = label(spans_of("x erfinv gemm _select_kernel erfinv gemm"), ["experts", "head"])
    assert [each.part for each in labelled] == [OUTSIDE, "experts", "top-k", "head"]


def test_without_all_markers_only_names_tell(capsys: pytest.CaptureFixture[str]) -> None:
    labelled = label(spans_of("gemm erfinv _select_kernel"), ["experts", "head"])
    assert [each.part for each in labelled] == [UNKNOWN, UNKNOWN, "top-k"]
    assert "1 markers in the trace of 2" in capsys.readouterr().out


def test_a_replayed_step_is_labelled_from_its_end() -> None:
    eager = [LabelledSpan(span, part) for span, part in zip(spans_of("gemm gemm"), ["experts", "head"], strict=True)]
    labelled = Labels.of(eager).apply(spans_of("gemm gemm gemm never_seen _rms_norm_kernel"))
    assert [each.part for each in labelled] == [OUTSIDE, "experts", "head", UNKNOWN, "norms"]


def test_modules_mark_their_own_kernels_and_hooks_are_taken_off() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Sigmoid()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lm_head(x.tanh())

    model, x = Block(), torch.ones(2, 4)
    labelled = label_run(model, lambda: model(x), torch.device("cpu"))
    parts = {each.span.name: each.part for each in labelled}
    assert parts["aten::sigmoid"] == "head" and parts["aten::tanh"] == OUTSIDE
    assert not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks


def test_names_of_modules_are_parts_of_the_model() -> None:
    moe = nn.Module()
    moe.experts = nn.Module()
    parts = {
        "model.layers.3.self_attn.indexer.wk": "indexer",
        "model.layers.3.self_attn.o_proj": None,  # its parent's
        "model.layers.3.self_attn": "attention projections",
        "model.layers.3.mlp.gate": "router",
        "lm_head": "head",
    }
    assert {name: part_of_module(name, nn.Module()) for name in parts} == parts
    assert part_of_module("model.layers.0.mlp", nn.Module()) == "dense MLP"
    assert part_of_module("model.layers.3.mlp", moe) == "arrange"


# --- floors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "us"), [(1, 1010), (4, 1717), (16, 3972), (64, 7914), (256, 10182)])
def test_decode_floors_are_near_those_of_the_plan(batch_size: int, us: float) -> None:
    experts = ExpertSizes(num_rows=8 * batch_size, num_hit=256 * (1 - (1 - 8 / 256) ** batch_size))
    cache = CacheSizes.of(config(), CacheDTypes(latent="int8", index_key="int8"))
    floors = floors_us(config(), StepSizes.decode(config(), batch_size, 4096), experts, cache, "w8a8")
    assert sum(floors.values()) == pytest.approx(us, rel=0.08)


def test_prefill_floors_of_a_layer_are_near_those_of_the_plan() -> None:
    one = config(1, 0)
    cache, experts = (
        CacheSizes.of(one, CacheDTypes(latent="int8", index_key="int8")),
        ExpertSizes(num_rows=8 * 4096, num_hit=16),
    )
    floors = floors_us(one, StepSizes.prefill(one, 0, 4096), experts, cache, "w8a8")
    expected = {
        "attention projections": 91 + 227 + 320 + 705,
        "core": 2739,
        "experts": 2114,
        "shared": 264,
        "router": 19,
    }
    assert {part: floors[part] for part in expected} == pytest.approx(expected, rel=0.05)
    assert floors["indexer"] + floors["top-k"] == pytest.approx(84 + 154, rel=0.1)


def test_a_token_is_multiplied_by_37_billion_weights() -> None:
    with_embedding = linear_flop_per_token(config(61, 3)) / 2 + 129280 * 7168
    assert with_embedding == pytest.approx(37.4e9, rel=0.01)


# --- routing and the loopback -----------------------------------------------------------------------------------------


def test_even_routing_keeps_to_its_groups() -> None:
    published = config()
    ids = draw_even(published, 500, seed=3).long()
    assert ids.shape == (500, 8)
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert max(len(set(row)) for row in (ids // 32).tolist()) <= 4
    assert imbalance(ids, 256, 500) < 2.0


def test_imbalance_is_the_busiest_expert_over_the_mean() -> None:
    assert imbalance(torch.tensor([[0, 1], [0, 2], [3, 3]]), 4, 2) == 2.0


@pytest.mark.parametrize("preparation", [NoPreparation(), Int8Preparation(), FP8Preparation(True)], ids=str)
@pytest.mark.parametrize("mode", ["low_latency", "high_throughput"])
def test_a_looped_back_rank_gets_as_many_rows_as_a_real_one(mode: ExchangeMode, preparation: Preparation) -> None:
    tiny, num_tokens = config(is_tiny=True), 200
    x = torch.randn(num_tokens, tiny.hidden_size)
    rows = preparation.prepare(x)
    assert isinstance(rows, torch.Tensor | QuantizedRows)
    num_scales = rows.scale.shape[1] if isinstance(rows, QuantizedRows) else 0
    dispatcher = build_dispatcher(
        EvenLoopback(16, tiny, torch.float32, num_scales),
        tiny.n_routed_experts,
        low_latency_layout="sorted",
        row_ops=TorchRowOps(),
    )
    ids = draw_even(tiny, num_tokens, seed=5)
    weights = torch.full(ids.shape, 0.125)
    for _ in range(2):  # what is kept between exchanges must serve again
        dispatched = dispatcher.start_dispatch(rows, ids, weights, ExchangePlan(mode, num_tokens)).wait()
        counts = dispatched.num_tokens_per_expert
        assert counts.shape == (4,)  # 64 experts on 16 ranks
        exact = mode == "high_throughput"
        assert counts.sum().item() == pytest.approx(8 * num_tokens, rel=0.0 if exact else 0.1)
        assert counts.max().item() < 1.25 * counts.double().mean().item()
        home = dispatcher.start_combine(dispatched.hidden_states.float(), dispatched.handle).wait()
        assert home.shape == x.shape and home.isfinite().all()
