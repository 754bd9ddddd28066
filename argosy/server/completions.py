"""``/v1/completions`` and ``/generate``: their answers, whole and streamed.

Invariant: the pieces of a stream, joined by choice, are the answer that the same request gets unstreamed.
"""

import time
from collections.abc import AsyncIterator, Mapping
from itertools import chain

import msgspec

from argosy.engine.prompts import CheckedPrompt
from argosy.engine.tokenizer import Tokenizer
from argosy.messages import CompletionOutput, RequestOutput, TokenLogprobs
from argosy.server.logprobs import (
    TextOffsets,
    describe_logprobs,
    find_prompt_offsets,
    write_entries,
    write_logprobs,
    write_prompt_logprobs,
)
from argosy.server.outputs import OutputFeed
from argosy.server.protocol import CompletionRequest, GenerateRequest
from argosy.server.streaming import DONE, EventFrame, TextFrame, as_event
from argosy.server.usage import Usage


class CompletionAnswer:
    """One request's answer while it grows."""

    def __init__(
        self,
        request: CompletionRequest,
        prompts: list[CheckedPrompt],
        tokenizer: Tokenizer,
        *,
        answer_id: str,
        model: str,
    ) -> None:
        self._request = request
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._base = {"id": f"cmpl-{answer_id}", "object": "text_completion", "created": int(time.time())}
        self._base["model"] = model
        self._usage = Usage([len(prompt.token_ids) for prompt in prompts])
        self._offsets: dict[int, TextOffsets] = {}  # by choice
        self._started: set[int] = set()  # choices of which something was told
        self._frame = EventFrame(self._base)
        self._text_frame = TextFrame(self._frame, self._text_chunk)
        self._is_plain = _differ_in_text_alone(request)
        # By prompt, from its first output on.
        self._prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}
        self._written_prompt_logprobs: dict[int, msgspec.Raw] = {}  # where they were asked for

    async def whole(self, feed: OutputFeed) -> dict[str, object]:
        choices: dict[int, dict[str, object]] = {}
        async for position, output in self._outputs(feed):
            for completion in output.outputs:
                index = self._index(position, completion)
                choices[index] = await self._choice(position, completion, is_first=True)
        answer = self._base | {"choices": [choices[i] for i in sorted(choices)], "usage": self._usage.as_dict()}
        if self._request.return_token_ids:
            answer["prompt_token_ids"] = [prompt.token_ids for prompt in self._prompts]
        return answer

    async def events(self, feed: OutputFeed) -> AsyncIterator[bytes]:
        options, started = self._request.stream_options, self._started
        async for position, output in self._outputs(feed):
            choices = []
            for completion in output.outputs:
                index = self._index(position, completion)
                if _says_something(completion, self._request) or index not in started:
                    choices.append(await self._choice(position, completion, is_first=index not in started))
                    started.add(index)
            if choices:
                yield self._frame.fill(self._chunk(choices))
        if options is not None and options.include_usage:
            yield self._frame.fill({"choices": [], "usage": self._usage.as_dict()})
        yield DONE

    def try_event(self, position: int, output: RequestOutput) -> bytes | None:
        """Of choices that have begun and tell nothing but text."""
        if not self._is_plain or output.prompt_logprobs is not None:
            return None
        indices = [self._index(position, completion) for completion in output.outputs]
        if not self._started.issuperset(indices):
            return None
        self._usage.add(position, output)
        if len(indices) == 1 and output.outputs[0].finish_reason is None:
            text = output.outputs[0].text
            return self._text_frame.fill(indices[0], text) if text else b""
        pairs = zip(indices, output.outputs, strict=True)
        choices = [_describe_choice(i, each) for i, each in pairs if _says_something(each, self._request)]
        return self._frame.fill(self._chunk(choices)) if choices else b""

    def _text_chunk(self, index: int, text: str) -> dict[str, object]:
        return self._chunk([_describe_choice(index, CompletionOutput(0, text, []))])

    def _chunk(self, choices: list[dict[str, object]]) -> dict[str, object]:
        options = self._request.stream_options
        chunk: dict[str, object] = {"choices": choices}
        if options is not None and (options.include_usage or options.continuous_usage_stats):
            chunk["usage"] = self._usage.as_dict() if options.continuous_usage_stats else None
        return chunk

    async def _outputs(self, feed: OutputFeed) -> AsyncIterator[tuple[int, RequestOutput]]:
        async for position, output in feed:
            told = _without_completions(output) if self._request.is_prompt_only else output
            self._usage.add(position, told)
            if told.prompt_logprobs is not None:
                await self._take_prompt_logprobs(position, told.prompt_logprobs)
            yield position, told

    async def _take_prompt_logprobs(self, position: int, entries: list[TokenLogprobs | None]) -> None:
        self._prompt_logprobs[position] = entries
        num_top = self._request.prompt_logprobs
        if num_top is not None:
            self._written_prompt_logprobs[position] = await write_prompt_logprobs(self._tokenizer, entries, num_top)

    def _index(self, position: int, completion: CompletionOutput) -> int:
        return position * self._request.n + completion.index

    async def _choice(self, position: int, completion: CompletionOutput, *, is_first: bool) -> dict[str, object]:
        prompt_text = self._prompt_text(position) if is_first and self._request.echo else ""
        choice = _describe_choice(self._index(position, completion), completion)
        if prompt_text:
            choice["text"] = prompt_text + completion.text
        if completion.logprobs is not None:
            choice["logprobs"] = await self._logprobs(position, completion, prompt_text, is_first=is_first)
        if is_first and self._request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._written_prompt_logprobs[position]
        if self._request.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice

    async def _logprobs(
        self, position: int, completion: CompletionOutput, prompt_text: str, *, is_first: bool
    ) -> Mapping[str, object]:
        """Of the new tokens, and in the first piece of an echo of the prompt's."""
        request, tokenizer, new = self._request, self._tokenizer, completion.logprobs or []
        offsets = self._offsets.setdefault(self._index(position, completion), TextOffsets(len(prompt_text)))
        shown_bytes = tokenizer.byte_table(skip_special_tokens=request.skip_special_tokens)
        token_ids = [entry.token_id for entry in new]
        entries: list[TokenLogprobs | None] = [*new]
        starts = [offsets.add(shown_bytes[token_id]) for token_id in token_ids]
        if is_first and request.echo:
            prompt = self._prompts[position]
            return await write_logprobs(
                tokenizer,
                prompt.token_ids + token_ids,
                self._prompt_logprobs[position] + entries,
                chain(find_prompt_offsets(tokenizer, prompt, prompt_text), starts),
                request.logprobs or 0,
            )
        return describe_logprobs(tokenizer, token_ids, entries, starts, request.logprobs or 0)

    def _prompt_text(self, position: int) -> str:
        prompt = self._prompts[position]
        return self._tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text


def _describe_choice(index: int, completion: CompletionOutput) -> dict[str, object]:
    return {
        "index": index,
        "text": completion.text,
        "logprobs": None,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def _says_something(completion: CompletionOutput, request: CompletionRequest) -> bool:
    return bool(
        completion.text
        or completion.finish_reason
        or completion.logprobs
        or (request.return_token_ids and completion.token_ids)
    )


def _differ_in_text_alone(request: CompletionRequest) -> bool:
    """The events of a choice, but for its first and its last."""
    options = request.stream_options
    has_more = request.logprobs is not None or request.return_token_ids
    return not (has_more or request.is_prompt_only or (options is not None and options.continuous_usage_stats))


def _without_completions(output: RequestOutput) -> RequestOutput:
    """Of the prompt alone: the token that an engine had to compute is not told."""
    completions = [
        msgspec.structs.replace(
            each,
            text="",
            token_ids=[],
            logprobs=None if each.logprobs is None else [],
            finish_reason="length" if each.finish_reason else None,
            stop_reason=None,
        )
        for each in output.outputs
    ]
    return msgspec.structs.replace(output, outputs=completions)


class GenerateAnswer:
    """Token ids out; no OpenAI shape."""

    def __init__(self, request: GenerateRequest, *, answer_id: str) -> None:
        self._request = request
        self._base: dict[str, object] = {"request_id": answer_id}
        self._usage = Usage([len(request.prompt_token_ids)])

    async def whole(self, feed: OutputFeed) -> dict[str, object]:
        answer: dict[str, object] = {}
        async for position, output in feed:
            self._usage.add(position, output)
            answer = {"outputs": self._outputs(output)} | await self._prompt_logprobs(output)
        return self._base | answer | {"usage": self._usage.as_dict()}

    async def events(self, feed: OutputFeed) -> AsyncIterator[bytes]:
        options = self._request.stream_options
        async for position, output in feed:
            yield self._event(position, output, await self._prompt_logprobs(output))
        if options is not None and options.include_usage:
            yield as_event(self._base | {"outputs": [], "usage": self._usage.as_dict()})
        yield DONE

    def try_event(self, position: int, output: RequestOutput) -> bytes | None:
        return self._event(position, output, {}) if output.prompt_logprobs is None else None

    def _event(self, position: int, output: RequestOutput, prompt_logprobs: dict[str, object]) -> bytes:
        options = self._request.stream_options
        self._usage.add(position, output)
        chunk = self._base | {"outputs": self._outputs(output)} | prompt_logprobs
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = self._usage.as_dict()
        return as_event(chunk)

    def _outputs(self, output: RequestOutput) -> list[dict[str, object]]:
        return [
            {
                "index": each.index,
                "text": each.text,
                "token_ids": each.token_ids,
                "finish_reason": each.finish_reason,
                "stop_reason": each.stop_reason,
                "logprobs": each.logprobs,
            }
            for each in output.outputs
        ]

    @staticmethod
    async def _prompt_logprobs(output: RequestOutput) -> dict[str, object]:
        if output.prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": await write_entries(output.prompt_logprobs)}
