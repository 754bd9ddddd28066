"""Tokens per second from the times of requests, for people to read.

Invariant: prefill is the prompt tokens that were computed (not found in the prefix cache) over the time to the first
output token; decode is the tokens after the first over the time after it. What has no duration has no rate, instead of
a wrong one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from argosy.messages import RequestOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestSpeed:
    """Counts and seconds. Rates come from sums of these, never from means of rates."""

    num_prefill_tokens: int = 0
    prefill_s: float = 0.0
    num_decode_tokens: int = 0
    decode_s: float = 0.0


def measure_speed(output: RequestOutput) -> RequestSpeed:
    """Of a request that ran alone; with several completions, of the longest."""
    metrics = output.metrics
    if metrics.first_token_s is None:
        return RequestSpeed()
    num_prefill_tokens = len(output.prompt_token_ids) - output.num_cached_tokens
    prefill_s = metrics.first_token_s - metrics.arrival_s
    if metrics.finished_s is None:
        return RequestSpeed(num_prefill_tokens=num_prefill_tokens, prefill_s=prefill_s)
    return RequestSpeed(
        num_prefill_tokens=num_prefill_tokens,
        prefill_s=prefill_s,
        num_decode_tokens=max(len(item.token_ids) for item in output.outputs) - 1,
        decode_s=metrics.finished_s - metrics.first_token_s,
    )


def add_speeds(speeds: Iterable[RequestSpeed]) -> RequestSpeed:
    all_speeds = list(speeds)
    return RequestSpeed(
        num_prefill_tokens=sum(item.num_prefill_tokens for item in all_speeds),
        prefill_s=sum(item.prefill_s for item in all_speeds),
        num_decode_tokens=sum(item.num_decode_tokens for item in all_speeds),
        decode_s=sum(item.decode_s for item in all_speeds),
    )


def describe_speed(speed: RequestSpeed, num_ranks: int = 1) -> str:
    """``prefill 41 tokens, 1,203 tok/s; decode 57 tokens, 88 tok/s``; with several ranks also the rate of each."""
    prefill = _describe_phase("prefill", speed.num_prefill_tokens, speed.prefill_s, num_ranks)
    decode = _describe_phase("decode", speed.num_decode_tokens, speed.decode_s, num_ranks)
    return f"{prefill}; {decode}"


def _describe_phase(name: str, num_tokens: int, seconds: float, num_ranks: int) -> str:
    text = f"{name} {num_tokens:,} tokens, {format_rate(num_tokens, seconds)}"
    if num_ranks == 1 or num_tokens == 0 or seconds <= 0:
        return text
    return f"{text}, {num_tokens / seconds / num_ranks:,.1f} a rank"


def format_rate(num_tokens: int, seconds: float) -> str:
    return f"{num_tokens / seconds:,.0f} tok/s" if num_tokens > 0 and seconds > 0 else "- tok/s"
