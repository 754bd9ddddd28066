"""A scheduler with a fake runner, and every rule of both checked at every step.

The fake runner keeps a cache of slots as the real one does, writes it through block tables, and stores in each slot
what keys and values depend on: the salt, and all tokens up to that position. It then verifies a token's whole history
before computing it, so a wrong prefix hit, a block given out twice or a skipped token fails. Its next token is a
pure function of all tokens before it. Steps are computed in the order in which they are started, as a device does; with
``is_overlapped`` the scheduler learns what a step made only after the next one has started. Invariant: what a request
receives equals ``generate_alone`` of that request.
"""

import zlib
from collections import deque
from dataclasses import dataclass

from argosy.cache.block_manager import NULL_BLOCK, BlockManager
from argosy.engine.request import Request, RequestStatus
from argosy.engine.scheduler import Scheduler
from argosy.messages import FinishReason, ScheduledBatch, StepOutput, TokenDelta, TokenLogprobs
from argosy.sampling_params import SamplingParams

VOCAB_SIZE = 16
EOS_TOKEN_ID = 0


def next_token(token_ids: list[int]) -> int:
    return zlib.crc32(bytes(token_ids)) % VOCAB_SIZE


def generate_alone(
    prompt_token_ids: list[int], params: SamplingParams, max_model_len: int
) -> tuple[list[int], FinishReason, int | None]:
    """The specification: one request, one token at a time, no cache."""
    output: list[int] = []
    while True:
        token_id = next_token(prompt_token_ids + output)
        may_stop = len(output) >= params.min_tokens
        output.append(token_id)
        if may_stop and token_id == EOS_TOKEN_ID and not params.ignore_eos:
            return output, FinishReason.STOP, None
        if may_stop and token_id in params.stop_token_ids:
            return output, FinishReason.STOP, token_id
        if len(output) == params.max_tokens or len(prompt_token_ids) + len(output) == max_model_len:
            return output, FinishReason.LENGTH, None


def prompt_logprobs_alone(prompt: list[int]) -> list[TokenLogprobs]:
    """The specification: a number made of all tokens before; the rank is the position."""
    return [TokenLogprobs(prompt[i], float(zlib.crc32(bytes(prompt[:i]))), i) for i in range(1, len(prompt))]


@dataclass
class FakeRow:
    token_ids: list[int]
    block_ids: list[int]
    salt: str | None
    prompt: list[int]
    first_prompt_logprob: int

    def prompt_logprobs(self, num_computed: int, num_scheduled: int) -> list[TokenLogprobs]:
        """Of the tokens behind those that are computed, as far as they are wanted."""
        if not self.first_prompt_logprob:
            return []
        return [
            each
            for each in prompt_logprobs_alone(self.prompt)
            if each.rank >= self.first_prompt_logprob and num_computed < each.rank <= num_computed + num_scheduled
        ]

    def histories(self, token_ids: list[int], block_size: int) -> list[tuple[int, int]]:
        """(slot, what it must hold) of every position."""
        held: list[tuple[int, int]] = []
        history = hash(self.salt)
        for position, token_id in enumerate(token_ids):
            history = hash((history, token_id))
            block_id = self.block_ids[position // block_size]
            assert block_id != NULL_BLOCK, "a token is kept in the null block"
            held.append((block_id * block_size + position % block_size, history))
        return held


class FakeRunner:
    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.cache: dict[int, int] = {}  # slot -> history
        self.rows: dict[int, FakeRow] = {}

    def execute(self, batch: ScheduledBatch, salts: dict[str, str | None], drafts: dict[int, list[int]]) -> StepOutput:
        for admitted in batch.admitted:
            salt = salts[admitted.request_id]
            prompt, first = admitted.token_ids[: admitted.num_prompt_tokens], admitted.first_prompt_logprob
            self.rows[admitted.row] = FakeRow(list(admitted.token_ids), list(admitted.block_ids), salt, prompt, first)
        for row, block_ids in batch.new_block_ids:
            self.rows[row].block_ids += block_ids
        plan = []
        for row, computed, scheduled in zip(
            batch.rows, batch.num_computed_tokens, batch.num_scheduled_tokens, strict=True
        ):
            token_ids = self.rows[row].token_ids + drafts.get(row, [])
            assert 1 <= scheduled <= len(token_ids) - computed, "more tokens scheduled than known"
            held = self.rows[row].histories(token_ids[: computed + scheduled], self.block_size)
            plan.append((row, computed, token_ids, held))
        for _, computed, _, held in plan:  # all reads come before all writes: nothing of this step may be relied on
            for slot, history in held[:computed]:
                assert self.cache.get(slot) == history, f"slot {slot} does not hold the history it is read for"
        written = [entry for _, computed, _, held in plan for entry in held[computed:]]
        assert len({slot for slot, _ in written}) == len(written), "two tokens are written to one slot"
        self.cache.update(written)
        for _, _, _, held in plan:
            assert all(self.cache[slot] == history for slot, history in held), "a history was overwritten"
        prompt_logprobs = {
            i: told
            for i, (row, computed, _, held) in enumerate(plan)
            if (told := self.rows[row].prompt_logprobs(computed, len(held) - computed))
        }
        sampled = [self._sample(self.rows[row], token_ids, len(held)) for row, _, token_ids, held in plan]
        return StepOutput(sampled, prompt_logprobs=prompt_logprobs)

    def _sample(self, row: FakeRow, token_ids: list[int], num_computed: int) -> list[int]:
        """Greedy verification: drafts are accepted while they are what would have been sampled."""
        if num_computed < len(token_ids):
            return []
        known = len(row.token_ids)
        sampled = [next_token(token_ids[:known])]
        while known < len(token_ids) and token_ids[known] == sampled[-1]:
            known += 1
            sampled.append(next_token(token_ids[:known]))
        row.token_ids = row.token_ids + sampled
        return sampled


class Simulation:
    """Drives a scheduler and checks its rules around every step. ``num_drafts`` > 0 proposes right and wrong drafts."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_model_len: int = 64,
        enable_prefix_caching: bool = True,
        num_drafts: int = 0,
        is_overlapped: bool = False,
    ) -> None:
        self.manager = BlockManager(
            num_blocks, block_size, enable_prefix_caching=enable_prefix_caching, hash_key=bytes(range(32))
        )
        self.scheduler = Scheduler(
            self.manager,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            async_scheduling=is_overlapped,
        )
        self.runner = FakeRunner(block_size)
        self.in_flight: deque[tuple[ScheduledBatch, StepOutput]] = deque()  # started; the scheduler does not know
        self.num_drafts = num_drafts
        self.drafts: dict[int, list[int]] = {}  # by row, of the newest step
        self.requests: dict[str, Request] = {}
        self.salts: dict[str, str | None] = {}
        self.received: dict[str, list[int]] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        self.ends: dict[str, TokenDelta] = {}
        self.silent_ends: set[str] = set()  # finish_request() promises no delta

    def add(
        self,
        prompt_token_ids: list[int],
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        **sampling: object,
    ) -> Request:
        params = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
        name = request_id or f"r{len(self.requests)}"
        request = Request(name, prompt_token_ids, params, (EOS_TOKEN_ID,), priority=priority, cache_salt=cache_salt)
        self.scheduler.add(request)
        self.requests[name], self.salts[name], self.received[name] = request, cache_salt, []
        return request

    def live(self, *statuses: RequestStatus) -> list[Request]:
        return [request for request in self.requests.values() if request.status in statuses]

    def schedule(self) -> ScheduledBatch:
        was_running = self.live(RequestStatus.RUNNING)
        batch = self.scheduler.schedule()
        self.scheduler.check_integrity()
        assert batch.num_in_flight == len(self.in_flight)
        self._check_batch(batch)
        self._check_order(batch, was_running)
        self._check_nothing_left_idle(batch, was_running)
        self.drafts = {request.row: list(request.draft_token_ids) for request in self.scheduler.running}
        return batch

    def execute(self, batch: ScheduledBatch) -> StepOutput:
        return self.runner.execute(batch, self.salts, self.drafts)

    def start(self, batch: ScheduledBatch) -> None:
        if not batch.is_empty:
            self.in_flight.append((batch, self.execute(batch)))

    def finish(self) -> list[TokenDelta]:
        """Update with the oldest step in flight; without one, only what waits to be reported."""
        deltas = self.scheduler.update(*self.in_flight.popleft()) if self.in_flight else self.scheduler.drain()
        self.scheduler.check_integrity()
        self.collect(deltas)
        for request in self.scheduler.running:
            request.draft_token_ids = self._propose(request)
        return deltas

    def complete(self, batch: ScheduledBatch) -> list[TokenDelta]:
        """Execute the batch, then update with the oldest step in flight."""
        self.start(batch)
        return self.finish()

    def step(self) -> list[TokenDelta]:
        """Start as many steps as may be in flight, then finish one."""
        while len(self.in_flight) < self.scheduler.max_steps_in_flight:
            batch = self.schedule()
            self.start(batch)
            if batch.is_empty:
                break
        return self.finish()

    def cancel(self) -> None:
        self.in_flight.clear()
        self.scheduler.cancel_steps()
        self.scheduler.check_integrity()

    def run(self, max_steps: int = 2000) -> None:
        """To the end, then compare every request with the specification."""
        for _ in range(max_steps):
            if not (self.scheduler.has_unfinished() or self.in_flight):
                break
            self.step()
        assert not (self.scheduler.has_unfinished() or self.in_flight), f"unfinished after {max_steps} steps"
        assert self.scheduler.schedule().is_empty
        assert self.scheduler.num_waiting == self.scheduler.num_running == 0
        assert self.manager.num_free_blocks == self.manager.num_usable_blocks, "blocks leaked"
        for name, request in self.requests.items():
            self._check_result(name, request)

    def collect(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            assert delta.request_id not in self.ends, f"{delta.request_id} got a delta after its end"
            assert delta.request_id not in self.silent_ends, f"{delta.request_id} got a delta after finish_request()"
            assert delta.new_token_ids or delta.finish_reason is FinishReason.ABORT
            if delta.prompt_logprobs is not None:
                assert delta.new_token_ids and not self.received[delta.request_id], "not with the first token"
                self.prompt_logprobs[delta.request_id] = delta.prompt_logprobs
            self.received[delta.request_id] += delta.new_token_ids
            if delta.finish_reason is not None:
                self.ends[delta.request_id] = delta

    def _check_result(self, name: str, request: Request) -> None:
        expected, reason, stop_reason = generate_alone(
            request.prompt_token_ids, request.sampling_params, self.scheduler.max_model_len
        )
        tokens = self.received[name]
        wants_prompt = request.sampling_params.prompt_logprobs is not None and bool(tokens)
        told = prompt_logprobs_alone(request.prompt_token_ids) if wants_prompt else None
        assert self.prompt_logprobs.get(name) == told, f"{name} was told {self.prompt_logprobs.get(name)}"
        if name in self.silent_ends or self.ends[name].finish_reason is FinishReason.ABORT:
            assert tokens == expected[: len(tokens)], f"{name} got {tokens}, alone it gets {expected}"
            return
        assert tokens == request.output_token_ids == expected, f"{name} got {tokens}, alone it gets {expected}"
        assert (self.ends[name].finish_reason, self.ends[name].stop_reason) == (reason, stop_reason)

    def _check_batch(self, batch: ScheduledBatch) -> None:
        scheduler = self.scheduler
        assert batch.num_tokens == sum(batch.num_scheduled_tokens) <= scheduler.max_num_batched_tokens
        assert len(set(batch.rows)) == len(batch.rows) <= scheduler.max_num_seqs
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert batch.is_empty >= (not self.live(*_UNFINISHED))
        assert not batch.is_empty or self.in_flight or not self.live(*_UNFINISHED)
        kinds = []
        by_row = {request.row: request for request in scheduler.running}
        for row, computed, scheduled in zip(
            batch.rows, batch.num_computed_tokens, batch.num_scheduled_tokens, strict=True
        ):
            request = by_row[row]
            assert computed + scheduled == request.num_computed_tokens < request.max_total_tokens
            num_drafts = len(request.draft_token_ids)
            assert computed < request.num_tokens + bool(self.in_flight), "behind a token that nobody samples"
            is_decode = scheduled == 1 + num_drafts and computed + 1 >= request.num_tokens
            kinds.append(0 if is_decode and not num_drafts else 1 if is_decode else 2)
        assert [kind == 2 for kind in kinds] == sorted(kind == 2 for kind in kinds), f"prefills before decodes: {kinds}"

    def _check_order(self, batch: ScheduledBatch, was_running: list[Request]) -> None:
        waiting = self.live(RequestStatus.WAITING, RequestStatus.PREEMPTED)
        admitted = [self.requests[entry.request_id] for entry in batch.admitted]
        assert all(start.age() < wait.age() for start in admitted for wait in waiting), "a younger request came first"
        preempted = [request for request in was_running if request.status is RequestStatus.PREEMPTED]
        kept = [request for request in was_running if request.status is RequestStatus.RUNNING]
        assert all(keep.age() < victim.age() for keep in kept for victim in preempted), "an older one was preempted"
        assert not (preempted and admitted), "a request was started with blocks taken from another"
        if kept and not self.in_flight:
            assert min(kept, key=Request.age).row in batch.rows, "the oldest running request did not progress"

    def _check_nothing_left_idle(self, batch: ScheduledBatch, was_running: list[Request]) -> None:
        """The budget is used up, unless nobody wants more, or blocks or rows are short."""
        scheduler, manager = self.scheduler, self.manager
        waiting = self.live(RequestStatus.WAITING, RequestStatus.PREEMPTED)
        was_short = any(request.status is RequestStatus.PREEMPTED for request in was_running)
        if batch.num_tokens == scheduler.max_num_batched_tokens or was_short:
            return
        for request in scheduler.running:
            missing = request.num_tokens - request.num_computed_tokens
            if self.in_flight and request.num_computed_tokens + 1 < request.max_total_tokens:
                missing = max(missing, request.row not in batch.rows and not request.draft_token_ids)
            assert missing <= 0 or manager.num_free_blocks == 0, f"{request!r} could have got {missing} tokens more"
            was_short = was_short or missing > 0
        num_rows_taken = len({*batch.rows, *(row for earlier, _ in self.in_flight for row in earlier.rows)})
        if waiting and not was_short and max(len(scheduler.running), num_rows_taken) < scheduler.max_num_seqs:
            oldest = min(waiting, key=Request.age)
            fits = manager.num_blocks_for(oldest.num_tokens) <= manager.num_free_blocks
            given_up_drafts = self.num_drafts > 0  # blocks may have been short for drafts alone
            assert given_up_drafts or not fits, f"{oldest!r} could have started"

    def _propose(self, request: Request) -> list[int]:
        token_ids = list(request.all_token_ids)
        if request.num_computed_tokens + 1 < len(token_ids):
            return []
        if request.num_computed_tokens >= len(token_ids):
            return request.draft_token_ids  # in flight
        for _ in range(self.num_drafts):
            is_wrong = (len(token_ids) + request.arrival) % 3 == 0
            token_ids.append((next_token(token_ids) + is_wrong) % VOCAB_SIZE)
        return token_ids[request.num_tokens :]


_UNFINISHED = (RequestStatus.WAITING, RequestStatus.RUNNING, RequestStatus.PREEMPTED)
