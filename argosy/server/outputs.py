"""Text for those who wait for it: engines' tokens in, each caller's outputs out.

It knows neither HTTP nor processes: requests go to an ``EngineDoor``, the pool in a server. One event loop, no threads.
Invariant: every request that was opened is ended exactly once: its last output was taken, it was refused, or its
``OutputFeed`` was closed, which aborts what is left of it.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from argosy.engine.output_processor import OutputProcessor, TextEnd
from argosy.engine.prompts import CheckedPrompt
from argosy.engine.replica_messages import AddRequest
from argosy.engine.tokenizer import Tokenizer
from argosy.messages import FinishReason, RequestOutput, TokenDelta
from argosy.sampling_params import SamplingParams
from argosy.server.errors import ApiError, overloaded
from argosy.server.records import NoTracer, RequestRecord, Tracer


class EngineDoor(Protocol):
    """Of the pool, what requests need."""

    def submit(self, request: AddRequest, data_parallel_rank: int | None = None) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def finish(self, request_id: str, reason: FinishReason) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """One prompt to complete."""

    request_id: str
    prompt: CheckedPrompt
    params: SamplingParams
    is_streamed: bool  # outputs as tokens come, each with what is new; else one output at the end
    priority: int = 0
    cache_salt: str | None = None
    data_parallel_rank: int | None = None
    trace_parent: str | None = None  # the caller's span, as the header says it
    build_text_end: Callable[[], TextEnd] | None = None  # of each completion


class Recorder(Protocol):
    """What hears of every output: the metrics in a server."""

    def observe_first_token(self, seconds: float, num_prompt_tokens: int, num_cached_tokens: int) -> None: ...

    def observe_tokens(self, num_tokens: int, seconds: float) -> None: ...

    def count_generated(self, num_tokens: int) -> None: ...

    def observe_end(self, record: RequestRecord) -> None: ...


@dataclass(slots=True)
class _Entry:
    """A request under way."""

    feed: "OutputFeed"
    submission: Submission
    child_ids: tuple[str, ...]
    arrival_s: float
    first_token_s: float | None = None
    last_tokens_s: float = 0.0  # when the last tokens came
    num_tokens: int = 0
    tokens_by_child: dict[str, int] = field(default_factory=dict)  # empty with one child
    num_cached_tokens: int = 0
    queued_s: float = 0.0

    def describe(self, finish_reasons: tuple[str, ...], finished_s: float | None, error: str | None) -> RequestRecord:
        return RequestRecord(
            request_id=self.submission.request_id,
            params=self.submission.params,
            num_prompt_tokens=len(self.submission.prompt.token_ids),
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_tokens,
            longest_output=max(self.tokens_by_child.values(), default=self.num_tokens),
            arrival_s=self.arrival_s,
            queued_s=self.queued_s,
            first_token_s=self.first_token_s,
            finished_s=finished_s,
            finish_reasons=finish_reasons,
            error=error,
            trace_parent=self.submission.trace_parent,
        )


# Of a prompt's position and its output: whether it was told, so that nobody else has to.
TryTell = Callable[[int, RequestOutput], bool]


class OutputFeed:
    """The outputs of one caller's prompts, in the order they come: ``(position of the prompt, output)``.

    Who iterates is woken for them, which costs more than to tell one; so ``tell_at_once`` gives a way past the
    iteration for what comes while that waits.
    """

    def __init__(self, board: "RequestBoard", request_ids: Sequence[str]) -> None:
        self._board = board
        self._positions = {request_id: i for i, request_id in enumerate(request_ids)}
        self._unfinished = set(request_ids)
        self._news: deque[RequestOutput] = deque()
        self.error: ApiError | None = None
        self._has_news = asyncio.Event()
        self._is_waited_for = False  # whoever iterates has taken everything, and sleeps
        self._try_tell: TryTell | None = None
        self._bug: Exception | None = None

    async def __aiter__(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Ends after the last output of all prompts.

        Raises:
            ApiError: a request was refused, aborted by an administrator, or its engine is gone.
        """
        while self._unfinished:
            if self._bug is not None:
                raise self._bug
            if not self._news:
                if self.error is not None:
                    raise self.error
                self._has_news.clear()
                self._is_waited_for = True
                await self._has_news.wait()
                continue
            output = self._news.popleft()
            if output.finished:
                self._unfinished.discard(output.request_id)
            yield self._positions[output.request_id], output

    def tell_at_once(self, try_tell: TryTell) -> None:
        """``try_tell`` gets each output that comes while whoever iterates waits; one that it does not tell, or that
        ends a prompt, is iterated over as ever."""
        self._try_tell = try_tell

    def put(self, output: RequestOutput) -> None:
        # NOTE(order): what was put before and not taken yet comes first.
        if self._is_waited_for and self._try_tell is not None and not output.finished:
            try:
                if self._try_tell(self._positions[output.request_id], output):
                    return
            except Exception as error:  # whoever iterates gets it; the other outputs of this step are not its victims
                self._bug = error
        self._news.append(output)
        self._wake()

    def fail(self, error: ApiError) -> None:
        self.error = self.error or error
        self._wake()

    def close(self) -> None:
        """Abort what is unfinished; a second time does nothing."""
        for request_id in self._positions:
            self._board.drop(request_id, self)

    def _wake(self) -> None:
        self._is_waited_for = False
        self._has_news.set()


class RequestBoard:
    """All requests under way. ``engines`` may be set after construction, because a pool needs ``deliver`` first."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        recorder: Recorder,
        engines: EngineDoor | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._processor = OutputProcessor(tokenizer)
        self._entries: dict[str, _Entry] = {}  # by user request id
        self._owners: dict[str, _Entry] = {}  # by engine request id
        self._recorder = recorder
        self._tracer = tracer or NoTracer()
        self.engines = engines

    @property
    def num_requests(self) -> int:
        """Completions that are unfinished: a prompt with n = 4 counts four times."""
        return len(self._owners)

    @property
    def request_ids(self) -> list[str]:
        return list(self._entries)

    def open(self, submissions: Sequence[Submission]) -> OutputFeed:
        """Start completing prompts; all or none.

        Raises:
            ApiError: an id is in use, no such replica, no engine.
        """
        assert self.engines is not None
        feed = OutputFeed(self, [each.request_id for each in submissions])
        try:
            for each in submissions:
                self._start(each, feed)
        except BaseException:
            feed.close()
            raise
        return feed

    def deliver(self, deltas: Sequence[TokenDelta]) -> None:
        """The pool's news."""
        assert self.engines is not None
        now_s = time.monotonic()
        self._recorder.count_generated(sum([self._record(delta, now_s) for delta in deltas]))
        processed = self._processor.process(deltas, now_s)
        for request_id, reason in processed.finish_request_ids:
            self.engines.finish(request_id, reason)
        for output in processed.outputs:
            entry = self._entries[output.request_id]
            entry.feed.put(output)
            if output.finished:
                reasons = tuple(each.finish_reason for each in output.outputs if each.finish_reason is not None)
                self._tell_end(entry.describe(reasons, now_s, None))
                self._forget(output.request_id)

    def refuse(self, child_id: str, message: str, is_users_fault: bool) -> None:
        """The pool's word that an engine request cannot go on."""
        owner = self._owners.get(child_id)
        if owner is not None:
            error = ApiError(400, message) if is_users_fault else overloaded(message)
            self.end(owner.submission.request_id, error)

    def end(self, request_id: str, error: ApiError) -> bool:
        """End a request from outside, with an error for who waits; False if there is none of this id."""
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        entry.feed.fail(error)
        self.drop(request_id, entry.feed)
        return True

    def drop(self, request_id: str, feed: OutputFeed) -> None:
        """Forget a request of this feed and end its engine requests; one that is over, or another's, is left alone."""
        assert self.engines is not None
        entry = self._entries.get(request_id)
        if entry is None or entry.feed is not feed:
            return
        running = self._processor.remove(request_id)
        for child_id in running:
            self.engines.abort(child_id)
        error = None if feed.error is None else feed.error.message
        self._tell_end(entry.describe(("abort",) * len(running), None, error))
        self._forget(request_id)

    def _start(self, submission: Submission, feed: OutputFeed) -> None:
        assert self.engines is not None
        request_id, prompt = submission.request_id, submission.prompt
        if request_id in self._entries:
            raise ApiError(400, f"request_id {request_id!r} is in use by an unfinished request", param="request_id")
        children = self._processor.add_request(
            request_id,
            prompt.text,
            prompt.token_ids,
            submission.params,
            time.monotonic(),
            is_streamed=submission.is_streamed,
            is_delta=submission.is_streamed,
            build_text_end=submission.build_text_end,
        )
        child_ids = tuple(child.request_id for child in children)
        entry = self._entries[request_id] = _Entry(feed, submission, child_ids, time.monotonic())
        self._owners.update(dict.fromkeys(child_ids, entry))
        for child in children:
            request = AddRequest(
                child.request_id,
                prompt.token_ids,
                child.sampling_params,
                priority=submission.priority,
                cache_salt=submission.cache_salt,
            )
            try:
                self.engines.submit(request, submission.data_parallel_rank)
            except ValueError as error:
                raise ApiError(400, str(error)) from error
            except RuntimeError as error:
                raise ApiError(503, str(error), code="no_engine", retry_after_s=5) from error

    def _record(self, delta: TokenDelta, now_s: float) -> int:
        """How many tokens it has."""
        entry = self._owners.get(delta.request_id)
        num_tokens = len(delta.new_token_ids)
        if entry is None or not num_tokens:
            return 0
        if entry.first_token_s is None:
            entry.first_token_s, entry.queued_s = now_s, delta.queued_s
            entry.num_cached_tokens = delta.num_cached_tokens
            num_prompt_tokens = len(entry.submission.prompt.token_ids)
            self._recorder.observe_first_token(now_s - entry.arrival_s, num_prompt_tokens, delta.num_cached_tokens)
        elif len(entry.child_ids) == 1:
            self._recorder.observe_tokens(num_tokens, now_s - entry.last_tokens_s)
        if len(entry.child_ids) > 1:
            so_far = entry.tokens_by_child.get(delta.request_id, 0)
            entry.tokens_by_child[delta.request_id] = so_far + num_tokens
        entry.last_tokens_s = now_s
        entry.num_tokens += num_tokens
        return num_tokens

    def _tell_end(self, record: RequestRecord) -> None:
        self._recorder.observe_end(record)
        self._tracer.record(record)

    def _forget(self, request_id: str) -> None:
        entry = self._entries.pop(request_id, None)
        for child_id in () if entry is None else entry.child_ids:
            self._owners.pop(child_id, None)
