"""Requests between their prompts and their outputs: started, stepped, and gone without a trace.

It joins prompt checker, grammar checker, engine and output processor; none of them knows another. Invariant: a request
that was started is in the engine and in the output processor, or in neither.
"""

import itertools
import time

from argosy.engine.engine_client import EngineClient
from argosy.engine.output_processor import OutputProcessor
from argosy.engine.prompts import Prompt, PromptChecker
from argosy.engine.replica_messages import AddRequest
from argosy.grammar.checker import GrammarChecker
from argosy.messages import RequestOutput
from argosy.sampling_params import SamplingParams


class RequestLoop:
    """The requests of one ``LLM``. Whoever starts one steps until it is over, or aborts it."""

    def __init__(
        self, client: EngineClient, prompts: PromptChecker, grammars: GrammarChecker, processor: OutputProcessor
    ) -> None:
        self._client = client
        self._prompts = prompts
        self._grammars = grammars
        self._processor = processor
        self._request_ids = (f"request-{i}" for i in itertools.count())

    def check(self, prompt: Prompt, params: SamplingParams, where: str) -> None:
        """Raises ValueError, with ``where`` before its words, if ``start`` would refuse the prompt."""
        try:
            self._prompts.check(prompt, params)
            self._grammars.check(params.structured_outputs)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error

    def start(
        self, prompt: Prompt, params: SamplingParams, data_parallel_rank: int | None, *, is_streamed: bool
    ) -> str:
        """Queue one prompt; its request id.

        Raises:
            ValueError: a prompt or settings that cannot work; nothing is queued.
        """
        checked = self._prompts.check(prompt, params)
        self._grammars.check(params.structured_outputs)
        request_id = next(self._request_ids)
        children = self._processor.add_request(
            request_id, checked.text, checked.token_ids, params, time.monotonic(), is_streamed=is_streamed
        )
        try:
            for child in children:
                request = AddRequest(child.request_id, checked.token_ids, child.sampling_params)
                self._client.add(request, data_parallel_rank)
        except ValueError:
            self.abort(request_id)
            raise
        return request_id

    def step(self) -> list[RequestOutput]:
        """One step of the engine, and what its tokens make of the requests."""
        processed = self._processor.process(self._client.step(), time.monotonic())
        for request_id, reason in processed.finish_request_ids:
            self._client.finish(request_id, reason)
        return processed.outputs

    def abort(self, request_id: str) -> None:
        """End a request that is not over yet, without a trace."""
        for child_id in self._processor.remove(request_id):
            self._client.abort(child_id)
