"""What is asked, and when: drawn from a seed, before the first request is sent.

Invariant: the same seed and settings give the same prompts and the same times.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request to send. The prompt is text, since not every endpoint takes token ids; its tokens are about words."""

    prompt: str
    num_output_tokens: int


def draw_requests(
    rng: random.Random, num_prompts: int, input_len: int, output_len: int, range_ratio: float
) -> list[LoadRequest]:
    """Lengths are uniform in [len * (1 - range_ratio), len * (1 + range_ratio)]; prompts share no prefix."""
    requests = []
    for i in range(num_prompts):
        num_words = _draw_length(rng, input_len, range_ratio)
        words = [f"{i}", *(str(rng.randrange(10)) for _ in range(num_words - 1))]
        requests.append(LoadRequest(" ".join(words), _draw_length(rng, output_len, range_ratio)))
    return requests


def arrival_gaps_s(rng: random.Random, request_rate: float, burstiness: float) -> Iterator[float]:
    """Seconds from one request to the next: gamma with mean 1 / request_rate; burstiness 1 is a Poisson process, less
    comes in bursts, more is steadier. An infinite rate sends all at once."""
    while True:
        yield 0.0 if math.isinf(request_rate) else rng.gammavariate(burstiness, 1.0 / (request_rate * burstiness))


def _draw_length(rng: random.Random, length: int, range_ratio: float) -> int:
    spread = int(length * range_ratio)
    return max(1, rng.randint(length - spread, length + spread))
