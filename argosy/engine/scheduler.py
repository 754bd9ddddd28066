"""Decides what every step computes, and applies what it produced. It counts tokens and blocks; it never sees a tensor.

One rule: give each request up to ``num_tokens + num_draft_tokens - num_computed_tokens`` tokens within the token
budget, running requests first, then waiting ones. Decode, prefill, chunked prefill and verify are that rule with
different numbers. "Older" means earlier by (priority, arrival), and both queues are in that order. Invariant: a request
takes blocks only from younger ones, so the oldest running request gets at least one token in every step.
"""

import heapq
from bisect import insort
from collections.abc import Sequence

from argosy.cache.block_manager import BlockManager
from argosy.engine.request import NO_ROW, Request, RequestStatus, check_fits_cache
from argosy.engine.waiting_queue import WaitingQueue
from argosy.messages import FinishReason, ScheduledBatch, StepOutput, TokenDelta, TokenLogprobs

Logprobs = list[TokenLogprobs] | None  # of one request's new tokens; None unless it asked


class Scheduler:
    """Continuous batching over one cache. The loop is ``schedule -> execute -> update``, one step at a time.

    ``add``, ``abort`` and ``finish_request`` may be called at any moment, also between ``schedule`` and ``update``: the
    blocks and the row of a request that ends while a step is in flight are kept until ``update`` or ``cancel_step``.
    """

    def __init__(
        self, block_manager: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
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
        self.running: list[Request] = []
        self.num_steps = 0  # statistics: they only grow
        self.num_scheduled_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self._waiting = WaitingQueue()
        self._requests: dict[str, Request] = {}  # every unfinished request
        self._num_arrivals = 0
        self._free_rows = list(range(max_num_seqs))  # a heap: the smallest row is given first
        self._ended_deltas: list[TokenDelta] = []  # aborts that the next update or drain reports
        self._is_out_of_blocks = False  # a running request wanted more blocks than were free in this step
        self._in_flight: list[Request] = []  # parallel to the rows of the batch being executed
        self._num_plain_decodes = 0  # leading entries of _in_flight that compute their last known token and no draft
        self._held: list[Request] = []  # ended while in flight: the step may still write their blocks

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self.running)

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
        self._num_arrivals += 1
        self._requests[request.request_id] = request
        self._waiting.push(request)

    def abort(self, request_id: str) -> bool:
        """End a request now. The next ``update`` or ``drain`` reports it with ``FinishReason.ABORT`` and no tokens.

        Returns False for an id that is unknown or has finished.
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
        if self._in_flight:
            self._held.append(request)
        else:
            self._release(request)
        return True

    def drain(self) -> list[TokenDelta]:
        """The ends not reported yet; for when there is no step to run. ``update`` reports them too."""
        deltas, self._ended_deltas = self._ended_deltas, []
        return deltas

    def schedule(self) -> ScheduledBatch:
        """Plan the next step. Order of rows: decodes of one token, then decodes that verify drafts, then prefills.

        The batch is empty if and only if no request is unfinished; an empty one starts no step and needs no ``update``.
        """
        assert not self._in_flight, "schedule() before the update() of the step in flight"
        batch = ScheduledBatch(self.num_steps)
        self._is_out_of_blocks = False
        others, token_budget = self._schedule_running(batch)
        self._num_plain_decodes = len(self._in_flight)
        if token_budget > 0 and not self._is_out_of_blocks:
            token_budget = self._admit_waiting(batch, others, token_budget)
        if others:
            others.sort(key=_is_prefill)  # stable: within each kind, older first
            for request, num_new_tokens in others:
                self._in_flight.append(request)
                batch.rows.append(request.row)
                batch.num_computed_tokens.append(request.num_computed_tokens)
                batch.num_scheduled_tokens.append(num_new_tokens)
        if self._in_flight:
            batch.num_tokens = self.max_num_batched_tokens - token_budget
            self.num_scheduled_tokens += batch.num_tokens
            self.num_steps += 1
        return batch

    def update(self, batch: ScheduledBatch, output: StepOutput) -> list[TokenDelta]:
        """Apply a step: append tokens, publish computed blocks, end what has ended.

        One delta for each request that got tokens, after those for requests aborted since the last report. Lists of
        ``output`` are passed on in the deltas, not copied.
        """
        sampled = output.sampled_token_ids
        logprobs: Sequence[Logprobs] = output.logprobs or [None] * len(batch.rows)
        assert len(sampled) == len(logprobs) == len(batch.rows), f"{len(sampled)} outputs for {len(batch.rows)} rows"
        in_flight = self._take_in_flight(batch)
        deltas, self._ended_deltas = self._ended_deltas, []
        num_plain_decodes = self._num_plain_decodes
        self._apply_plain_decodes(in_flight[:num_plain_decodes], sampled, logprobs, deltas)
        for i in range(num_plain_decodes, len(in_flight)):
            if in_flight[i].status is RequestStatus.RUNNING:
                delta = self._apply_any(in_flight[i], batch.num_scheduled_tokens[i], sampled[i], logprobs[i])
                if delta is not None:
                    deltas.append(delta)
        self._release_held()
        if len(self._requests) < len(self.running) + len(self._waiting):  # some that ran have ended
            self.running = [request for request in self.running if request.status is RequestStatus.RUNNING]
        return deltas

    def cancel_step(self, batch: ScheduledBatch) -> None:
        """Forget a step that failed or was interrupted: its requests start over, with the tokens they have."""
        for request in self._take_in_flight(batch):
            if request.status is RequestStatus.RUNNING:
                self.running.remove(request)
                self._preempt(request)
        self._release_held()

    def check_integrity(self) -> None:
        """Assert the invariants. For tests: linear in everything."""
        holders = [*self.running, *self._held]
        self.block_manager.check_integrity([request.block_ids for request in holders])
        rows = [request.row for request in holders]
        assert sorted(rows + self._free_rows) == list(range(self.max_num_seqs)), f"{rows} taken, {self._free_rows} free"
        ages = [request.age() for request in self.running]
        assert ages == sorted(ages), f"running is not in order: {ages}"
        assert all(request.status is RequestStatus.RUNNING for request in self.running), "running holds a stranger"
        assert self._in_flight or not self._held, "blocks are held for a step that is not in flight"
        assert len(self._requests) == len(self.running) + len(self._waiting), "a request is in no queue or in two"
        for request in self._requests.values():
            assert request.num_computed_tokens < request.num_tokens <= request.max_total_tokens, repr(request)
            assert request.num_computed_tokens <= request.num_slots, repr(request)
            assert request.num_slots == len(request.block_ids) * self.block_manager.block_size, repr(request)
            is_running = request.status is RequestStatus.RUNNING
            assert is_running or (request.row == NO_ROW and not request.block_ids), repr(request)

    def _schedule_running(self, batch: ScheduledBatch) -> tuple[list[tuple[Request, int]], int]:
        """Append plain decodes to the batch; return the other requests with their tokens, and the budget left."""
        rows, computed, in_flight = batch.rows, batch.num_computed_tokens, self._in_flight
        others: list[tuple[Request, int]] = []
        token_budget = self.max_num_batched_tokens
        for request in self.running:  # NOTE(order): _reserve_slots may pop requests behind this one
            if token_budget == 0:
                break
            num_computed = request.num_computed_tokens
            is_decode = num_computed + 1 == len(request.all_token_ids)
            if not is_decode or num_computed == request.num_slots or request.draft_token_ids:
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
            in_flight.append(request)
        batch.num_scheduled_tokens = [1] * len(rows)
        return others, token_budget

    def _reserve_slots(self, request: Request, token_budget: int, batch: ScheduledBatch) -> int:
        """Give a running request blocks for its next tokens; return how many tokens it may compute.

        When blocks run out: drafts are given up first, then younger requests are preempted. The youngest takes what
        fits; with nothing free it sits the step out and keeps its blocks until an older request needs them.
        """
        manager = self.block_manager
        num_computed, num_tokens = request.num_computed_tokens, request.num_tokens
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
                assert num_new_tokens > 0 or request is not self.running[0], "the oldest request cannot progress"
        if num_missing > 0:
            block_ids = manager.allocate(num_missing)
            request.block_ids += block_ids
            request.num_slots += num_missing * manager.block_size
            batch.new_block_ids.append((request.row, block_ids))
        if request.draft_token_ids:
            del request.draft_token_ids[max(0, num_computed + num_new_tokens - num_tokens) :]
        return num_new_tokens

    def _admit_waiting(self, batch: ScheduledBatch, others: list[tuple[Request, int]], token_budget: int) -> int:
        """Start waiting requests, oldest first, while all their known tokens fit; return the budget left."""
        manager = self.block_manager
        while token_budget > 0 and self._free_rows and (request := self._waiting.oldest()) is not None:
            manager.extend_block_hashes(request.block_hashes, request.all_token_ids, request.cache_salt)
            matched = manager.match_prefix(request.block_hashes, request.num_tokens)
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
        request.block_ids = matched + manager.allocate(num_missing)
        request.num_slots = len(request.block_ids) * manager.block_size
        request.num_computed_tokens = num_computed
        request.num_published_blocks = len(matched)
        if request.status is RequestStatus.WAITING:  # after a preemption, its own tokens are no saving to report
            request.num_cached_tokens = num_computed
        self.num_cached_tokens += num_computed
        request.row = heapq.heappop(self._free_rows)
        request.status = RequestStatus.RUNNING
        self._set_check(request)
        insort(self.running, request, key=Request.age)

    def _preempt(self, request: Request) -> None:
        """Give up everything but the tokens. The caller has taken it out of ``running``."""
        self._release(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.draft_token_ids = []
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
            request.num_computed_tokens = num_computed
            deltas.append(
                TokenDelta(request.request_id, new_token_ids, None, None, new_logprobs, request.num_cached_tokens)
            )

    def _apply_any(
        self, request: Request, num_scheduled: int, new_token_ids: list[int], new_logprobs: Logprobs
    ) -> TokenDelta | None:
        num_drafts = len(request.draft_token_ids)
        num_computed = request.num_computed_tokens + num_scheduled - num_drafts
        is_sampled = num_computed == request.num_tokens
        assert is_sampled <= len(new_token_ids) <= is_sampled * (1 + num_drafts), (
            f"{len(new_token_ids)} tokens for {request!r} after {num_scheduled} more with {num_drafts} drafts"
        )
        if is_sampled:
            request.draft_token_ids = []
            return self._append_tokens(request, new_token_ids, new_logprobs)
        request.num_computed_tokens = num_computed
        self._publish_computed_blocks(request)
        return None

    def _append_tokens(self, request: Request, new_token_ids: list[int], new_logprobs: Logprobs) -> TokenDelta:
        """Append up to the first token that ends the request. All but the last token are computed then.

        Slots of rejected drafts lie beyond ``num_computed_tokens``: the next step writes them again.
        """
        finish_reason, stop_reason = None, None
        for count, token_id in enumerate(new_token_ids, start=1):
            request.all_token_ids.append(token_id)
            finish_reason, stop_reason = request.find_end()
            if finish_reason is not None:
                new_token_ids = new_token_ids[:count]
                new_logprobs = new_logprobs and new_logprobs[:count]
                break
        request.num_computed_tokens = request.num_tokens - 1
        self._publish_computed_blocks(request)
        if finish_reason is not None:
            request.status = RequestStatus.finished(finish_reason)
            del self._requests[request.request_id]
            self._release(request)
        return TokenDelta(
            request.request_id, new_token_ids, finish_reason, stop_reason, new_logprobs, request.num_cached_tokens
        )

    def _publish_computed_blocks(self, request: Request) -> None:
        manager = self.block_manager
        num_full = request.num_computed_tokens // manager.block_size
        if num_full > request.num_published_blocks:
            manager.extend_block_hashes(request.block_hashes, request.all_token_ids, request.cache_salt)
            manager.publish(request.block_ids, request.block_hashes, request.num_published_blocks, num_full)
            request.num_published_blocks = num_full
            self._set_check(request)

    def _set_check(self, request: Request) -> None:
        next_full = (request.num_published_blocks + 1) * self.block_manager.block_size
        request.check_at = min(next_full, request.max_total_tokens - 1)

    def _take_in_flight(self, batch: ScheduledBatch) -> list[Request]:
        assert batch.is_empty or batch.step == self.num_steps - 1, f"step {batch.step} after step {self.num_steps - 1}"
        assert len(batch.rows) == len(self._in_flight), f"step {batch.step} is not in flight"
        in_flight, self._in_flight = self._in_flight, []
        return in_flight

    def _release_held(self) -> None:
        for request in self._held:
            self._release(request)
        self._held = []

    def _release(self, request: Request) -> None:
        """Give back blocks and row."""
        self.block_manager.free(request.block_ids)
        heapq.heappush(self._free_rows, request.row)
        request.row = NO_ROW
        request.block_ids = []
        request.num_slots = 0


def _is_prefill(entry: tuple[Request, int]) -> bool:
    """A decode has one known token left to compute; drafts come on top of it."""
    return entry[0].num_computed_tokens + 1 < entry[0].num_tokens
