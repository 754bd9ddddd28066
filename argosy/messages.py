"""What crosses layers and, with several ranks, processes: plain msgspec structs, no torch.

A *row* is a small integer in [0, max_num_seqs) that the scheduler gives a request while it runs. The runner keeps its
per-request state in tables indexed by row, so a step's plan is a few lists of integers. Invariant: everything here
can be encoded by ``msgspec.msgpack`` and decoded to an equal object.
"""

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from argosy.sampling_params import SamplingParams


class FinishReason(StrEnum):
    """Why a request ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"  # its grammar took more than the limits allow; stop_reason says what


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of one token, after temperature-free softmax of the raw logits."""

    token_id: int
    logprob: float
    rank: int  # 1 = the likeliest token
    top_token_ids: list[int] = []
    top_logprobs: list[float] = []


class AdmittedRequest(msgspec.Struct, frozen=True):
    """All the runner must know of a request that takes a row: sent on admission and again after a preemption."""

    row: int
    request_id: str
    token_ids: list[int]  # prompt plus output so far
    num_prompt_tokens: int
    num_computed_tokens: int  # > 0 after a prefix-cache hit
    block_ids: list[int]
    sampling_params: SamplingParams
    first_prompt_logprob: int = 0  # position of the first prompt token whose log probability is wanted; 0 = of none


class ScheduledBatch(msgspec.Struct):
    """One step's plan for one replica. Parallel lists, one entry per scheduled row, decodes first.

    A row is *sampled* in this step when ``num_computed_tokens + num_scheduled_tokens`` equals the tokens it has, the
    one that a step in flight samples included.
    """

    step: int
    rows: list[int] = []
    num_computed_tokens: list[int] = []  # once the steps before this one are done
    num_scheduled_tokens: list[int] = []
    admitted: list[AdmittedRequest] = []  # rows that (re)start in this step
    new_block_ids: list[tuple[int, list[int]]] = []  # (row, blocks to append to its block table)
    num_tokens: int = 0  # sum of num_scheduled_tokens
    num_in_flight: int = 0  # steps started before this one whose tokens the scheduler did not know yet

    @property
    def is_empty(self) -> bool:
        return not self.rows

    @property
    def decode_length(self) -> int:
        """Tokens of the longest sequence, if every row computes one; else 0, and without rows."""
        if self.is_empty or self.num_tokens != len(self.rows):
            return 0
        return max(self.num_computed_tokens) + 1


class StepOutput(msgspec.Struct):
    """What a step produced, parallel to ``ScheduledBatch.rows``."""

    sampled_token_ids: list[list[int]]  # [] for a row that was not sampled
    logprobs: list[list[TokenLogprobs]] | None = None  # parallel to sampled_token_ids; None if nobody asked
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}  # index in rows -> its next prompt tokens, in order
    failures: dict[int, str] = {}  # entry -> why its request cannot go on


class TokenDelta(msgspec.Struct):
    """New tokens of one request, and its end if it ended: engine -> detokeniser."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or string that ended it; None for end-of-sequence
    new_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0
    queued_s: float = 0.0  # from the engine's knowing the request to its first step
    prompt_logprobs: list[TokenLogprobs] | None = None  # of the prompt but its first token; with the first new token


class CompletionOutput(msgspec.Struct):
    """One completion of a prompt, in vLLM's shape."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None


class RequestMetrics(msgspec.Struct):
    """Times of one request, in seconds of ``time.monotonic``; None while not reached."""

    arrival_s: float
    first_token_s: float | None = None
    finished_s: float | None = None


class RequestOutput(msgspec.Struct):
    """All completions of one prompt, in vLLM's shape."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # by prompt token, None for the first; if asked for


class DeploymentStats(msgspec.Struct, frozen=True):
    """What all ranks counted since the start, dummy and warm-up steps included; lists by replica, or by MoE layer."""

    num_ranks: int
    num_steps: list[int]
    num_dummy_steps: list[int]
    num_scheduled_tokens: list[int]
    coordination_us: float  # to agree on a step, the slowest replica's mean: waiting for other replicas included
    bytes_sent: dict[str, int]  # by axis, of all ranks together
    tokens_per_expert: list[list[int]]
    tokens_per_rank: list[list[int]]  # that the experts of each ep rank computed
    num_late_compilations: int = 0  # of kernels, on all ranks, while requests could wait for them
    communication_s: dict[str, float] = {}  # by axis, of all ranks together; see ``Communicator.waited_s``

    @property
    def replica_imbalance(self) -> float:
        return imbalance(self.num_scheduled_tokens)

    @property
    def expert_imbalance(self) -> float:
        """Of the worst layer."""
        return max(map(imbalance, self.tokens_per_expert), default=1.0)

    @property
    def rank_imbalance(self) -> float:
        """Of the worst layer: the factor by which its experts take longer than evenly loaded ones."""
        return max(map(imbalance, self.tokens_per_rank), default=1.0)


def imbalance(counts: Sequence[int]) -> float:
    """The largest over the mean: 1 is even, and so is nothing at all."""
    total = sum(counts)
    return max(counts) * len(counts) / total if total else 1.0
