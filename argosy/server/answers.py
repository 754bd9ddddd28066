"""The shapes of answers, for the API's description and for tests. Answers themselves are built in ``completions.py``,
``chat.py`` and ``api_server.py``, as plain objects: nothing here runs for a request.

Invariant: every answer that a route gives fits its shape here, with no field left over.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Shape):
    message: str
    type: str
    param: str | None  # the field at fault
    code: str | int


class ErrorAnswer(Shape):
    """What every refusal and failure looks like."""

    error: ErrorDetail


class StatusAnswer(Shape):
    status: str  # "ok" or "ready", else what is in the way


class TokenDetails(Shape):
    cached_tokens: int


class UsageShape(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails


class CompletionLogprobs(Shape):
    tokens: list[str]
    token_logprobs: list[float | None]  # null: the first token of an echoed prompt
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Shape):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # by token id, of each prompt token; null: the first


class CompletionChoice(Shape):
    index: int
    text: str
    prompt_logprobs: PromptLogprobs | None = None  # where they were asked for; in a stream with the first token
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    token_ids: list[int] = []  # with return_token_ids


class CompletionShape(Shape):
    """Unstreamed; a stream's events have the same fields, ``usage`` only where it was asked for."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageShape | None = None
    prompt_token_ids: list[list[int]] = []  # with return_token_ids


class FunctionShape(Shape):
    name: str
    arguments: str  # JSON


class ToolCallShape(Shape):
    index: int = 0  # in streams
    id: str
    type: Literal["function"]
    function: FunctionShape


class TokenLogprob(Shape):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Shape):
    content: list[ContentLogprob]


class MessageShape(Shape):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallShape] = []


class ChatChoice(Shape):
    index: int
    message: MessageShape
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    token_ids: list[int] = []


class ChatShape(Shape):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    prompt_logprobs: PromptLogprobs | None = None  # where they were asked for
    usage: UsageShape


class DeltaShape(Shape):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallShape] = []


class ChunkChoice(Shape):
    index: int
    delta: DeltaShape
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    token_ids: list[int] = []


class ChatChunkShape(Shape):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    prompt_logprobs: PromptLogprobs | None = None
    usage: UsageShape | None = None


class LogprobsShape(Shape):
    token_id: int
    logprob: float
    rank: int
    top_token_ids: list[int] = []
    top_logprobs: list[float] = []


class GenerateOutput(Shape):
    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    logprobs: list[LogprobsShape] | None


class GenerateShape(Shape):
    """Unstreamed, and an event of a stream, which has ``usage`` only where it was asked for."""

    request_id: str
    outputs: list[GenerateOutput]
    prompt_logprobs: list[LogprobsShape | None] | None = None  # of each prompt token; null: the first
    usage: UsageShape | None = None


class TokenizeShape(Shape):
    tokens: list[int]
    count: int
    max_model_len: int | None
    token_strs: list[str] = []  # with return_token_strs


class DetokenizeShape(Shape):
    prompt: str


class ModelShape(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int | None


class ModelsShape(Shape):
    object: Literal["list"]
    data: list[ModelShape]


class VersionShape(Shape):
    version: str


class LoadShape(Shape):
    server_load: int


class TokenizerShape(Shape):
    vocab_size: int
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_ids: list[int]
    adds_bos: bool
    special_token_ids: list[int]


class AbortedShape(Shape):
    aborted: list[str]
