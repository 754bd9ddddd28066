"""Turns what the engine says of its requests into what a user gets for a prompt.

It splits a prompt with n > 1 into n engine requests and joins them again, makes text of tokens, and finds stop strings,
which the engine cannot see. It neither schedules nor samples, and takes the time as an argument.
Invariant: every request that was added and not removed gets exactly one output with ``finished`` set, its last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import msgspec

from argosy.engine.detokenizer import IncrementalDetokenizer, StopMatcher
from argosy.engine.tokenizer import Tokenizer
from argosy.messages import CompletionOutput, FinishReason, RequestMetrics, RequestOutput, TokenDelta, TokenLogprobs
from argosy.sampling_params import MAX_SEED, SamplingParams


class ChildRequest(msgspec.Struct, frozen=True):
    """One engine request of a user's request: with n = 1 it has the same id, else ``request_id#index``."""

    request_id: str
    index: int
    sampling_params: SamplingParams


class ProcessedOutputs(msgspec.Struct):
    """What one step brought."""

    outputs: list[RequestOutput]  # one per user request that changed
    finish_request_ids: list[tuple[str, FinishReason]]  # what the engine must end: stop strings, text ends


class TextEnd(Protocol):
    """Watches one completion's text for an end that stop strings cannot describe."""

    def is_reached(self, text: str) -> bool:
        """Whether the completion ends with this new text."""


class OutputProcessor:
    """The user requests under way."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._requests: dict[str, _UserRequest] = {}
        self._completions: dict[str, _Completion] = {}  # by engine request id; only unfinished ones

    @property
    def num_unfinished(self) -> int:
        """User requests without their last output."""
        return len(self._requests)

    def add_request(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        arrival_s: float,
        *,
        is_streamed: bool = True,
        is_delta: bool = False,
        build_text_end: Callable[[], TextEnd] | None = None,
    ) -> list[ChildRequest]:
        """Registers a user's request and returns the engine requests to start for it.

        Args:
            arrival_s: ``time.monotonic`` seconds, as every time here.
            is_streamed: False gives one output, at the end, instead of one per step.
            is_delta: outputs hold only what is new since the one before, and only completions with news.
            build_text_end: makes each completion's own; it holds before ``min_tokens``, too.

        Raises:
            ValueError: the id, or that of a child, is in use.
        """
        children = split_request(request_id, sampling_params)
        taken = [name for name in (request_id, *(child.request_id for child in children)) if self._is_in_use(name)]
        if taken:
            raise ValueError(f"request_id {taken[0]!r} is in use by an unfinished request; choose another")
        request = _UserRequest(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            arrival_s=arrival_s,
            is_streamed=is_streamed,
            is_delta=is_delta,
            num_unfinished=len(children),
            lacks_prompt_logprobs=sampling_params.prompt_logprobs is not None,
        )
        stop = StopMatcher(sampling_params.stop) if sampling_params.stop else ()  # one for all children
        for child in children:
            text_end = None if build_text_end is None else build_text_end()
            completion = _Completion(request, child, self._tokenizer, stop, text_end)
            request.completions.append(completion)
            self._completions[child.request_id] = completion
        self._requests[request_id] = request
        return children

    def remove(self, request_id: str) -> list[str]:
        """Forgets a user's request, which gets no further output; returns its engine requests that still run.

        An unknown or finished request gives []. What the engine still says of the removed ones is ignored.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return []
        running = [each.request_id for each in request.completions if each.finish_reason is None]
        for child_id in running:
            del self._completions[child_id]
        return running

    def process(self, deltas: Sequence[TokenDelta], now_s: float) -> ProcessedOutputs:
        """Takes the news of one step. Deltas of requests that are finished or removed here are ignored."""
        changed: dict[str, _UserRequest] = {}
        finish_request_ids: list[tuple[str, FinishReason]] = []
        for delta in deltas:
            completion = self._completions.get(delta.request_id)
            if completion is None:
                continue
            completion.apply(delta)
            request = completion.request
            changed[request.request_id] = request
            if delta.prompt_logprobs is not None:
                request.prompt_logprobs, request.lacks_prompt_logprobs = [None, *delta.prompt_logprobs], False
            if request.first_token_s is None and completion.token_ids:
                request.first_token_s = now_s
            if completion.finish_reason is not None:
                self._finish(completion, now_s)
                if delta.finish_reason is None:
                    finish_request_ids.append((completion.request_id, completion.finish_reason))
        outputs = [each.build_output() for each in changed.values() if each.is_due]
        return ProcessedOutputs(outputs, finish_request_ids)

    def _is_in_use(self, request_id: str) -> bool:
        return request_id in self._requests or request_id in self._completions

    def _finish(self, completion: "_Completion", now_s: float) -> None:
        del self._completions[completion.request_id]
        request = completion.request
        request.num_unfinished -= 1
        if request.num_unfinished == 0:
            request.finished_s = now_s
            del self._requests[request.request_id]


def split_request(request_id: str, sampling_params: SamplingParams) -> list[ChildRequest]:
    """The engine requests of a user's request, each with n = 1; a seed gives child i the seed ``seed + i``. The prompt
    is one, so the first child alone is asked about it."""
    if sampling_params.n == 1:
        return [ChildRequest(request_id, 0, sampling_params)]
    children = []
    for index in range(sampling_params.n):
        seed = sampling_params.seed
        if seed is not None:
            seed = (seed + index) % (MAX_SEED + 1)
        prompt_logprobs = sampling_params.prompt_logprobs if index == 0 else None
        child_params = replace(sampling_params, n=1, seed=seed, prompt_logprobs=prompt_logprobs)
        children.append(ChildRequest(f"{request_id}#{index}", index, child_params))
    return children


@dataclass(kw_only=True, slots=True)
class _UserRequest:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    arrival_s: float
    is_streamed: bool
    is_delta: bool
    num_unfinished: int
    lacks_prompt_logprobs: bool  # asked for, and not there yet
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    completions: list["_Completion"] = field(default_factory=list)

    @property
    def is_due(self) -> bool:
        """Whether its news may be told now. Those of other completions wait until the prompt's are there."""
        return self.num_unfinished == 0 or (self.is_streamed and not self.lacks_prompt_logprobs)

    def build_output(self) -> RequestOutput:
        prompt_logprobs = self.prompt_logprobs
        if self.is_delta:
            self.prompt_logprobs = None  # told now
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=self._build_outputs(),
            finished=self.num_unfinished == 0,
            metrics=RequestMetrics(self.arrival_s, self.first_token_s, self.finished_s),
            num_cached_tokens=self.completions[0].num_cached_tokens,  # later children find what the first one computed
            prompt_logprobs=prompt_logprobs,
        )

    def _build_outputs(self) -> list[CompletionOutput]:
        if self.is_delta:
            return [completion.build_delta() for completion in self.completions if completion.has_news]
        return [completion.build_output() for completion in self.completions]


class _Completion:
    """One completion as far as it has come."""

    __slots__ = (
        "_cumulative_logprob",
        "_detokenizer",
        "_index",
        "_logprobs",
        "_num_told_tokens",
        "_pieces",
        "_shows_stop_token",
        "_stop_reason",
        "_text_end",
        "finish_reason",
        "has_news",
        "num_cached_tokens",
        "request",
        "request_id",
        "token_ids",
    )

    def __init__(
        self,
        request: _UserRequest,
        child: ChildRequest,
        tokenizer: Tokenizer,
        stop: StopMatcher | tuple[()],
        text_end: TextEnd | None,
    ) -> None:
        params = child.sampling_params
        self.request = request
        self.request_id = child.request_id
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.num_cached_tokens = 0
        self.has_news = False
        self._num_told_tokens = 0
        self._pieces: list[str] = []  # of the text; once told, deltas forget them
        self._index = child.index
        self._stop_reason: int | str | None = None
        self._logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self._cumulative_logprob = 0.0
        self._text_end = text_end
        self._shows_stop_token = params.include_stop_str_in_output
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, stop, params.include_stop_str_in_output, params.skip_special_tokens, params.min_tokens
        )

    def apply(self, delta: TokenDelta) -> None:
        self.has_news = True
        self.num_cached_tokens = delta.num_cached_tokens
        detokenizer, new_ids = self._detokenizer, delta.new_token_ids
        if delta.finish_reason is not None or self._text_end is not None:
            new_ids = self._apply_with_end(delta)
        else:
            num_before = detokenizer.num_tokens
            self._pieces.append(detokenizer.append(new_ids))
            if detokenizer.stop_reason is not None:
                self._stop_at_string(detokenizer.stop_reason)
                new_ids = new_ids[: detokenizer.num_tokens - num_before]
        self.token_ids += new_ids
        if self._logprobs is not None:
            self._add_logprobs(self._logprobs, delta.new_logprobs, len(new_ids))

    def build_output(self) -> CompletionOutput:
        logprobs = self._logprobs
        self._pieces = ["".join(self._pieces)]
        return CompletionOutput(
            index=self._index,
            text=self._pieces[0],
            token_ids=self.token_ids.copy(),  # the user may keep an output while this list grows
            finish_reason=None if self.finish_reason is None else self.finish_reason.value,
            stop_reason=self._stop_reason,
            cumulative_logprob=None if logprobs is None else self._cumulative_logprob,
            logprobs=None if logprobs is None else logprobs.copy(),
        )

    def build_delta(self) -> CompletionOutput:
        """What came since the last call; ``cumulative_logprob`` stays that of all tokens."""
        logprobs, num_told = self._logprobs, self._num_told_tokens
        output = CompletionOutput(
            self._index,
            "".join(self._pieces),
            self.token_ids[num_told:],
            None if self.finish_reason is None else self.finish_reason.value,
            self._stop_reason,
            None if logprobs is None else self._cumulative_logprob,
            None if logprobs is None else logprobs[num_told:],
        )
        self._pieces.clear()
        self._num_told_tokens = len(self.token_ids)
        self.has_news = False
        return output

    def _apply_with_end(self, delta: TokenDelta) -> list[int]:
        """Of a delta that ends the completion, or may; the new tokens that belong to it."""
        detokenizer = self._detokenizer
        new_ids = delta.new_token_ids
        num_before = detokenizer.num_tokens
        # A stop token (or end-of-sentence) belongs to token_ids, and to the text only on request.
        is_last_hidden = delta.finish_reason in (FinishReason.STOP, FinishReason.ERROR) and not self._shows_stop_token
        is_at_end = self._append(new_ids[:-1] if is_last_hidden else new_ids)
        self.finish_reason, self._stop_reason = delta.finish_reason, delta.stop_reason
        if is_at_end:
            self.finish_reason, self._stop_reason = FinishReason.STOP, None
        if self.finish_reason is not None:
            self._pieces.append(detokenizer.finish())
        if detokenizer.stop_reason is not None:
            self._stop_at_string(detokenizer.stop_reason)
        if is_at_end or detokenizer.stop_reason is not None:
            return new_ids[: detokenizer.num_tokens - num_before]
        return new_ids

    def _append(self, token_ids: list[int]) -> bool:
        """Whether the text is at its end; then the tokens behind it were not taken."""
        if self._text_end is None:
            self._pieces.append(self._detokenizer.append(token_ids))
            return False
        for token_id in token_ids:
            shown = self._detokenizer.append([token_id])
            self._pieces.append(shown)
            if self._text_end.is_reached(shown):
                return True
        return False

    def _stop_at_string(self, stop: str) -> None:
        self.finish_reason, self._stop_reason = FinishReason.STOP, stop

    def _add_logprobs(
        self, logprobs: list[TokenLogprobs], new_logprobs: list[TokenLogprobs] | None, num_tokens: int
    ) -> None:
        if num_tokens == 0:
            return
        assert new_logprobs is not None and len(new_logprobs) >= num_tokens, f"{self.request_id}: logprobs are missing"
        kept = new_logprobs[:num_tokens]
        logprobs += kept
        self._cumulative_logprob += sum(each.logprob for each in kept)
