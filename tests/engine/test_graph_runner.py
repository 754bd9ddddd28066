"""Steps from static, padded tensors give what eager steps give; recordings themselves need a card (marked ``cuda``)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import pytest
import torch

from argosy import LLM, RequestOutput, SamplingParams
from argosy.distributed.ep_types import SINGLE_RANK_PLAN
from argosy.distributed.recordings import RecordingKey, RecordingTable
from argosy.kernels import RotaryRows
from argosy.layers.forward_batch import AttentionMetadata, ForwardBatch
from argosy.platforms.cpu import CpuPlatform
from argosy.runner.graph_runner import GraphRunner, StaticInputs, graph_batch_sizes, graph_lengths

T = TypeVar("T")


def test_sizes_and_lengths() -> None:
    assert graph_batch_sizes(1) == (1,)
    assert graph_batch_sizes(2) == (1, 2)
    assert graph_batch_sizes(20) == (1, 2, 4, 8, 16, 20)
    assert graph_batch_sizes(64)[-3:] == (32, 48, 64)
    assert graph_batch_sizes(512)[-1] == 256
    assert graph_lengths(2048, 163840) == (2048, 16384, 131072, 163840)
    assert graph_lengths(2048, 2048) == (2048,)
    assert graph_lengths(2048, 100) == (100,)


GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


def build(device: str, **settings: object) -> LLM:
    fixed = {"device": device, "dtype": "float32", "num_threads": 1, "max_model_len": 256, "enforce_eager": True}
    return LLM(**{**fixed, **settings})  # type: ignore[arg-type]


def capture(llm: LLM, batch_sizes: tuple[int, ...], lengths: tuple[int, ...]) -> GraphRunner:
    runner = llm.engine.runner
    return GraphRunner.capture(
        runner.model, runner.cache, runner.rotary, llm.built.platform, table=RecordingTable(batch_sizes, lengths)
    )


def prompts() -> list[list[int]]:
    """Lengths on both sides of index_topk (64) and of a block (64)."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(10, 3000, (n,), generator=generator).tolist() for n in (1, 50, 60, 64, 100, 130)]


def tokens(llm: LLM) -> list[list[int]]:
    results = llm.generate(prompts(), GREEDY)
    return [result.outputs[0].token_ids for result in results if isinstance(result, RequestOutput)]


@pytest.mark.parametrize("kind", ["auto", "int8"])
@pytest.mark.parametrize("lengths", [(256,), (64, 256)], ids=str)
def test_tokens_from_padded_static_batches_are_those_of_eager_steps(
    device: str, kind: str, lengths: tuple[int, ...]
) -> None:
    expected = tokens(build(device, kv_cache_dtype=kind))
    llm = build(device, kv_cache_dtype=kind)
    graphs = capture(llm, (1, 4, 8), lengths)
    llm.engine.runner.graphs = graphs
    assert tokens(llm) == expected
    assert graphs.num_replays >= 19  # all decode steps but those that share a step with a prefill
    assert graphs.num_graphs == 3 * len(lengths)


def test_trying_a_recording_leaves_no_trace(device: str) -> None:
    """Before the first request: one is replayed, and no slot of the cache is written."""
    llm = build(device)
    runner = llm.engine.runner
    runner.try_graphs()  # without recordings, nothing
    runner.graphs = capture(llm, (2,), (256,))
    before = runner.cache.latent.clone(), runner.cache.index_k.clone()
    num_runs, run = 0, runner.graphs.run

    def count(batch: ForwardBatch, key: RecordingKey) -> torch.Tensor:
        nonlocal num_runs
        num_runs += 1
        return run(batch, key)

    runner.graphs.run = count  # type: ignore[method-assign]
    runner.try_graphs()
    assert num_runs == 1 and runner.num_replays == 0  # it was no step
    assert torch.equal(runner.cache.latent, before[0]) and torch.equal(runner.cache.index_k, before[1])


@dataclasses.dataclass
class WatchedWork(Generic[T]):
    value: T
    is_waited_for: bool = False

    def compute(self) -> None:
        pass

    def wait(self) -> T:
        self.is_waited_for = True
        return self.value


class WatchedLane(CpuPlatform):
    """A platform whose lane computes as early as a card may; without a lane, work is done as late as it may be."""

    def __init__(self) -> None:
        self.works: list[WatchedWork[Any]] = []

    def new_side_lane(self) -> "WatchedLane":  # type: ignore[override]
        return self

    def start(self, compute: Callable[[], T]) -> WatchedWork[T]:
        self.works.append(WatchedWork(compute()))
        return self.works[-1]


def test_early_work_beside_a_step_changes_nothing_and_is_waited_for() -> None:
    llm, platform = build("cpu"), WatchedLane()
    runner = llm.engine.runner
    runner.graphs = GraphRunner.capture(
        runner.model, runner.cache, runner.rotary, platform, table=RecordingTable((8,), (256,))
    )
    assert tokens(llm) == tokens(build("cpu"))
    assert platform.works and all(work.is_waited_for for work in platform.works)


def test_rows_that_a_larger_batch_left_behind_write_nothing(device: str) -> None:
    """Three requests after six: the padding of the second batch must not touch the blocks of the first one's."""
    llm = build(device, enable_prefix_caching=False)
    llm.engine.runner.graphs = capture(llm, (8,), (256,))
    params = [dataclasses.replace(GREEDY, max_tokens=4 if i < 3 else 20) for i in range(6)]
    found = llm.generate(prompts(), params)
    expected = build(device, enable_prefix_caching=False).generate(prompts(), params)
    for ours, theirs in zip(found, expected, strict=True):
        assert isinstance(ours, RequestOutput) and isinstance(theirs, RequestOutput)
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids


def test_what_is_no_decode_step_or_too_large_runs_eagerly(device: str) -> None:
    llm = build(device)
    graphs = capture(llm, (1, 2), (256,))
    llm.engine.runner.graphs = graphs
    assert tokens(llm) == tokens(build(device))  # six at a time


def test_a_batch_is_copied_and_what_is_behind_it_is_padding() -> None:
    inputs = StaticInputs.allocate(4, 3, torch.device("cpu"))
    inputs.fill(_decode_batch([7, 8, 9]))
    inputs.fill(_decode_batch([5]))
    assert inputs.input_ids.tolist()[:1] == [5]
    assert inputs.slot_mapping.tolist() == [5, -1, -1, -1]
    assert inputs.seq_lens.tolist() == [6, 1, 1, 1]


def _decode_batch(numbers: list[int]) -> ForwardBatch:
    """Number n is token n at position n in slot n of a sequence of n + 1."""
    ids = torch.tensor(numbers)
    attention = AttentionMetadata(
        query_start_loc=torch.arange(len(numbers) + 1, dtype=torch.int32),
        seq_lens=(ids + 1).to(torch.int32),
        slot_mapping=ids,
        block_table=torch.ones(len(numbers), 2, dtype=torch.int32),
        max_query_len=1,
        max_seq_len=max(numbers) + 1,
        max_decode_seq_len=max(numbers) + 1,
        min_decode_seq_len=min(numbers) + 1,
        num_decode_tokens=len(numbers),
        num_prefill_tokens=0,
        prefill_segments=(),
    )
    ones = torch.ones(len(numbers), 1, 2)
    return ForwardBatch(
        input_ids=ids,
        positions=ids,
        rotary=RotaryRows(torch.complex(ones, ones), ones, ones),
        attention=attention,
        logits_indices=ids,
        exchange=SINGLE_RANK_PLAN,
    )
