"""One generation, as the scheduler sees it: its tokens, how far they are computed, and what it holds while it runs.

It schedules nothing: what it holds is decided by the scheduler alone. Text and latencies are the output processor's.
Invariant: ``num_computed_tokens < num_tokens`` while unfinished and in no step in flight, so there is always a next
token to sample.
"""

import time
from collections.abc import Sequence
from enum import Enum

from argosy.messages import AdmittedRequest, FinishReason, TokenLogprobs
from argosy.sampling_params import SamplingParams

NO_ROW = -1


class RequestStatus(Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    WAITING_FOR_KV = "waiting_for_kv"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED_STOPPED = "finished_stopped"
    FINISHED_LENGTH = "finished_length"
    FINISHED_ABORTED = "finished_aborted"
    FINISHED_ERROR = "finished_error"

    @property
    def is_finished(self) -> bool:
        return self.value.startswith("finished")

    @staticmethod
    def finished(reason: FinishReason) -> "RequestStatus":
        match reason:
            case FinishReason.STOP:
                return RequestStatus.FINISHED_STOPPED
            case FinishReason.LENGTH:
                return RequestStatus.FINISHED_LENGTH
            case FinishReason.ABORT:
                return RequestStatus.FINISHED_ABORTED
            case FinishReason.ERROR:
                return RequestStatus.FINISHED_ERROR


class Request:
    """A prompt, its sampling settings and its output so far.

    ``priority``: lower runs first. Requests with different ``cache_salt`` never share cache blocks.
    ``output_token_ids``: what it has said already, in another engine; here it goes on as after a preemption, and its
    prompt's log probabilities were told with the first of them.
    """

    __slots__ = (
        "added_s",
        "all_token_ids",
        "arrival",
        "block_hashes",
        "block_ids",
        "cache_salt",
        "check_at",
        "draft_token_ids",
        "eos_token_ids",
        "failure",
        "max_total_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_published_blocks",
        "num_slots",
        "priority",
        "prompt_logprobs",
        "queued_s",
        "request_id",
        "reserve_at",
        "row",
        "sampling_params",
        "status",
        "stopping_token_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling_params: SamplingParams,
        eos_token_ids: tuple[int, ...],
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        output_token_ids: Sequence[int] = (),
    ) -> None:
        self.request_id = request_id
        self.sampling_params = sampling_params
        self.eos_token_ids = eos_token_ids
        self.priority = priority
        self.cache_salt = cache_salt
        self.all_token_ids = [*prompt_token_ids, *output_token_ids]  # prompt, then output
        self.num_prompt_tokens = len(prompt_token_ids)
        # With a grammar the sampler gives an end that is to be ignored only where nothing else is left to say.
        has_end = not sampling_params.ignore_eos or sampling_params.structured_outputs is not None
        ends = eos_token_ids if has_end else ()
        self.stopping_token_ids = frozenset((*ends, *sampling_params.stop_token_ids))

        self.status = RequestStatus.WAITING
        self.arrival = -1  # order of add(), kept through preemptions
        self.added_s = 0.0  # time.monotonic of add()
        self.queued_s = 0.0  # from add() to the first step
        self.max_total_tokens = 0  # prompt + output may not grow past this; known once added
        self.failure: str | None = None  # why it cannot go on
        self.num_computed_tokens = 0  # by now or by a step in flight: where the next step goes on
        self.num_cached_tokens = 0  # found by prefix match when first admitted
        self.draft_token_ids: list[int] = []  # proposals that the next step verifies
        self.row = NO_ROW
        self.block_ids: list[int] = []
        self.num_slots = 0  # tokens that block_ids can hold
        self.block_hashes: list[bytes] = []  # of the full blocks of all_token_ids, as far as they were needed
        self.num_published_blocks = 0  # leading blocks that the block manager may hand to others
        self.reserve_at = 0  # num_computed_tokens from which schedule() must look closer: no slot, or the length limit
        self.check_at = 0  # computed tokens from which update() must look closer: a full block, or the length limit
        # Of prompt tokens 1, 2, ... as far as they are known, kept through preemptions; None: not wanted, or told.
        wants_prompt = sampling_params.prompt_logprobs is not None and not output_token_ids
        self.prompt_logprobs: list[TokenLogprobs] | None = [] if wants_prompt else None

    @property
    def prompt_token_ids(self) -> list[int]:
        """A copy."""
        return self.all_token_ids[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> list[int]:
        """A copy."""
        return self.all_token_ids[self.num_prompt_tokens :]

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.all_token_ids) - self.num_prompt_tokens

    def age(self) -> tuple[int, int]:
        """Requests are served in this order; an older request compares lower."""
        return self.priority, self.arrival

    @property
    def first_prompt_logprob(self) -> int:
        """Position of the first prompt token whose log probability is wanted and not known; 0: there is none."""
        known = self.prompt_logprobs
        return 0 if known is None or len(known) == self.num_prompt_tokens - 1 else len(known) + 1

    @property
    def num_matchable_tokens(self) -> int:
        """In how many leading tokens a cached prefix may be looked for. Skipped positions tell nothing of the tokens
        behind them, so they may only be those whose next token's log probability is known."""
        return self.first_prompt_logprob or len(self.all_token_ids)

    def limit_length(self, max_model_len: int) -> None:
        """Set ``max_total_tokens``.

        Raises:
            ValueError: if not even one output token is possible.
        """
        if self.num_prompt_tokens == 0:
            raise ValueError("the prompt is empty; it must have at least 1 token")
        if self.num_prompt_tokens >= max_model_len:
            raise ValueError(
                f"the prompt has {self.num_prompt_tokens} tokens, but max_model_len is {max_model_len} and at least 1 "
                "token must be left for the output; shorten the prompt or raise --max-model-len"
            )
        max_output_tokens = self.sampling_params.max_tokens or max_model_len
        self.max_total_tokens = min(self.num_prompt_tokens + max_output_tokens, max_model_len)
        if self.num_tokens >= self.max_total_tokens:
            raise ValueError(
                f"the request has {self.num_output_tokens} output tokens already, and its limit is "
                f"{self.max_total_tokens - self.num_prompt_tokens}: it is over"
            )

    def run_in(self, row: int, block_ids: list[int], num_matched: int, block_size: int) -> None:
        """Begin to run, with blocks of which the first ``num_matched`` were found in the cache, computed."""
        self.row, self.block_ids = row, block_ids
        self.num_computed_tokens = num_matched * block_size
        self.num_published_blocks = num_matched
        if self.status is RequestStatus.WAITING:  # after a preemption, its own tokens are no saving to report
            self.num_cached_tokens = self.num_computed_tokens
            self.queued_s = time.monotonic() - self.added_s
        self.status = RequestStatus.RUNNING
        self.set_num_slots(block_size)
        self.set_check(block_size)

    def give_up_place(self) -> None:
        """Run no longer: its blocks and its row are others'."""
        self.row, self.block_ids, self.num_slots = NO_ROW, [], 0

    def start_over(self) -> None:
        """Wait again, with nothing but its tokens; after ``give_up_place``."""
        self.status = RequestStatus.PREEMPTED
        self.num_computed_tokens = 0
        self.draft_token_ids = []

    def set_num_slots(self, block_size: int) -> None:
        """After a change of ``block_ids``."""
        self.num_slots = len(self.block_ids) * block_size
        self.reserve_at = min(self.num_slots, self.max_total_tokens - 1)

    def set_check(self, block_size: int) -> None:
        """After a change of ``num_published_blocks`` or ``prompt_logprobs``, which the first new token takes along."""
        next_check = min((self.num_published_blocks + 1) * block_size, self.max_total_tokens - 1)
        self.check_at = next_check if self.prompt_logprobs is None else 0

    def must_wait(self) -> bool:
        """Whether the step in flight ends the request by length, or verifies drafts, which decide where to go on."""
        is_last = self.num_computed_tokens + 1 >= self.max_total_tokens
        return is_last or (bool(self.draft_token_ids) and self.num_computed_tokens >= self.num_tokens)

    def find_end(self) -> tuple[FinishReason | None, int | str | None]:
        """Whether the last token ends the request, and which of ``stop_token_ids`` did (None for end-of-sequence).

        No token stops before ``min_tokens`` output tokens came before it: the positions that the sampler masks; only
        the end of a grammar does. A token that both stops and is the last allowed counts as a stop.
        """
        if self.failure is not None:
            return FinishReason.ERROR, self.failure
        token_id, params = self.all_token_ids[-1], self.sampling_params
        if token_id in self.stopping_token_ids:
            has_grammar = params.structured_outputs is not None
            is_eos = token_id in self.eos_token_ids and (has_grammar or not params.ignore_eos)
            if self.num_output_tokens > params.min_tokens or (is_eos and has_grammar):
                return FinishReason.STOP, None if is_eos else token_id
        if self.num_tokens >= self.max_total_tokens:
            return FinishReason.LENGTH, None
        return None, None

    def add_prompt_logprobs(self, logprobs: list[TokenLogprobs]) -> None:
        """Of its next prompt tokens."""
        assert self.prompt_logprobs is not None, f"log probabilities that nobody wants: {self!r}"
        self.prompt_logprobs += logprobs

    def take_prompt_logprobs(self, block_size: int) -> list[TokenLogprobs] | None:
        """All of them, to be told with the first new token; None later, and if nobody wants them."""
        told = self.prompt_logprobs
        if told is not None:
            assert len(told) == self.num_prompt_tokens - 1, f"{len(told)} log probabilities of {self!r}"
            self.prompt_logprobs = None
            self.set_check(block_size)
        return told

    def admission(self) -> AdmittedRequest:
        """What the runner must know; a copy, because a batch is a value and the request goes on."""
        return AdmittedRequest(
            self.row,
            self.request_id,
            self.all_token_ids.copy(),
            self.num_prompt_tokens,
            self.num_computed_tokens,
            self.block_ids.copy(),
            self.sampling_params,
            self.first_prompt_logprob,
        )

    def check_integrity(self, block_size: int) -> None:
        """Assert what holds of an unfinished request at any moment. For tests."""
        assert self.num_tokens <= self.max_total_tokens, repr(self)
        assert self.num_computed_tokens <= min(self.num_slots, self.max_total_tokens - 1), repr(self)
        assert self.num_slots == len(self.block_ids) * block_size, repr(self)
        is_running = self.status is RequestStatus.RUNNING
        assert is_running or (self.row == NO_ROW and not self.block_ids), repr(self)

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.value}, {self.num_prompt_tokens} prompt and "
            f"{self.num_output_tokens} output tokens, {self.num_computed_tokens} computed, row {self.row}, "
            f"{len(self.block_ids)} blocks)"
        )


def check_fits_cache(request: Request, block_size: int, num_usable_blocks: int) -> None:
    """``num_usable_blocks``: without the null block.

    Raises:
        ValueError: a request whose length limit is known could outgrow the whole cache.
    """
    num_blocks = -(-(request.max_total_tokens - 1) // block_size)  # the last token is never computed
    if num_blocks > num_usable_blocks:
        raise ValueError(
            f"{request.num_prompt_tokens} prompt tokens and an output of up to "
            f"{request.max_total_tokens - request.num_prompt_tokens} need {num_blocks} cache blocks "
            f"of {block_size} tokens, but the cache has {num_usable_blocks}; "
            "lower max_tokens, or raise --num-blocks or --kv-cache-memory-bytes"
        )
