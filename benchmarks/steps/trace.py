"""What a device did and when, from torch's profiler: kernels and copies, each once.

``profile.events()`` holds the host's calls too, with times of their own: a wait for an event is as long as the step
waited for, so sums over all events come out doubled. Only what ran on the device counts here. On a CPU, to try scripts,
operations that call no other stand for kernels. Invariant: spans are in the order of their starts.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

# A step ends with the copy of its tokens to the host; on a CPU nothing is copied, and the script makes such a span.
STEP_ENDS = {"cuda": "DtoH", "cpu": "finish"}
COPIES = ("Memcpy", "Memset")


@dataclass(frozen=True, slots=True)
class Span:
    """A kernel or a copy; microseconds from any moment."""

    name: str
    start: float
    end: float

    @property
    def us(self) -> float:
        return self.end - self.start

    @property
    def is_copy(self) -> bool:
        return self.name.startswith(COPIES)


@dataclass(frozen=True, slots=True)
class StepTrace:
    """A step among overlapped ones; microseconds."""

    period: float  # from the end of the step before to its own
    gap: float  # from the end of the last kernel or copy of the step before to the start of its first kernel
    inside: float  # after that, while neither a kernel nor a copy ran
    longest_pause: float  # of ``inside``
    num_spans: int


@dataclass(frozen=True, slots=True)
class StepMedians:
    """Of many ``StepTrace``s."""

    period_us: float
    gap_us: float
    gap_share: float
    inside_share: float
    longest_pause_us: float
    kernels_us: float  # sum of kernels and copies


def record(run: Callable[[], object], device_type: str) -> list[Span]:
    """Spans of what ``run`` started, which is waited for."""
    is_cuda = device_type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as profile:
        run()
        if is_cuda:
            torch.cuda.synchronize()
    return device_spans(profile.events(), is_cuda=is_cuda)


def device_spans(events: Iterable[FunctionEvent], *, is_cuda: bool) -> list[Span]:
    """Of a profile's events those that the device ran, each once."""
    if is_cuda:
        events = (e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation)
    else:
        events = (e for e in events if not e.cpu_children)
    spans = {Span(event.name, event.time_range.start, event.time_range.end) for event in events}
    return sorted(spans, key=lambda span: (span.start, span.end))


def split_steps(spans: Sequence[Span], step_end: str) -> list[list[Span]]:
    """A list for each span whose name holds ``step_end``, which it ends with; what follows the last is left out."""
    steps: list[list[Span]] = [[]]
    for span in spans:
        steps[-1].append(span)
        if step_end in span.name:
            steps.append([])
    return steps[:-1]


def trace_steps(steps: Sequence[Sequence[Span]]) -> list[StepTrace]:
    """Of all but the first."""
    traces = []
    for before, step in zip(steps, steps[1:], strict=False):
        previous_end, end = max(span.end for span in before), max(span.end for span in step)
        first_kernel = min((span.start for span in step if not span.is_copy), default=end)
        started = max(first_kernel, previous_end)
        pauses = _pauses([span for span in step if span.end > started], started)
        traces.append(
            StepTrace(end - previous_end, started - previous_end, sum(pauses), max(pauses, default=0.0), len(step))
        )
    return traces


def summarise(steps: Sequence[Sequence[Span]]) -> StepMedians:
    """Of all steps but the first, which only says when the second could begin."""
    traces = trace_steps(steps)
    period = statistics.median(trace.period for trace in traces)
    total = sum(trace.period for trace in traces)
    return StepMedians(
        period_us=period,
        gap_us=statistics.median(trace.gap for trace in traces),
        gap_share=sum(trace.gap for trace in traces) / total,
        inside_share=sum(trace.inside for trace in traces) / total,
        longest_pause_us=statistics.median(trace.longest_pause for trace in traces),
        kernels_us=statistics.median(sum(span.us for span in step) for step in steps[1:]),
    )


def _pauses(spans: Sequence[Span], start: float) -> list[float]:
    """While nothing runs; ``spans`` by their starts, and may overlap."""
    pauses, busy_until = [], start
    for span in spans:
        if span.start > busy_until:
            pauses.append(span.start - busy_until)
        busy_until = max(busy_until, span.end)
    return pauses
