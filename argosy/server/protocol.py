"""Request bodies: OpenAI's fields, and those that vLLM and SGLang users rely on. What they mean is decided here.

A field that is not listed is refused with its name: a setting is done or refused, never ignored. Fields that change
nothing in one deployment of one model (``user``, ``metadata``, ...) are listed and carry no meaning. Invariant: a
request that validates can be turned into ``SamplingParams``, or ``ApiError`` says which field is at fault.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from argosy.sampling_params import (
    MAX_LOGPROBS,
    MAX_N,
    MAX_SEED,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    SamplingParams,
)
from argosy.server.errors import ApiError
from argosy.server.json_body import shorten
from argosy.server.structured import (
    Constraint,
    Wishes,
    choose_constraint,
    describe_response_format,
    read_structured_outputs,
)

MAX_INT32 = 2**31 - 1
MAX_PROMPTS = 1024  # in one request
MAX_MESSAGES = 4096
MAX_TOOLS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 4096
MAX_NAME_CHARS = 256
MAX_PRIORITY = 10**9
MAX_TOKEN_IDS = 2**20  # in one list; no model takes so many
MAX_TOKENIZE_CHARS = 2**21

TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]
Text = Annotated[str, StringConstraints(min_length=1)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_CHARS)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_STRING_CHARS)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKEN_IDS)]
TokenText = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
RequestId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]


class Body(BaseModel):
    """Strict: a number is not a string, and unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class StreamOptions(Body):
    include_usage: bool = False  # a last chunk with the usage
    continuous_usage_stats: bool = False  # usage in every chunk


class StructuredOutputs(Body):
    """vLLM's name and fields; exactly one."""

    json_: dict[str, object] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None  # llguidance's dialect of Lark
    json_object: Literal[True] | None = None

    @property
    def fields(self) -> dict[str, object]:
        """Those given."""
        return self.model_dump(by_alias=True, exclude_none=True)


class Sampling(Body):
    """What both kinds of completions share."""

    model: Annotated[str, StringConstraints(max_length=MAX_NAME_CHARS)] | None = None  # None = the served one
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT32)] = -1
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    logit_bias: Annotated[dict[TokenText, Bias], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT32)] = 0
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None  # of the prompt, with alternatives
    structured_outputs: StructuredOutputs | None = None  # what the output must match
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False  # choices carry token_ids, and the answer the prompt's
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0  # lower runs first
    cache_salt: Name | None = None  # requests with different salts share no cached prefixes
    request_id: RequestId | None = None  # else X-Request-Id, else a new one
    timeout: Annotated[float, Field(ge=0.001, le=1e6)] | None = None  # seconds; the server's limit holds too
    data_parallel_rank: Annotated[int, Field(ge=0, le=MAX_INT32)] | None = (
        None  # the replica; else X-data-parallel-rank
    )
    user: Annotated[str, StringConstraints(max_length=1024)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=64)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def constraint(self) -> Constraint | None:
        """The grammar of the output, not compiled yet."""
        return read_structured_outputs(None if self.structured_outputs is None else self.structured_outputs.fields)

    def _params(
        self,
        max_tokens: int | None,
        logprobs: int | None,
        *,
        skip_special_tokens: bool,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """``prompt_logprobs``: if more of them are wanted than the field says."""
        try:
            return SamplingParams(
                n=self.n,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                repetition_penalty=self.repetition_penalty,
                logit_bias=self._biases(),
                seed=self.seed,
                max_tokens=max_tokens,
                min_tokens=self.min_tokens,
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
                stop_token_ids=tuple(self.stop_token_ids),
                include_stop_str_in_output=self.include_stop_str_in_output,
                ignore_eos=self.ignore_eos,
                logprobs=logprobs,
                prompt_logprobs=self.prompt_logprobs if prompt_logprobs is None else prompt_logprobs,
                skip_special_tokens=skip_special_tokens,
            )
        except ValueError as error:
            raise ApiError(400, str(error), param=str(error).split(" ", 1)[0].split("[")[0]) from error

    def _biases(self) -> dict[int, float] | None:
        return None if self.logit_bias is None else {int(token): bias for token, bias in self.logit_bias.items()}


class CompletionRequest(Sampling):
    """``POST /v1/completions``."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT32)] | None = 16  # 0, with echo: the prompt alone is judged
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None  # with echo, also of the prompt's tokens
    echo: bool = False  # the prompt's text in front of the completion's
    suffix: None = None  # the model was not trained to fill a gap
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of is not supported beyond n; leave it out")
        return self

    @property
    def is_prompt_only(self) -> bool:
        """Nothing is to be generated."""
        return self.max_tokens == 0

    @property
    def echoes_logprobs(self) -> bool:
        return self.echo and self.logprobs is not None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]

    def to_params(self) -> SamplingParams:
        if self.is_prompt_only and not self.echo:
            message = "max_tokens 0 asks for no answer at all; set echo to true, or max_tokens to at least 1"
            raise ApiError(400, message, param="max_tokens")
        if self.is_prompt_only and self.min_tokens:
            raise ApiError(400, f"min_tokens ({self.min_tokens}) must not exceed max_tokens (0)", param="min_tokens")
        num_top = max(self.logprobs or 0, self.prompt_logprobs or 0) if self.echoes_logprobs else self.prompt_logprobs
        return self._params(
            1 if self.is_prompt_only else self.max_tokens,  # an engine computes one token, which is not told then
            self.logprobs,
            skip_special_tokens=self.skip_special_tokens,
            prompt_logprobs=num_top,
        )


class FunctionChoice(Body):
    name: Name


class ToolChoice(Body):
    type: Literal["function"]
    function: FunctionChoice


class JsonSchema(Body):
    name: Name | None = None
    description: str | None = None
    schema_: dict[str, object] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None  # strict or not, its schema is obeyed

    @model_validator(mode="after")
    def _check(self) -> Self:
        schema = None if self.json_schema is None else self.json_schema.schema_
        if self.type == "json_schema" and schema is None:
            raise ValueError("type json_schema needs json_schema.schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise ValueError(f"json_schema needs type json_schema, not {self.type}")
        return self

    @property
    def schema_to_obey(self) -> Mapping[str, object] | None:
        return describe_response_format(self.type, None if self.json_schema is None else self.json_schema.schema_)


class TemplateKwargs(Body):
    """What may be said to V3.2's chat encoding; nothing else reaches it."""

    thinking: bool | None = None
    enable_thinking: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if None not in (self.thinking, self.enable_thinking) and self.thinking != self.enable_thinking:
            raise ValueError("thinking and enable_thinking mean the same and contradict each other; give one")
        return self

    @property
    def is_thinking(self) -> bool:
        return bool(self.thinking or self.enable_thinking)


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``. Messages and tools are checked by the encoding (``encoding_messages.py``)."""

    messages: Annotated[list[dict[str, object]], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = None  # None = up to the model's length
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = None  # OpenAI's new name of max_tokens
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[dict[str, object]], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None  # None = auto if there are tools
    parallel_tool_calls: bool | None = None  # False = one call at most
    response_format: ResponseFormat | None = None
    chat_template_kwargs: TemplateKwargs = TemplateKwargs()
    reasoning_effort: Literal["none", "low", "medium", "high"] | None = None  # none = no reasoning; else: reason

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens contradict each other; give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.tool_choice not in (None, "none") and not self.tools:
            name = self.tool_choice if isinstance(self.tool_choice, str) else "of a function"
            raise ValueError(f"tool_choice {name} needs tools")
        return self

    @property
    def is_thinking(self) -> bool:
        return self.chat_template_kwargs.is_thinking or self.reasoning_effort not in (None, "none")

    @property
    def active_tools(self) -> list[dict[str, object]] | None:
        return self.tools if self.tools and self.tool_choice != "none" else None

    @property
    def ends_with_first_call(self) -> bool:
        return self.parallel_tool_calls is False and bool(self.active_tools)

    @property
    def response_schema(self) -> Mapping[str, object] | None:
        """What the answer must be; None = text."""
        return None if self.response_format is None else self.response_format.schema_to_obey

    @property
    def schema_to_tell(self) -> Mapping[str, object] | None:
        """Of response_format's json_schema: V3.2's encoding has a place for it in the prompt."""
        is_schema = self.response_format is not None and self.response_format.type == "json_schema"
        return self.response_schema if is_schema else None

    @property
    def constraint(self) -> Constraint | None:
        choice = self.tool_choice
        return choose_constraint(
            Wishes(
                structured_outputs=None if self.structured_outputs is None else self.structured_outputs.fields,
                response_schema=self.response_schema,
                tools=self.active_tools,
                must_call=choice == "required" or isinstance(choice, ToolChoice),
                function_name=choice.function.name if isinstance(choice, ToolChoice) else None,
                is_parallel=self.parallel_tool_calls is not False,
            )
        )

    def to_params(self) -> SamplingParams:
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        # Tool calls are written with special tokens, which the parser must see.
        skips_special_tokens = self.skip_special_tokens and self.active_tools is None
        return self._params(max_tokens, logprobs, skip_special_tokens=skips_special_tokens)


class GenerateRequest(Sampling):
    """``POST /generate``: token ids in, token ids out."""

    prompt_token_ids: TokenIds
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def to_params(self) -> SamplingParams:
        return self._params(self.max_tokens, self.logprobs, skip_special_tokens=self.skip_special_tokens)


class TokenizeRequest(Body):
    """``POST /tokenize``: a text, or a conversation as the model would see it."""

    model: Annotated[str, StringConstraints(max_length=MAX_NAME_CHARS)] | None = None
    prompt: Annotated[str, StringConstraints(max_length=MAX_TOKENIZE_CHARS)] | None = None
    messages: Annotated[list[dict[str, object]], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[dict[str, object]], Field(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: TemplateKwargs = TemplateKwargs()
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of prompt and messages is needed")
        return self


class DetokenizeRequest(Body):
    model: Annotated[str, StringConstraints(max_length=MAX_NAME_CHARS)] | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS)]


class AbortRequestsRequest(Body):
    """``POST /abort_requests``, behind the admin key: those ids, or all."""

    request_ids: Annotated[list[RequestId], Field(max_length=4096)] = []
    all: bool = False


def describe_validation(errors: list[Mapping[str, object]]) -> ApiError:
    """Pydantic's errors of one body as one ``ApiError`` that names the field first at fault."""
    param = _name_of(errors[0])
    # A value that may have several types has an error for each.
    same = [error for error in errors if (_name_of(error) or "").split(".")[0] == (param or "").split(".")[0]]
    if any(error["type"] == "extra_forbidden" for error in same):
        return ApiError(400, f"the field {param} is not known; leave it out", param=param, code="unknown_field")
    messages = dict.fromkeys(str(error["msg"]).removeprefix("Value error, ") for error in same)
    text = "; or: ".join(messages)
    if param is None:  # two fields that contradict each other: the text begins with one of them
        first_word = text.split(" ", 1)[0]
        return ApiError(400, text, param=first_word if first_word in _FIELD_NAMES else None)
    return ApiError(400, f"{param}: {text}", param=param)


def _name_of(error: Mapping[str, object]) -> str | None:
    """The place in the body, as ``messages.0``; without pydantic's names for the members of a union."""
    place = error["loc"]
    assert isinstance(place, tuple)
    parts = [part for part in place[1:] if isinstance(part, int) or part in _FIELD_NAMES or len(place) == 2]
    return shorten(".".join(map(str, parts))) or None


_BODIES: tuple[type[Body], ...] = (
    *(CompletionRequest, ChatRequest, GenerateRequest, TokenizeRequest, DetokenizeRequest, AbortRequestsRequest),
    *(StreamOptions, StructuredOutputs, ToolChoice, FunctionChoice, ResponseFormat, JsonSchema, TemplateKwargs),
)
_FIELD_NAMES = frozenset(name for body in _BODIES for name in body.model_fields)
