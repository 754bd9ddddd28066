"""Times of steps, on the host's clock; before any is taken, a graph must give what the model gives eagerly.

Invariant: what is timed is ``ModelRunner.start`` and ``finish``, as an engine calls them.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from argosy.distributed.ep_types import SINGLE_RANK_PLAN, ExchangePlan
from argosy.messages import ScheduledBatch, StepOutput
from argosy.platforms import Platform
from argosy.runner.model_runner import ModelRunner, StepInFlight
from benchmarks.steps.parts import LabelledSpan, Labels, label_run
from benchmarks.steps.plans import plan_decode, plan_prefill, without_admission
from benchmarks.steps.trace import STEP_ENDS, Span, StepMedians, record, split_steps, summarise

WARM_UP = 5
TRACED = 12  # steps
PREFILLS = 5  # of one chunk or less; longer ones are steadier
LONG_PREFILLS = 2
MAX_ERROR = 0.02  # of hidden states from a graph against eager ones, norm of the difference over the norm
NUM_CHECKS, TOKENS_APART = 20, 997  # replays of a graph that are compared, and how their tokens differ


def exchange_nothing(batch: ScheduledBatch) -> ExchangePlan:
    return SINGLE_RANK_PLAN


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What is timed, and on what."""

    runner: ModelRunner
    platform: Platform
    block_size: int
    vocab_size: int  # of the tokenizer: ids that a plan may hold
    chunk: int
    context: int
    exchange: Callable[[ScheduledBatch], ExchangePlan] = exchange_nothing
    finish: Callable[[StepInFlight], StepOutput] | None = None  # in place of the runner's, for traces

    def decode(self, batch_size: int, num_steps: int) -> list[ScheduledBatch]:
        return plan_decode(batch_size, self.context, num_steps, block_size=self.block_size, vocab_size=self.vocab_size)

    def prefill(self, num_tokens: int) -> list[ScheduledBatch]:
        return plan_prefill(num_tokens, chunk=self.chunk, block_size=self.block_size, vocab_size=self.vocab_size)

    def execute(self, batches: Sequence[ScheduledBatch]) -> None:
        for batch in batches:
            self.runner.finish(self.start(batch))

    def start(self, batch: ScheduledBatch) -> StepInFlight:
        """From a recording if there is one."""
        return self.runner.start(batch, self.exchange(batch), self.runner.choose_recording(batch))


@dataclass(frozen=True, slots=True)
class DecodeTimes:
    """Of one batch size; milliseconds a step."""

    batch_size: int
    step_ms: float  # each waited for before the next is started
    p10_ms: float
    p90_ms: float
    overlapped_ms: float  # the next is started before the last is waited for
    start_ms: float  # the host's, of overlapped steps
    finish_ms: float  # of overlapped steps: the wait for the device is in it
    finish_alone_ms: float  # when the device is done


@dataclass(frozen=True, slots=True)
class PrefillTimes:
    num_tokens: int
    tokens_per_s: float
    lowest: float
    highest: float


def measure_decode(bench: Bench, batch_size: int, num_steps: int) -> DecodeTimes:
    starts, finishes, steps = _step_alone(bench, batch_size, num_steps)
    steps.sort()
    overlapped_ms, overlapped_starts, overlapped_finishes = _step_overlapped(bench, batch_size, num_steps)
    return DecodeTimes(
        batch_size=batch_size,
        step_ms=statistics.median(steps),
        p10_ms=steps[len(steps) // 10],
        p90_ms=steps[-1 - len(steps) // 10],
        overlapped_ms=overlapped_ms,
        start_ms=statistics.median(overlapped_starts),
        finish_ms=statistics.median(overlapped_finishes),
        finish_alone_ms=statistics.median(finishes),
    )


def measure_prefill(bench: Bench, num_tokens: int) -> PrefillTimes:
    batches, rates = bench.prefill(num_tokens), []
    repeats = PREFILLS if len(batches) == 1 else LONG_PREFILLS
    for i in range(1 + repeats):
        bench.platform.synchronize()
        started_s = time.perf_counter()
        bench.execute(batches)
        bench.platform.synchronize()
        if i:
            rates.append(num_tokens / (time.perf_counter() - started_s))
    return PrefillTimes(num_tokens, statistics.median(rates), min(rates), max(rates))


def trace_decode(bench: Bench, batch_size: int) -> tuple[StepMedians, list[list[Span]]]:
    """Of overlapped steps, and the spans of each but the first ones."""
    device_type = bench.platform.device_type
    spans = record(lambda: _step_overlapped(_mark_ends(bench), batch_size, TRACED), device_type)
    steps = split_steps(spans, STEP_ENDS[device_type])[WARM_UP - 1 :]
    if len(steps) < 2:
        raise RuntimeError(f"the trace shows {len(steps)} steps of {TRACED}: no copy of tokens was found in it")
    return summarise(steps), steps


def label_decode(bench: Bench, batch_size: int, steps: Sequence[Sequence[Span]]) -> list[LabelledSpan]:
    """The spans of traced ``steps`` with their parts, which an eager step shows. Where a recording computes on a side
    lane, calls of one kernel that change places with each other may get each other's parts."""
    first, second = bench.decode(batch_size, 2)
    graphs, bench.runner.graphs = bench.runner.graphs, None
    try:
        bench.execute([first])
        eager = label_run(bench.runner.model, lambda: bench.execute([second]), bench.runner.cache.latent.device)
    finally:
        bench.runner.graphs = graphs
    labels = Labels.of(eager)
    return [labelled for step in steps for labelled in labels.apply(step)]


def label_prefill(bench: Bench, num_tokens: int) -> list[LabelledSpan]:
    """Prefill runs eagerly, so its own modules start the markers."""
    batches = bench.prefill(num_tokens)
    return label_run(bench.runner.model, lambda: bench.execute(batches), bench.runner.cache.latent.device)


def check_graph(bench: Bench, batch_size: int) -> float:
    """The largest error of hidden states from a graph, against the same batch run eagerly; 0 where no graph takes it.

    Each time with other tokens: a kernel that reads what the replay before has left would else be right.

    Raises:
        RuntimeError: they differ too much.
    """
    runner = bench.runner
    if runner.graphs is None:
        return 0.0
    (batch,) = bench.decode(batch_size, 1)
    bench.execute([batch])  # admits the requests
    recording = runner.choose_recording(batch)
    if recording is None:
        return 0.0
    forward = runner._builder.build(without_admission(batch), bench.exchange(batch)).forward
    largest = 0.0
    for i in range(NUM_CHECKS):
        input_ids = (forward.input_ids + i * TOKENS_APART) % bench.vocab_size
        changed = dataclasses.replace(forward, input_ids=input_ids)
        with torch.inference_mode():
            found = runner.graphs.run(changed, recording)[: batch.num_tokens].float().clone()
            expected = runner.model(changed, runner.cache).float()
        error = ((found - expected).norm() / expected.norm()).item()
        if not error <= MAX_ERROR:
            raise RuntimeError(f"decode B={batch_size}: graph and eager differ by {error:.2e}, no time is printed")
        largest = max(largest, error)
    return largest


def _mark_ends(bench: Bench) -> Bench:
    """On a CPU nothing is copied when a step ends, so a span is made there."""
    if bench.platform.device_type != "cpu":
        return bench

    def finish(step: StepInFlight) -> StepOutput:
        output = bench.runner.finish(step)
        with torch.profiler.record_function(STEP_ENDS["cpu"]):
            return output

    return dataclasses.replace(bench, finish=finish)


def _step_alone(bench: Bench, batch_size: int, num_steps: int) -> tuple[list[float], list[float], list[float]]:
    """ms of ``start``, of ``finish`` after the device was waited for, and of both with the wait."""
    starts, finishes, steps = [], [], []
    for i, batch in enumerate(bench.decode(batch_size, WARM_UP + num_steps)):
        began_s = time.perf_counter()
        in_flight = bench.start(batch)
        started_s = time.perf_counter()
        bench.platform.synchronize()
        waited_s = time.perf_counter()
        bench.runner.finish(in_flight)
        finished_s = time.perf_counter()
        if i >= WARM_UP:
            starts.append(1e3 * (started_s - began_s))
            finishes.append(1e3 * (finished_s - waited_s))
            steps.append(1e3 * (finished_s - began_s))
    return starts, finishes, steps


def _step_overlapped(bench: Bench, batch_size: int, num_steps: int) -> tuple[float, list[float], list[float]]:
    """ms a step, and of each ``start`` and ``finish``."""
    batches = bench.decode(batch_size, WARM_UP + num_steps)
    finish = bench.finish or bench.runner.finish
    starts, finishes = [], []
    in_flight = bench.start(batches[0])
    first_s = 0.0
    for i, batch in enumerate(batches[1:], start=1):
        began_s = time.perf_counter()
        following = bench.start(batch)
        started_s = time.perf_counter()
        finish(in_flight)
        finished_s = time.perf_counter()
        in_flight = following
        if i == WARM_UP:
            first_s = finished_s
        elif i > WARM_UP:
            starts.append(1e3 * (started_s - began_s))
            finishes.append(1e3 * (finished_s - started_s))
    finish(in_flight)
    # From the end of step WARM_UP - 1 to that of the last one.
    return 1e3 * (time.perf_counter() - first_s) / num_steps, starts, finishes
