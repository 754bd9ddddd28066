"""What one request and one run looked like from outside: pure arithmetic on times.

Times are seconds since the run began. Invariant: percentiles are of completed requests only, and how many failed, and
why, stands beside them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

METRICS = ("ttft", "tpot", "itl", "e2el")  # as `vllm bench serve` calls them
LABELS = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "between tokens",
    "e2el": "whole request",
}


@dataclass(slots=True)
class RequestRecord:
    """One request. ``output_times_s`` has the arrival of every event that brought text."""

    num_prompt_tokens: int
    sent_s: float
    output_times_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    num_output_tokens: int = 0
    status: int = 0  # of HTTP; 0 = no answer
    error: str | None = None

    @property
    def is_complete(self) -> bool:
        return self.error is None and bool(self.output_times_s)

    def times_ms(self, metric: str) -> list[float]:
        """The request's values of one metric; none where it has none."""
        times_s = self.output_times_s
        if not times_s:
            return []
        if metric == "ttft":
            return [1e3 * (times_s[0] - self.sent_s)]
        if metric == "tpot":
            steps = self.num_output_tokens - 1
            return [1e3 * (times_s[-1] - times_s[0]) / steps] if steps > 0 else []
        if metric == "itl":
            return [1e3 * (b - a) for a, b in zip(times_s, times_s[1:], strict=False)]
        assert metric == "e2el", metric
        return [1e3 * (self.ended_s - self.sent_s)]


@dataclass(frozen=True, slots=True)
class Summary:
    """One metric over a run, in milliseconds."""

    mean: float
    percentiles: dict[float, float]


@dataclass(frozen=True, slots=True)
class RunReport:
    """One run."""

    duration_s: float
    num_completed: int
    errors: dict[str, int]  # what went wrong -> how often
    num_prompt_tokens: int
    num_output_tokens: int
    summaries: dict[str, Summary]
    goodput: float | None  # requests a second within all limits; None without limits
    peak_concurrency: int

    @property
    def request_throughput(self) -> float:
        return self.num_completed / self.duration_s

    @property
    def output_throughput(self) -> float:
        """Tokens a second."""
        return self.num_output_tokens / self.duration_s

    @property
    def total_throughput(self) -> float:
        return (self.num_output_tokens + self.num_prompt_tokens) / self.duration_s


def summarize(
    records: Sequence[RequestRecord],
    duration_s: float,
    percentiles: Sequence[float],
    limits_ms: Mapping[str, float],
) -> RunReport:
    """``limits_ms``: by metric; a request is good if each of its values is at most the limit."""
    complete = [record for record in records if record.is_complete]
    errors: dict[str, int] = {}
    for record in records:
        if not record.is_complete:
            name = record.error or "no text came"
            errors[name] = errors.get(name, 0) + 1
    values = {metric: [ms for record in complete for ms in record.times_ms(metric)] for metric in METRICS}
    return RunReport(
        duration_s=duration_s,
        num_completed=len(complete),
        errors=errors,
        num_prompt_tokens=sum(record.num_prompt_tokens for record in complete),
        num_output_tokens=sum(record.num_output_tokens for record in complete),
        summaries={metric: _summarize(ms, percentiles) for metric, ms in values.items() if ms},
        goodput=sum(_is_good(record, limits_ms) for record in complete) / duration_s if limits_ms else None,
        peak_concurrency=_peak_concurrency(records),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of ascending values, linear between neighbours."""
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _summarize(values_ms: list[float], percentiles: Sequence[float]) -> Summary:
    ordered = sorted(values_ms)
    return Summary(sum(ordered) / len(ordered), {percent: percentile(ordered, percent) for percent in percentiles})


def _is_good(record: RequestRecord, limits_ms: Mapping[str, float]) -> bool:
    return all(ms <= limit for metric, limit in limits_ms.items() for ms in record.times_ms(metric))


def _peak_concurrency(records: Sequence[RequestRecord]) -> int:
    changes = sorted([(record.sent_s, 1) for record in records] + [(record.ended_s, -1) for record in records])
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak
