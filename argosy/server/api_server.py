"""The routes. What a field means is in ``protocol.py``, an answer's shape in ``completions.py`` and ``chat.py``.

Invariant: a handler that has opened a feed closes it, whatever happens.
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from argosy.engine.output_processor import TextEnd
from argosy.engine.prompts import CheckedPrompt, PromptChecker
from argosy.engine.tokenizer import Tokenizer
from argosy.models.deepseek.encoding import THINK_END, encode_messages
from argosy.sampling_params import SamplingParams
from argosy.server.admission import Admission
from argosy.server.api_description import description_of
from argosy.server.chat import ChatAnswer, text_end_of
from argosy.server.completions import CompletionAnswer, GenerateAnswer
from argosy.server.console import add_console
from argosy.server.deployment import Deployment, EngineSource, ServerView, describe_deployment
from argosy.server.errors import ApiError, overloaded
from argosy.server.gate import Gate
from argosy.server.grammar_door import Grammars
from argosy.server.json_body import JsonRoute, shorten
from argosy.server.logprobs import check_num_prompt_logprobs, token_text
from argosy.server.logs import log_answer, logger
from argosy.server.metrics import ServerMetrics
from argosy.server.outputs import OutputFeed, RequestBoard, Submission
from argosy.server.protocol import (
    AbortRequestsRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    Sampling,
    TokenizeRequest,
    describe_validation,
)
from argosy.server.replica_choice import HEADER as REPLICA_HEADER
from argosy.server.replica_choice import choose_replica
from argosy.server.settings import ServerConfig
from argosy.server.streaming import CLIENT_GONE_STATUS, EventStream, StreamedAnswer, as_json, run_until_disconnect
from argosy.server.structured import Constraint
from argosy.server.text_work import TextWork


class Answer(StreamedAnswer, Protocol):
    async def whole(self, feed: OutputFeed) -> dict[str, object]: ...


class Service:
    """What the routes share: whether requests are taken, how many, and the way from a body to an answer."""

    def __init__(
        self,
        settings: ServerConfig,
        tokenizer: Tokenizer,
        board: RequestBoard,
        metrics: ServerMetrics,
        grammars: Grammars,
        *,
        model_names: tuple[str, ...],
        version: str,
        describe_health: Callable[[], str | None],
    ) -> None:
        """``describe_health``: what keeps the engines from serving; None = nothing."""
        self.settings = settings
        self.tokenizer = tokenizer
        self.board = board
        self.metrics = metrics
        self._grammars = grammars
        self.model_names = model_names
        self.version = version
        self.started_s = int(time.time())
        self.max_model_len: int | None = None  # known once engines are ready
        self.max_num_running = 0  # completions that engines run at once
        self.dp_size = 1
        self.is_draining = False
        self.engines: EngineSource | None = None  # to look at; known once engines are ready
        self.text_work = TextWork()
        self._describe_health = describe_health
        self._checker: PromptChecker | None = None

    def open(self, max_model_len: int, max_num_running: int, dp_size: int = 1) -> None:
        """The engines are ready: take requests."""
        self.dp_size = dp_size
        self.max_model_len = max_model_len
        self.max_num_running = max_num_running
        self._checker = PromptChecker(self.tokenizer, max_model_len)

    @property
    def obstacle(self) -> str | None:
        """Why no request is taken now; None = they are."""
        if self.is_draining:
            return "the server is shutting down"
        if self._checker is None:
            return "the engines are starting"
        return self._describe_health()

    @property
    def health_problem(self) -> str | None:
        return None if self._checker is None else self._describe_health()

    def describe_deployment(self, has_experts: bool) -> Deployment:
        server = ServerView(
            model=self.model_names[0],
            version=self.version,
            status=self.obstacle or "ready",
            time_s=time.monotonic(),
            num_requests=self.board.num_requests,
            max_num_requests=self.max_num_running + self.settings.max_num_queued_reqs,
            generation_tokens=self.metrics.num_generated,
            num_replays=0 if self.engines is None else self.engines.num_replays,
        )
        return describe_deployment(server, self.engines, has_experts=has_experts)

    def check_model(self, name: str | None) -> str:
        if name is None or name in self.model_names:
            return name or self.model_names[0]
        raise ApiError(
            404, f"the model {name!r} is not served; use {self.model_names[0]!r}", param="model", code="model_not_found"
        )

    async def constrain(
        self, params: SamplingParams, constraint: Constraint | None, *, thinking: bool = False
    ) -> SamplingParams:
        """``params`` with the grammar, which compiles. With ``thinking`` it holds for what follows the reasoning."""
        if constraint is None:
            return params
        await self._grammars.check(constraint.structured, constraint.param)
        structured = constraint.structured
        if thinking:
            try:
                start_id = self.tokenizer.encode_mark(THINK_END)
            except ValueError as error:
                raise ApiError(400, str(error), param=constraint.param) from error
            structured = dataclasses.replace(structured, starts_after_token_id=start_id)
        return dataclasses.replace(params, structured_outputs=structured)

    async def check_prompts(
        self, prompts: Sequence[str | list[int]], params: SamplingParams, param: str
    ) -> list[CheckedPrompt]:
        """Token ids of every prompt. Raises ApiError, at once if no request could be taken anyway."""
        checker = self._checker
        if checker is None:
            raise overloaded("the engines are starting", retry_after_s=2)
        self._check_room(len(prompts) * params.n)

        def check() -> list[CheckedPrompt]:
            return [checker.check(prompt, params) for prompt in prompts]

        try:
            return await self.text_work.run(sum(map(len, prompts)), check)
        except ValueError as error:
            text = str(error)
            named = next((name for name in ("stop_token_ids", "logit_bias") if text.startswith(name)), param)
            raise ApiError(400, text, param=named, code=_code_of(error)) from error

    async def encode_chat(self, request: ChatRequest | TokenizeRequest, thinking: bool) -> list[int]:
        """Token ids of a conversation. Raises ApiError, at once if no request could be taken anyway."""
        if isinstance(request, ChatRequest):
            self._check_room(request.n)
        tools = request.active_tools if isinstance(request, ChatRequest) else request.tools
        schema = request.schema_to_tell if isinstance(request, ChatRequest) else None
        try:
            text = encode_messages(
                request.messages or [], thinking=thinking, tools=tools or None, response_format=schema
            )
            if self._checker is not None:
                self._checker.check_text_length(text)
            return await self.text_work.run(len(text), lambda: self.tokenizer.encode(text))
        except ValueError as error:
            first_word = str(error).split(" ", 1)[0].split("[")[0]
            param = first_word if first_word in ("tools", "response_format") else "messages"
            raise ApiError(400, str(error), param=param, code=_code_of(error)) from error

    def check_room_for_one(self) -> None:
        """Raises ApiError if not even one completion would be taken."""
        if self._checker is not None:  # before, each route says what it waits for
            self._check_room(1)

    def _check_room(self, num_new: int) -> None:
        if (obstacle := self.obstacle) is not None:
            raise overloaded(f"no request is taken: {obstacle}", retry_after_s=5)
        num_now, limit = self.board.num_requests, self.max_num_running + self.settings.max_num_queued_reqs
        if num_now + num_new > limit:
            raise overloaded(
                f"{num_now} completions are under way and {num_new} more are asked for, but at most {limit} are taken; "
                "try again later, or raise --max-num-queued-reqs"
            )

    def open_feed(
        self,
        http: Request,
        request: Sampling,
        prompts: list[CheckedPrompt],
        params: SamplingParams,
        build_text_end: Callable[[], TextEnd] | None = None,
    ) -> tuple[OutputFeed, str]:
        """Submit the prompts; the feed and the id that names them all."""
        check_num_prompt_logprobs(prompts, params)
        self._check_room(len(prompts) * params.n)
        request_id = request.request_id or http.state.request_id
        many = len(prompts) > 1
        replica = choose_replica(http, request.data_parallel_rank, self.dp_size)
        submissions = [
            Submission(
                request_id=f"{request_id}-{i}" if many else request_id,
                prompt=prompt,
                params=params,
                is_streamed=request.stream,
                priority=request.priority,
                cache_salt=request.cache_salt,
                data_parallel_rank=replica,
                trace_parent=http.headers.get("traceparent"),
                build_text_end=build_text_end,
            )
            for i, prompt in enumerate(prompts)
        ]
        return self.board.open(submissions), request_id

    async def respond(self, http: Request, request: Sampling, feed: OutputFeed, answer: Answer) -> Response:
        limit_s = min(request.timeout or self.settings.request_timeout_s, self.settings.request_timeout_s)
        deadline = asyncio.get_running_loop().call_later(
            limit_s, feed.fail, ApiError(504, f"the request was not finished within {limit_s:g} s", code="deadline")
        )

        def close() -> None:
            deadline.cancel()
            feed.close()

        if request.stream:
            return EventStream(answer, feed, close)
        whole = await run_until_disconnect(http, answer.whole(feed), close)
        return Response(status_code=CLIENT_GONE_STATUS) if whole is None else as_json(whole)


def build_app(service: Service, *, data_parallel_rank: int | None = None) -> Gate:
    """The application of one endpoint; with ``data_parallel_rank`` all its requests go to that replica."""
    app = FastAPI(title="Argosy", version=service.version, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.router.route_class = JsonRoute
    app.state.data_parallel_rank = data_parallel_rank
    _add_error_handlers(app)
    _add_generation(app, service)
    _add_information(app, service)
    add_console(app, service.describe_deployment)
    needs_key = bool(service.settings.api_key)
    app.openapi = description_of(app, service.version, needs_key=needs_key)  # type: ignore[method-assign]
    app.add_middleware(Admission, check=service.check_room_for_one)
    if service.settings.allowed_origins:  # around the one before: its refusals are for other origins, too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id", REPLICA_HEADER],
        )

    def on_answer(method: str, path: str, status: int, request_id: str, duration_s: float) -> None:
        service.metrics.observe_answer(path, status)
        log_answer(method, path, status, request_id, duration_s)

    return Gate(app, service.settings, on_answer)


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, http: Request) -> Response:
        model = service.check_model(body.model)
        params = body.to_params()
        prompts = await service.check_prompts(body.prompts, params, "prompt")
        params = await service.constrain(params, body.constraint)
        feed, request_id = service.open_feed(http, body, prompts, params)
        answer = CompletionAnswer(body, prompts, service.tokenizer, answer_id=request_id, model=model)
        return await service.respond(http, body, feed, answer)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: Request) -> Response:
        model = service.check_model(body.model)
        params = body.to_params()
        prompts = await service.check_prompts([await service.encode_chat(body, body.is_thinking)], params, "messages")
        params = await service.constrain(params, body.constraint, thinking=body.is_thinking)
        feed, request_id = service.open_feed(http, body, prompts, params, text_end_of(body))
        answer = ChatAnswer(body, len(prompts[0].token_ids), service.tokenizer, answer_id=request_id, model=model)
        return await service.respond(http, body, feed, answer)

    @app.post("/generate")
    async def generate(body: GenerateRequest, http: Request) -> Response:
        service.check_model(body.model)
        params = body.to_params()
        prompts = await service.check_prompts([body.prompt_token_ids], params, "prompt_token_ids")
        params = await service.constrain(params, body.constraint)
        feed, request_id = service.open_feed(http, body, prompts, params)
        return await service.respond(http, body, feed, GenerateAnswer(body, answer_id=request_id))

    @app.post("/abort_requests")
    async def abort_requests(body: AbortRequestsRequest) -> Response:
        board = service.board
        error = ApiError(503, "an administrator ended the request", code="aborted")
        wanted = board.request_ids if body.all else body.request_ids
        return as_json({"aborted": [request_id for request_id in wanted if board.end(request_id, error)]})


def _add_information(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Liveness: 503 when an engine is gone or stuck and does not come back."""
        problem = service.health_problem
        return as_json({"status": "ok" if problem is None else problem}, 200 if problem is None else 503)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether requests are taken."""
        obstacle = service.obstacle
        return as_json({"status": "ready" if obstacle is None else obstacle}, 200 if obstacle is None else 503)

    @app.get("/v1/models")
    async def models() -> Response:
        return as_json({"object": "list", "data": [_describe_model(service, name) for name in service.model_names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return as_json(_describe_model(service, service.check_model(name)))

    @app.get("/metrics")
    async def metrics() -> Response:
        text = service.metrics.render(with_vllm_names=service.settings.vllm_metric_names)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def version() -> Response:
        return as_json({"version": service.version})

    @app.get("/load")
    async def load() -> Response:
        return as_json({"server_load": service.board.num_requests})

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        tokenizer = service.tokenizer
        return as_json(
            {
                "vocab_size": tokenizer.vocab_size,
                "bos_token_id": tokenizer.bos_token_id,
                "bos_token": None if tokenizer.bos_token_id is None else token_text(tokenizer, tokenizer.bos_token_id),
                "eos_token_ids": list(tokenizer.eos_token_ids),
                "eos_token": token_text(tokenizer, tokenizer.eos_token_id),
                "adds_bos": tokenizer.adds_bos,
                "special_token_ids": sorted(tokenizer.special_token_ids),
            }
        )

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        service.check_model(body.model)
        tokenizer = service.tokenizer
        text = body.prompt
        if text is None:
            token_ids = await service.encode_chat(body, body.chat_template_kwargs.is_thinking)
        else:
            encode = tokenizer.encode_prompt if body.add_special_tokens else tokenizer.encode
            token_ids = await service.text_work.run(len(text), lambda: encode(text))
        answer: dict[str, object] = {
            "tokens": token_ids,
            "count": len(token_ids),
            "max_model_len": service.max_model_len,
        }
        if body.return_token_strs:
            table = tokenizer.byte_table(skip_special_tokens=False)
            answer["token_strs"] = await service.text_work.run(
                len(token_ids), lambda: [table[token_id].decode(errors="replace") for token_id in token_ids]
            )
        return as_json(answer)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        service.check_model(body.model)
        decode = service.tokenizer.decode
        try:
            text = await service.text_work.run(len(body.tokens), lambda: decode(body.tokens, skip_special_tokens=False))
        except ValueError as error:
            raise ApiError(400, str(error), param="tokens") from error
        return as_json({"prompt": text})


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return error.as_response()

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        return describe_validation(list(error.errors())).as_response()

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        path = shorten(request.scope["path"])
        text = {404: f"there is no route {path}", 405: f"{request.method} is not allowed here"}
        answer = ApiError(error.status_code, text.get(error.status_code, str(error.detail))).as_response()
        answer.headers.update(error.headers or {})  # 405 says what is allowed
        return answer

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        logger.error(
            "bug", exc_info=error, extra={"request_id": request.state.request_id, "path": request.scope["path"]}
        )
        return ApiError(500, "internal error; the server's log has the details under this request id").as_response()


def _describe_model(service: Service, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": service.started_s,
        "owned_by": "argosy",
        "root": service.model_names[0],
        "max_model_len": service.max_model_len,
    }


def _code_of(error: ValueError) -> str | None:
    return "context_length_exceeded" if "max_model_len" in str(error) else None
