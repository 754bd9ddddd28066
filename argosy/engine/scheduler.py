"""Decides what every step computes, and applies what it produced. It counts tokens and blocks; it never sees a tensor.

One rule: give each request up to ``num_tokens + num_draft_tokens - num_computed_tokens`` tokens within the token
budget, running requests first, then waiting ones. Decode, prefill, chunked prefill and verify are that rule with
different numbers; a token that a step in flight samples counts, though nobody knows it yet. "Older" means earlier by
(priority, arrival), and both queues are in that order. Invariant: a request takes blocks only from younger ones, so
with nothing in flight the oldest running request gets at least one token.
"""

import heapq
import time
from bisect import insort
from collections.abc import Sequence

from argosy.cache.block_manager import BlockManager
from argosy.engine.planned_step import PlannedStep, check_order
from argosy.engine.request import Request, RequestStatus, check_fits_cache
from argosy.engine.waiting_queue import WaitingQueue
from argosy.messages import FinishReason, ScheduledBatch, StepOutput, TokenDelta, TokenLogprobs

Logprobs = list[TokenLogprobs] | None  # of one request's new tokens; None unless it asked


class Scheduler:
    """Continuous batching over one cache. The loop is ``schedule -> execute -> update``.

    With ``async_scheduling`` a step may be scheduled before the ``update`` of the one before it: a decode goes on
    behind the token in flight, unless the length limit ends the request there. If that token turns out to be an end,
    what the second step makes of the request is dropped.

    ``add``, ``abort`` and ``finish_request`` may be called at any moment, also between ``schedule`` and ``update``: the
    blocks and the row of a request that ends while steps are in flight are kept until ``update`` or ``cancel_steps``.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        async_scheduling: bool = False,
    ) -> None:
        if min(max_num_seqs, max_num_batched_tokens, max_model_len) < 1:
            raise ValueError(
                f"max_num_seqs ({max_num_seqs}), max_num_batched_tokens ({max_num_batched_tokens}) and max_model_len "
                f"({max_model_len}) must be at least 1"
            )
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.async_scheduling = async_scheduling
        self.running: list[Request] = []
        self.num_steps = 0  # statistics: they only grow
        self.num_scheduled_tokens = 0
        self.num_queried_tokens = self.num_cached_tokens = 0  # looked up in the prefix cache, and found there
        self.num_preemptions = 0
        self._waiting = WaitingQueue()
        self._requests: dict[str, Request] = {}  # every unfinished request
        self._num_arrivals = 0
        self._free_rows = list(range(max_num_seqs))  # a heap: the smallest row is given first
        self._ended_deltas: list[TokenDelta] = []  # aborts that the next update or drain reports
        self._is_out_of_blocks = False  # a running request wanted more blocks than were free in this step
        self._steps: list[PlannedStep] = []  # in flight, oldest first

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def max_steps_in_flight(self) -> int:
        return 2 if self.async_scheduling else 1

    def has_unfinished(self) -> bool:
        """Also True while the end of an aborted request waits to be reported."""
        return bool(self._requests or self._ended_deltas)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: if its id is taken, or if it could never run; the request is not queued then.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request_id {request.request_id!r} is already in use; choose another")
        request.limit_length(self.max_model_len)
        check_fits_cache(request, self.block_manager.block_size, self.block_manager.num_usable_blocks)
        request.arrival = self._num_arrivals
        request.added_s = time.monotonic()
        self._num_arrivals += 1
        self._requests[request.request_id] = request
        self._waiting.push(request)

    def abort(self, request_id: str) -> bool:
        """End a request now. The next ``update`` or ``drain`` reports it with ``FinishReason.ABORT`` and no tokens.

        False for an id that is unknown or has finished.
        """
        request = self._requests.get(request_id)
        if request is None:
            return False
        delta = TokenDelta(request_id, [], FinishReason.ABORT, num_cached_tokens=request.num_cached_tokens)
        self._ended_deltas.append(delta)
        return self.finish_request(request_id, FinishReason.ABORT)

    def finish_request(self, request_id: str, reason: FinishReason) -> bool:
        """End a request for a reason found outside, as a stop string. Reports nothing: the caller knows.

        Returns False for an id that is unknown or has finished.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        was_running = request.status is RequestStatus.RUNNING
        request.status = RequestStatus.finished(reason)
        if not was_running:
            self._waiting.forget_finished()
            return True
        self.running.remove(request)
        if self._steps:
            self._steps[-1].held.append(request)
        else:
            self._release(request)
        return True

    def drain(self) -> list[TokenDelta]:
        """The ends not reported yet; for when there is no step to run. ``update`` reports them too."""
        deltas, self._ended_deltas = self._ended_deltas, []
        return deltas

    def schedule(self) -> ScheduledBatch:
        """Plan the next step. Order of rows: decodes of one token, then decodes that verify drafts, then prefills.

        An empty batch starts no step and needs no ``update``. It is empty if no request is unfinished, and, only while
        a step is in flight, if nothing can be planned before that step is known.
        """
        steps = self._steps
        assert len(steps) < self.max_steps_in_flight, f"schedule() before the update() of step {steps[0].batch.step}"
        batch = ScheduledBatch(self.num_steps, num_in_flight=len(steps))
        step = PlannedStep(batch)
        self._is_out_of_blocks = False
        others, token_budget = self._schedule_running(step)
        step.num_plain_decodes = len(step.requests)
        if token_budget > 0 and not self._is_out_of_blocks:
            token_budget = self._admit_waiting(batch, others, token_budget)
        if others:
            others.sort(key=_is_prefill)  # stable: within each kind, older first
            for request, num_new_tokens in others:
                step.add(request, num_new_tokens)
        if step.requests:
            batch.num_tokens = self.max_num_batched_tokens - token_budget
            self.num_scheduled_tokens += batch.num_tokens
            self.num_steps += 1
            steps.append(step)
        return batch

    def update(self, batch: ScheduledBatch, output: StepOutput) -> list[TokenDelta]:
        """Apply the oldest step in flight: append tokens, publish computed blocks, end what has ended.

        A delta for each request that got tokens, after those of aborted ones; it keeps the lists of ``output``.
        """
        sampled = output.sampled_token_ids
        logprobs: Sequence[Logprobs] = output.logprobs or [None] * len(batch.rows)
        assert len(sampled) == len(logprobs) == len(batch.rows), f"{len(sampled)} outputs for {len(batch.rows)} rows"
        step = self._steps[0] if self._steps else PlannedStep(ScheduledBatch(-1))
        assert step.batch.step == batch.step, f"update() of step {batch.step} instead of step {step.batch.step}"
        deltas, self._ended_deltas = self._ended_deltas, []
        for entry, message in output.failures.items():
            step.requests[entry].failure = message
        self._apply_plain_decodes(step.requests[: step.num_plain_decodes], sampled, logprobs, deltas)
        for i in range(step.num_plain_decodes, len(step.requests)):
            if step.requests[i].status is RequestStatus.RUNNING:
                if i in output.prompt_logprobs:
                    step.requests[i].add_prompt_logprobs(output.prompt_logprobs[i])
                num_done = batch.num_computed_tokens[i] + batch.num_scheduled_tokens[i]
                delta = self._apply_any(step.requests[i], num_done, sampled[i], logprobs[i])
                if delta is not None:
                    deltas.append(delta)
        self._release_held(self._steps.pop(0))
        if len(self._requests) < len(self.running) + len(self._waiting):  # some that ran have ended
            self.running = [request for request in self.running if request.status is RequestStatus.RUNNING]
        return deltas

    def cancel_steps(self) -> None:
        """Forget all steps in flight, one of which failed: everybody who runs starts over, with the tokens it has."""
        running, self.running = self.running, []
        for request in running:
            if request.status is RequestStatus.RUNNING:
                self._preempt(request)
        while self._steps:
            self._release_held(self._steps.pop())

    def check_integrity(self) -> None:
        """Assert the invariants. For tests: linear in everything."""
        holders = [*self.running, *(request for step in self._steps for request in step.held)]
        self.block_manager.check_integrity([request.block_ids for request in holders])
        rows = [request.row for request in holders]
        assert sorted(rows + self._free_rows) == list(range(self.max_num_seqs)), f"{rows} taken, {self._free_rows} free"
        ages = [request.age() for request in self.running]
        assert ages == sorted(ages), f"running is not in order: {ages}"
        assert all(request.status is RequestStatus.RUNNING for request in self.running), "running holds a stranger"
        check_order(self._steps, self.running)
        assert len(self._requests) == len(self.running) + len(self._waiting), "a request is in no queue or in two"
        for request in self._requests.values():
            request.check_integrity(self.block_manager.block_size)

    def _schedule_running(self, step: PlannedStep) -> tuple[list[tuple[Request, int]], int]:
        """Append plain decodes to the step; return the other requests with their tokens, and the budget left."""
        batch = step.batch
        rows, computed, requests = batch.rows, batch.num_computed_tokens, step.requests
        others: list[tuple[Request, int]] = []
        token_budget = self.max_num_batched_tokens
        for request in self.running:  # NOTE(order): _reserve_slots may pop requests behind this one
            if token_budget == 0:
                break
            num_computed = request.num_computed_tokens
            num_done = num_computed + 1
            is_decode = num_done >= len(request.all_token_ids)  # of the last known token, or of the one in flight
            if not is_decode or num_computed >= request.reserve_at or request.draft_token_ids:
                if request.must_wait():
                    continue
                num_new_tokens = self._reserve_slots(request, token_budget, batch)
                if num_new_tokens == 0:
                    break
                if num_new_tokens > 1 or not is_decode:
                    others.append((request, num_new_tokens))
                    token_budget -= num_new_tokens
                    continue
            token_budget -= 1
            rows.append(request.row)
            computed.append(num_computed)
            requests.append(request)
            request.num_computed_tokens = num_done
        batch.num_scheduled_tokens = [1] * len(rows)
        return others, token_budget

    def _reserve_slots(self, request: Request, token_budget: int, batch: ScheduledBatch) -> int:
        """Give a running request blocks for its next tokens; return how many tokens it may compute.

        When blocks run out: drafts are given up first, then younger requests are preempted. The youngest takes what
        fits; with nothing free it sits the step out and keeps its blocks until an older request needs them.
        """
        manager = self.block_manager
        num_computed = request.num_computed_tokens
        num_tokens = max(request.num_tokens, num_computed + 1)  # with the one in flight
        num_drafts = min(len(request.draft_token_ids), request.max_total_tokens - 1 - num_tokens)
        num_new_tokens = min(num_tokens + num_drafts - num_computed, token_budget)
        num_held = len(request.block_ids)
        num_missing = manager.num_blocks_for(num_computed + num_new_tokens) - num_held
        if num_missing > manager.num_free_blocks:
            self._is_out_of_blocks = True
            num_new_tokens = min(num_tokens - num_computed, token_budget)
            num_missing = manager.num_blocks_for(num_computed + num_new_tokens) - num_held
            while num_missing > manager.num_free_blocks and self.running[-1] is not request:
                self._preempt(self.running.pop())
            if num_missing > manager.num_free_blocks:
                num_missing = manager.num_free_blocks
                num_new_tokens = (num_held + num_missing) * manager.block_size - num_computed
                is_stuck = num_new_tokens == 0 and request is self.running[0] and not self._steps
                assert not is_stuck, "the oldest request cannot progress"
        if num_missing > 0:
            block_ids = manager.allocate(num_missing)
            request.block_ids += block_ids
            request.set_num_slots(manager.block_size)
            batch.new_block_ids.append((request.row, block_ids))
        if request.draft_token_ids:
            del request.draft_token_ids[max(0, num_computed + num_new_tokens - num_tokens) :]
        return num_new_tokens

    def _admit_waiting(self, batch: ScheduledBatch, others: list[tuple[Request, int]], token_budget: int) -> int:
        """Start waiting requests, oldest first, while all their known tokens fit; return the budget left."""
        manager = self.block_manager
        while token_budget > 0 and self._free_rows and (request := self._waiting.oldest()) is not None:
            manager.extend_block_hashes(request.block_hashes, request.all_token_ids, request.cache_salt)
            matched = manager.match_prefix(request.block_hashes, request.num_matchable_tokens)
            # A chunk would fit sooner than the whole, but it would be computed only to be preempted.
            num_needed = manager.num_blocks_for(request.num_tokens) - len(matched)
            if num_needed > manager.num_allocatable_blocks(matched):
                break
            self._waiting.pop_oldest()
            num_new_tokens = min(request.num_tokens - len(matched) * manager.block_size, token_budget)
            self._start(request, matched, num_new_tokens)
            batch.admitted.append(request.admission())
            others.append((request, num_new_tokens))
            token_budget -= num_new_tokens
        return token_budget

    def _start(self, request: Request, matched: list[int], num_new_tokens: int) -> None:
        manager = self.block_manager
        num_computed = len(matched) * manager.block_size
        manager.acquire(matched)
        num_missing = manager.num_blocks_for(num_computed + num_new_tokens) - len(matched)
        block_ids = matched + manager.allocate(num_missing)
        request.run_in(heapq.heappop(self._free_rows), block_ids, len(matched), manager.block_size)
        self.num_queried_tokens += request.num_tokens
        self.num_cached_tokens += num_computed
        insort(self.running, request, key=Request.age)

    def _preempt(self, request: Request) -> None:
        """Give up everything but the tokens. The caller has taken it out of ``running``."""
        self._release(request)
        request.start_over()
        self.num_preemptions += 1
        self._waiting.push(request)

    def _apply_plain_decodes(
        self, requests: list[Request], sampled: list[list[int]], logprobs: Sequence[Logprobs], deltas: list[TokenDelta]
    ) -> None:
        """``_append_tokens`` for one token each, written out: with many rows this loop is what bookkeeping costs."""
        is_running = RequestStatus.RUNNING
        for request, new_token_ids, new_logprobs in zip(requests, sampled, logprobs, strict=False):
            if request.status is not is_running:
                continue
            (token_id,) = new_token_ids
            all_token_ids = request.all_token_ids
            num_computed = len(all_token_ids)
            if num_computed >= request.check_at or token_id in request.stopping_token_ids:
                deltas.append(self._append_tokens(request, new_token_ids, new_logprobs))
                continue
            all_token_ids.append(token_id)
            num_cached, queued_s = request.num_cached_tokens, request.queued_s
            deltas.append(TokenDelta(request.request_id, new_token_ids, None, None, new_logprobs, num_cached, queued_s))

    def _apply_any(
        self, request: Request, num_done: int, new_token_ids: list[int], new_logprobs: Logprobs
    ) -> TokenDelta | None:
        """``num_done``: tokens that are computed now, drafts included."""
        num_drafts = len(request.draft_token_ids)
        num_computed = num_done - num_drafts
        is_sampled = num_computed == request.num_tokens
        assert is_sampled <= len(new_token_ids) <= is_sampled * (1 + num_drafts), (
            f"{len(new_token_ids)} tokens for {request!r} after {num_computed} known and {num_drafts} drafts"
        )
        if is_sampled:
            return self._append_tokens(request, new_token_ids, new_logprobs)
        self._publish_computed_blocks(request, num_computed)
        return None

    def _append_tokens(self, request: Request, new_token_ids: list[int], new_logprobs: Logprobs) -> TokenDelta:
        """Append up to the first token that ends the request. All but the last token are computed then.

        Slots of rejected drafts lie beyond ``num_computed_tokens``: the next step writes them again.
        """
        finish_reason: FinishReason | None = None
        stop_reason: int | str | None = None
        for count, token_id in enumerate(new_token_ids, start=1):
            request.all_token_ids.append(token_id)
            finish_reason, stop_reason = request.find_end()
            if finish_reason is not None:
                new_token_ids = new_token_ids[:count]
                new_logprobs = new_logprobs and new_logprobs[:count]
                break
        if request.draft_token_ids:
            request.draft_token_ids = []
            request.num_computed_tokens = request.num_tokens - 1  # nothing is planned behind drafts
        self._publish_computed_blocks(request, request.num_tokens - 1)
        if finish_reason is not None:
            request.status = RequestStatus.finished(finish_reason)
            del self._requests[request.request_id]
            if request.num_computed_tokens < request.num_tokens:
                self._release(request)
            else:
                self._steps[-1].held.append(request)  # it computes the token that has just ended the request
        num_cached, queued_s = request.num_cached_tokens, request.queued_s
        told = request.take_prompt_logprobs(self.block_manager.block_size)
        return TokenDelta(
            request.request_id, new_token_ids, finish_reason, stop_reason, new_logprobs, num_cached, queued_s, told
        )

    def _publish_computed_blocks(self, request: Request, num_computed: int) -> None:
        """``num_computed``: tokens that are known and whose step is done."""
        manager = self.block_manager
        num_full = num_computed // manager.block_size
        if num_full > request.num_published_blocks:
            manager.extend_block_hashes(request.block_hashes, request.all_token_ids, request.cache_salt)
            manager.publish(request.block_ids, request.block_hashes, request.num_published_blocks, num_full)
            request.num_published_blocks = num_full
            request.set_check(manager.block_size)

    def _release_held(self, step: PlannedStep) -> None:
        while step.held:
            self._release(step.held.pop())

    def _release(self, request: Request) -> None:
        """Give back blocks and row."""
        self.block_manager.free(request.block_ids)
        heapq.heappush(self._free_rows, request.row)
        request.give_up_place()


def _is_prefill(entry: tuple[Request, int]) -> bool:
    """A decode has one known token left to compute; drafts come on top of it."""
    return entry[0].num_computed_tokens + 1 < entry[0].num_tokens
