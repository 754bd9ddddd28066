"""The OpenAPI document: what the routes take, as ``protocol.py`` says, and what they really answer.

The framework knows the bodies; answers, errors, streams and keys are added here, by a table with a line a route. What
an answer looks like is in ``answers.py``. Invariant: a route that is not in the table is not served.
"""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from argosy.models.deepseek.encoding_messages import ROLES
from argosy.server import answers
from argosy.server.deployment import Deployment
from argosy.server.gate import ADMIN_PATHS, OPEN_PATHS
from argosy.server.protocol import MAX_MESSAGES, MAX_TOOLS

Json = dict[str, object]

_REFERENCES = "#/components/schemas/{model}"
_ERRORS = {
    400: "The request is not HTTP, not JSON, or a field is wrong: param names it.",
    401: "No key or a wrong one.",
    403: "The server was started without an admin key.",
    404: "The model is not served.",
    408: "The request was not complete in time.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    431: "The headers are too large.",
    500: "A bug; the server's log has more under the request id.",
    503: "Too much is under way, the engines are starting, or the server is shutting down: try again later.",
    504: "Not finished within the time allowed.",
}
_FAR = 256
_EVERYWHERE = (400, 408, 413, 431, 500, 503)
_GENERATES = (404, 415, 504)


@dataclass(frozen=True, slots=True)
class RouteAnswers:
    """``event``: of its streams. ``errors``: beside those that every route may give."""

    shape: type[BaseModel] | type[msgspec.Struct] | None = None  # None: plain text
    event: type[BaseModel] | None = None
    errors: tuple[int, ...] = ()
    unwell: type[BaseModel] | None = None  # what a 503 is, where that is no error


ROUTES = {
    "/v1/completions": RouteAnswers(answers.CompletionShape, answers.CompletionShape, _GENERATES),
    "/v1/chat/completions": RouteAnswers(answers.ChatShape, answers.ChatChunkShape, _GENERATES),
    "/generate": RouteAnswers(answers.GenerateShape, answers.GenerateShape, _GENERATES),
    "/tokenize": RouteAnswers(answers.TokenizeShape, errors=(404, 415)),
    "/detokenize": RouteAnswers(answers.DetokenizeShape, errors=(404, 415)),
    "/abort_requests": RouteAnswers(answers.AbortedShape, errors=(403, 415)),
    "/v1/models": RouteAnswers(answers.ModelsShape),
    "/v1/models/{name}": RouteAnswers(answers.ModelShape, errors=(404,)),
    "/health": RouteAnswers(answers.StatusAnswer, unwell=answers.StatusAnswer),
    "/ready": RouteAnswers(answers.StatusAnswer, unwell=answers.StatusAnswer),
    "/version": RouteAnswers(answers.VersionShape),
    "/load": RouteAnswers(answers.LoadShape),
    "/tokenizer_info": RouteAnswers(answers.TokenizerShape),
    "/deployment": RouteAnswers(Deployment),
    "/metrics": RouteAnswers(),
}
_TEXT: Json = {"type": "string", "minLength": 1}
_PARTS: Json = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
    },
}
_FUNCTION: Json = {"type": "object", "properties": {"name": _TEXT}, "required": ["name"]}
_MESSAGES: Json = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": {"anyOf": [{"type": "string"}, _PARTS]},
            "reasoning_content": {"type": "string"},
            "reasoning": {"type": "string"},
            "tool_calls": {"type": "array", "items": {"type": "object"}},
            "tool_call_id": {"type": "string"},
            "tools": {"type": "array", "items": {"type": "object"}},
            "response_format": {"type": "object"},
        },
        "required": ["role"],
    },
    "description": "Roles system, developer, user, assistant, and tool right after the calls it answers.",
}
_TOOLS: Json = {
    "type": "array",
    "maxItems": MAX_TOOLS,
    "items": {
        "type": "object",
        "properties": {"type": {"const": "function"}, "function": _FUNCTION},
        "required": ["type", "function"],
    },
}


def description_of(app: FastAPI, version: str, *, needs_key: bool) -> Callable[[], Json]:
    """For ``app.openapi``; made once, when it is first asked for."""
    made: list[Json] = []

    def describe() -> Json:
        if not made:
            made.append(_describe(app, version, needs_key))
        return made[0]

    return describe


def _describe(app: FastAPI, version: str, needs_key: bool) -> Json:
    document: dict[str, dict[str, dict[str, dict[str, object]]]] = get_openapi(
        title="Argosy", version=version, routes=app.routes, description="OpenAI's API, and what its users rely on."
    )
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas |= _answer_schemas()
    for name in ("ChatRequest", "TokenizeRequest"):
        _refine(schemas[name])
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            has_key = path in ADMIN_PATHS or (needs_key and path not in OPEN_PATHS)
            operation["responses"] = _responses(ROUTES[path], has_key)
            operation["security"] = [{"key": []}] if has_key else []
            if method == "post":
                operation["requestBody"]["required"] = True  # type: ignore[index]
    _drop_far_bounds(document)
    return document  # type: ignore[return-value]


def _answer_schemas() -> dict[str, dict[str, object]]:
    shapes = {answers.ErrorAnswer, *(shape for route in ROUTES.values() for shape in (route.shape, route.event))}
    models = [shape for shape in shapes if shape is not None and issubclass(shape, BaseModel)]
    structs = [shape for shape in shapes if shape is not None and issubclass(shape, msgspec.Struct)]
    _, made = msgspec.json.schema_components(structs, ref_template=_REFERENCES.replace("model", "name"))
    ordered = sorted(models, key=lambda shape: shape.__name__)
    _, definitions = models_json_schema([(shape, "validation") for shape in ordered], ref_template=_REFERENCES)
    return {**made, **definitions["$defs"]}


def _refine(schema: dict[str, object]) -> None:
    """What the encoding checks and pydantic does not see."""
    fields = schema["properties"]
    assert isinstance(fields, dict)
    for name, shape in (("messages", _MESSAGES), ("tools", _TOOLS)):
        is_optional = "anyOf" in fields[name]
        fields[name] = {"anyOf": [shape, {"type": "null"}]} if is_optional else shape


def _drop_far_bounds(part: object) -> None:
    """Of lists and texts: tools try every bound that they read of, and 413 or 400 says so beyond these."""
    if isinstance(part, dict):
        for name in ("maxItems", "maxLength"):
            if isinstance(part.get(name), int) and part[name] > _FAR:
                del part[name]
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _drop_far_bounds(inner)


def _responses(route: RouteAnswers, has_key: bool) -> Json:
    content: Json = {"application/json": _schema_of(route.shape)} if route.shape else {"text/plain": {"schema": _TEXT}}
    if route.event is not None:
        content["text/event-stream"] = {
            "schema": {
                "type": "string",
                "description": f"With stream: true. Each event is `data: ` and {route.event.__name__} as JSON; "
                "the last is `data: [DONE]`. A failure after the first is an event with ErrorAnswer.",
            }
        }
    responses: Json = {"200": _response("The answer.", content)}
    for status in sorted({*_EVERYWHERE, *route.errors, *([401] if has_key else [])}):
        shape = route.unwell if status == 503 and route.unwell else answers.ErrorAnswer
        responses[str(status)] = _response(_ERRORS[status], {"application/json": _schema_of(shape)})
    return responses


def _response(text: str, content: Json) -> Json:
    header = {"description": "The caller's, or a new one.", "schema": {"type": "string"}}
    return {"description": text, "headers": {"X-Request-Id": header}, "content": content}


def _schema_of(shape: type[BaseModel] | type[msgspec.Struct]) -> Json:
    return {"schema": {"$ref": _REFERENCES.format(model=shape.__name__)}}
