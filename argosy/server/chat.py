"""``/v1/chat/completions``: its answers, whole and streamed, with reasoning and tool calls told apart.

Invariant: the deltas of a stream, joined by choice, are the message that the same request gets unstreamed.
"""

import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial

from argosy.engine.output_processor import TextEnd
from argosy.engine.tokenizer import Tokenizer
from argosy.messages import CompletionOutput, RequestOutput, TokenLogprobs
from argosy.models.deepseek.encoding_parser import ParsedToolCall
from argosy.server.chat_stream import ChatPiece, ChatStream, FirstCallEnd
from argosy.server.logprobs import token_text, write_prompt_logprobs
from argosy.server.outputs import OutputFeed
from argosy.server.protocol import ChatRequest
from argosy.server.streaming import DONE, EventFrame, TextFrame
from argosy.server.usage import Usage


class ChatAnswer:
    """One request's answer while it grows."""

    def __init__(
        self, request: ChatRequest, num_prompt_tokens: int, tokenizer: Tokenizer, *, answer_id: str, model: str
    ) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._id = f"chatcmpl-{answer_id}"
        self._created = int(time.time())
        self._model = model
        self._usage = Usage([num_prompt_tokens])
        has_tools = request.active_tools is not None
        self._choices = [
            _Choice(
                ChatStream(
                    thinking=request.is_thinking, has_tools=has_tools, is_parallel=not request.ends_with_first_call
                )
            )
            for _ in range(request.n)
        ]
        self._frame = EventFrame(self._base("chat.completion.chunk"))
        self._text_frame = TextFrame(self._frame, self._text_chunk)
        self._is_plain = _differ_in_text_alone(request)

    async def whole(self, feed: OutputFeed) -> dict[str, object]:
        answer: dict[str, object] = {}
        async for position, output in feed:
            self._usage.add(position, output)
            answer = {"choices": [self._choice(completion) for completion in output.outputs]}
            answer |= await self._prompt_logprobs(output)
        return self._base("chat.completion") | answer | {"usage": self._usage.as_dict()}

    async def events(self, feed: OutputFeed) -> AsyncIterator[bytes]:
        options = self._request.stream_options
        first = [
            {"index": i, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            for i in range(self._request.n)
        ]
        no_usage: dict[str, object] = {"usage": None} if self._usage_fields() else {}
        yield self._frame.fill({"choices": first} | no_usage)
        async for position, output in feed:
            event = self._event(position, output, await self._prompt_logprobs(output))
            if event:
                yield event
        if options is not None and options.include_usage:
            yield self._frame.fill({"choices": [], "usage": self._usage.as_dict()})
        yield DONE

    def try_event(self, position: int, output: RequestOutput) -> bytes | None:
        return self._event(position, output, {}) if output.prompt_logprobs is None else None

    def _event(self, position: int, output: RequestOutput, prompt_logprobs: dict[str, object]) -> bytes:
        """Empty where there is nothing to tell yet."""
        self._usage.add(position, output)
        if self._is_plain and len(output.outputs) == 1 and not prompt_logprobs:
            (completion,) = output.outputs
            choice = self._choices[completion.index]
            if completion.text and completion.finish_reason is None and choice.stream.is_plain:
                return self._text_frame.fill(completion.index, completion.text)
        choices = [chunk for each in output.outputs if (chunk := self._chunk(each)) is not None]
        if not choices and not prompt_logprobs:
            return b""
        return self._frame.fill({"choices": choices} | prompt_logprobs | self._usage_fields())

    def _text_chunk(self, index: int, text: str) -> dict[str, object]:
        choice = {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
        return {"choices": [choice]} | self._usage_fields()

    def _usage_fields(self) -> dict[str, object]:
        """As chunks show it before the last."""
        options = self._request.stream_options
        if options is None or not (options.include_usage or options.continuous_usage_stats):
            return {}
        return {"usage": self._usage.as_dict() if options.continuous_usage_stats else None}

    async def _prompt_logprobs(self, output: RequestOutput) -> dict[str, object]:
        """Once: with the whole answer, or with the first output of a stream."""
        num_top = self._request.prompt_logprobs
        if num_top is None or output.prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": await write_prompt_logprobs(self._tokenizer, output.prompt_logprobs, num_top)}

    def _base(self, kind: str) -> dict[str, object]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _choice(self, completion: CompletionOutput) -> dict[str, object]:
        choice = self._choices[completion.index]
        piece, _ = choice.take(completion)
        message: dict[str, object] = {"role": "assistant", "content": piece.content or None}
        if not choice.tool_calls:
            message["content"] = piece.content
        if piece.reasoning:
            message["reasoning_content"] = message["reasoning"] = piece.reasoning
        if choice.tool_calls:
            message["tool_calls"] = choice.tool_calls
        return {
            "index": completion.index,
            "message": message,
            "logprobs": self._logprobs(completion.logprobs),
            "finish_reason": choice.finish_reason(completion),
            "stop_reason": completion.stop_reason,
        } | self._token_ids(completion)

    def _chunk(self, completion: CompletionOutput) -> dict[str, object] | None:
        """None where there is nothing to tell yet."""
        choice = self._choices[completion.index]
        piece, calls = choice.take(completion)
        delta: dict[str, object] = {}
        if piece.content:
            delta["content"] = piece.content
        if piece.reasoning:
            delta["reasoning_content"] = delta["reasoning"] = piece.reasoning
        if calls:
            delta["tool_calls"] = calls
        is_over = completion.finish_reason is not None
        if not (delta or is_over or completion.logprobs or self._request.return_token_ids):
            return None
        chunk = {
            "index": completion.index,
            "delta": delta,
            "logprobs": self._logprobs(completion.logprobs),
            "finish_reason": choice.finish_reason(completion) if is_over else None,
        }
        if is_over:
            chunk["stop_reason"] = completion.stop_reason
        return chunk | self._token_ids(completion)

    def _token_ids(self, completion: CompletionOutput) -> dict[str, object]:
        return {"token_ids": completion.token_ids} if self._request.return_token_ids else {}

    def _logprobs(self, logprobs: list[TokenLogprobs] | None) -> dict[str, object] | None:
        if logprobs is None:
            return None
        return {"content": [self._token_logprobs(entry) for entry in logprobs]}

    def _token_logprobs(self, entry: TokenLogprobs) -> dict[str, object]:
        tops = zip(entry.top_token_ids, entry.top_logprobs, strict=True)
        return self._describe_token(entry.token_id, entry.logprob) | {
            "top_logprobs": [self._describe_token(token_id, logprob) for token_id, logprob in tops]
        }

    def _describe_token(self, token_id: int, logprob: float) -> dict[str, object]:
        raw = self._tokenizer.byte_table(skip_special_tokens=False)[token_id]
        return {"token": token_text(self._tokenizer, token_id), "logprob": logprob, "bytes": list(raw)}


def _differ_in_text_alone(request: ChatRequest) -> bool:
    """The chunks of a choice while it says its answer."""
    options = request.stream_options
    has_more = request.logprobs or request.return_token_ids
    return not (has_more or (options is not None and options.continuous_usage_stats))


def text_end_of(request: ChatRequest) -> Callable[[], TextEnd] | None:
    """What ends each of its completions, beside stop strings and the model itself."""
    return partial(FirstCallEnd, thinking=request.is_thinking) if request.ends_with_first_call else None


@dataclass(slots=True)
class _Choice:
    """One choice so far."""

    stream: ChatStream
    tool_calls: list[dict[str, object]] = field(default_factory=list)

    def take(self, completion: CompletionOutput) -> tuple[ChatPiece, list[dict[str, object]]]:
        """What the new text brought, and its tool calls in the API's shape."""
        piece = self.stream.feed(completion.text)
        if completion.finish_reason is not None:
            last = self.stream.finish()
            piece = ChatPiece(piece.reasoning + last.reasoning, piece.content + last.content, piece.tool_calls)
        calls = [self._describe_call(call) for call in piece.tool_calls]
        return piece, calls

    def finish_reason(self, completion: CompletionOutput) -> str | None:
        return "tool_calls" if self.tool_calls and completion.finish_reason == "stop" else completion.finish_reason

    def _describe_call(self, call: ParsedToolCall) -> dict[str, object]:
        described: dict[str, object] = {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        self.tool_calls.append(described)
        return {"index": len(self.tool_calls) - 1} | described
