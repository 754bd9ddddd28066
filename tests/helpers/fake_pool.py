"""A pool without processes: a request's tokens are a function of its prompt, and come when the test lets them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from argosy.engine.replica_messages import AddRequest
from argosy.messages import FinishReason, TokenDelta, TokenLogprobs


@dataclass
class Running:
    request: AddRequest
    token_ids: list[int]
    num_told: int = 0


def describe_prompt(request: AddRequest) -> list[TokenLogprobs] | None:
    """Of the token at position i: -i, and rank 2 behind token 5."""
    num_top = request.sampling_params.prompt_logprobs
    if num_top is None:
        return None
    return [
        TokenLogprobs(token_id, -float(i), 2, [5, token_id][:num_top], [-0.25, -float(i)][:num_top])
        for i, token_id in enumerate(request.prompt_token_ids)
        if i > 0
    ]


class FakePool:
    """``EngineDoor``. ``answer(prompt_token_ids)`` gives a request's tokens, with the end token if it ends."""

    def __init__(self, answer: Callable[[list[int]], list[int]], eos_token_id: int, deliver: object = None) -> None:
        self.answer = answer
        self.eos_token_id = eos_token_id
        self.deliver: Callable[[list[TokenDelta]], None] = deliver  # type: ignore[assignment]
        self.running: dict[str, Running] = {}
        self.aborted: list[str] = []
        self.finished: list[str] = []
        self.replicas: list[int | None] = []
        self.is_held = False
        self.refusal: Exception | None = None

    def submit(self, request: AddRequest, data_parallel_rank: int | None = None) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.replicas.append(data_parallel_rank)
        limit = request.sampling_params.max_tokens or 1000
        self.running[request.request_id] = Running(request, self.answer(request.prompt_token_ids)[:limit])
        if not self.is_held:
            asyncio.get_running_loop().call_soon(self.step)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.running.pop(request_id, None)

    def finish(self, request_id: str, reason: FinishReason) -> None:
        self.finished.append(request_id)
        self.running.pop(request_id, None)

    def step(self) -> None:
        """One token of every running request."""
        deltas = []
        for request_id, running in list(self.running.items()):
            token_id = running.token_ids[running.num_told]
            running.num_told += 1
            is_last = running.num_told == len(running.token_ids)
            reason = None
            if is_last:
                reason = FinishReason.STOP if token_id == self.eos_token_id else FinishReason.LENGTH
                del self.running[request_id]
            logprobs = None
            if running.request.sampling_params.logprobs is not None:
                num_top = running.request.sampling_params.logprobs
                logprobs = [TokenLogprobs(token_id, -0.5, 1, [token_id, 5][:num_top], [-0.5, -1.5][:num_top])]
            prompt_logprobs = describe_prompt(running.request) if running.num_told == 1 else None
            deltas.append(TokenDelta(request_id, [token_id], reason, None, logprobs, 1, 0.0, prompt_logprobs))
        if deltas:
            self.deliver(deltas)
        if self.running and not self.is_held:
            asyncio.get_running_loop().call_soon(self.step)
