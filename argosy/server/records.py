"""What is known of a request when it is over: for metrics and traces. It holds no text and no tokens."""

from dataclasses import dataclass
from typing import Protocol

from argosy.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestRecord:
    """One prompt and its completions. Times are ``time.monotonic`` seconds; None while not reached."""

    request_id: str
    params: SamplingParams
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt's
    num_output_tokens: int  # of all completions together
    longest_output: int  # tokens of the longest completion
    arrival_s: float
    queued_s: float  # spent in the engine's queue
    first_token_s: float | None
    finished_s: float | None  # None: it was ended before its last token
    finish_reasons: tuple[str, ...]  # of every completion; "abort" where it was ended from outside
    error: str | None  # in the words that the caller got
    trace_parent: str | None  # the caller's ``traceparent``

    @property
    def prefill_s(self) -> float:
        """From the first step to the first token."""
        assert self.first_token_s is not None
        return max(0.0, self.first_token_s - self.arrival_s - self.queued_s)


class Tracer(Protocol):
    """What hears of every request's end, beside the metrics."""

    def record(self, record: RequestRecord) -> None: ...

    def close(self) -> None:
        """Sends what is left."""


class NoTracer:
    """The null twin."""

    def record(self, record: RequestRecord) -> None:
        """Tells nobody."""

    def close(self) -> None:
        return None
