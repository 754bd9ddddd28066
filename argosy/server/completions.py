"""``/v1/completions`` and ``/generate``: their answers, whole and streamed.

Invariant: the pieces of a stream, joined by choice, are the answer that the same request gets unstreamed.
"""

import time
from collections.abc import AsyncIterator

from argosy.engine.prompts import CheckedPrompt
from argosy.engine.tokenizer import Tokenizer
from argosy.messages import CompletionOutput, RequestOutput, TokenLogprobs
from argosy.server.outputs import OutputFeed
from argosy.server.protocol import CompletionRequest, GenerateRequest
from argosy.server.streaming import DONE, EventFrame, as_event
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
        self._text_offsets: dict[int, int] = {}  # by choice: characters that came before

    async def whole(self, feed: OutputFeed) -> dict[str, object]:
        choices: dict[int, dict[str, object]] = {}
        async for position, output in feed:
            self._usage.add(position, output)
            for completion in output.outputs:
                index = self._index(position, completion)
                choices[index] = self._choice(position, completion, is_first=True)
        answer = self._base | {"choices": [choices[i] for i in sorted(choices)], "usage": self._usage.as_dict()}
        if self._request.return_token_ids:
            answer["prompt_token_ids"] = [prompt.token_ids for prompt in self._prompts]
        return answer

    async def events(self, feed: OutputFeed) -> AsyncIterator[bytes]:
        options = self._request.stream_options
        started: set[int] = set()
        frame = EventFrame(self._base)
        async for position, output in feed:
            self._usage.add(position, output)
            choices = []
            for completion in output.outputs:
                index = self._index(position, completion)
                if _says_something(completion, self._request) or index not in started:
                    choices.append(self._choice(position, completion, is_first=index not in started))
                    started.add(index)
            if not choices:
                continue
            chunk: dict[str, object] = {"choices": choices}
            if options is not None and (options.include_usage or options.continuous_usage_stats):
                chunk["usage"] = self._usage.as_dict() if options.continuous_usage_stats else None
            yield frame.fill(chunk)
        if options is not None and options.include_usage:
            yield frame.fill({"choices": [], "usage": self._usage.as_dict()})
        yield DONE

    def _index(self, position: int, completion: CompletionOutput) -> int:
        return position * self._request.n + completion.index

    def _choice(self, position: int, completion: CompletionOutput, *, is_first: bool) -> dict[str, object]:
        index = self._index(position, completion)
        text = completion.text
        if is_first and self._request.echo:
            text = self._prompt_text(position) + text
        choice: dict[str, object] = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if completion.logprobs is not None:
            offset = self._text_offsets.get(index, 0)
            choice["logprobs"], self._text_offsets[index] = describe_logprobs(
                completion.logprobs, self._tokenizer, offset
            )
        if self._request.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice

    def _prompt_text(self, position: int) -> str:
        prompt = self._prompts[position]
        return self._tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text


def _says_something(completion: CompletionOutput, request: CompletionRequest) -> bool:
    return bool(
        completion.text
        or completion.finish_reason
        or completion.logprobs
        or (request.return_token_ids and completion.token_ids)
    )


def describe_logprobs(
    logprobs: list[TokenLogprobs], tokenizer: Tokenizer, offset: int
) -> tuple[dict[str, object], int]:
    """OpenAI's completion shape; ``offset`` is where the first token's text begins, the second value where the next
    will."""
    tokens, chosen, tops, offsets = [], [], [], []
    for entry in logprobs:
        token = token_text(tokenizer, entry.token_id)
        tokens.append(token)
        chosen.append(entry.logprob)
        top = {
            token_text(tokenizer, token_id): logprob
            for token_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True)
        }
        tops.append({token: entry.logprob} | top)
        offsets.append(offset)
        offset += len(token)
    return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}, offset


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token alone; bytes that are no whole character become U+FFFD."""
    return tokenizer.byte_table(skip_special_tokens=False)[token_id].decode(errors="replace")


class GenerateAnswer:
    """Token ids out; no OpenAI shape."""

    def __init__(self, request: GenerateRequest, *, answer_id: str) -> None:
        self._request = request
        self._base: dict[str, object] = {"request_id": answer_id}
        self._usage = Usage([len(request.prompt_token_ids)])

    async def whole(self, feed: OutputFeed) -> dict[str, object]:
        outputs: list[dict[str, object]] = []
        async for position, output in feed:
            self._usage.add(position, output)
            outputs = self._outputs(output)
        return self._base | {"outputs": outputs, "usage": self._usage.as_dict()}

    async def events(self, feed: OutputFeed) -> AsyncIterator[bytes]:
        options = self._request.stream_options
        async for position, output in feed:
            self._usage.add(position, output)
            chunk = self._base | {"outputs": self._outputs(output)}
            if options is not None and options.continuous_usage_stats:
                chunk["usage"] = self._usage.as_dict()
            yield as_event(chunk)
        if options is not None and options.include_usage:
            yield as_event(self._base | {"outputs": [], "usage": self._usage.as_dict()})
        yield DONE

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
