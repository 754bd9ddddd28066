"""Bodies as strict JSON: what two readers could read differently is refused before any field is looked at.

Python's own reader takes NaN, half characters, and the last of two equal keys. What fields mean is ``protocol.py``'s.
Invariant: a value that leaves this file can be written as UTF-8 JSON again, and is the only reading of its body.
"""

import json
import re
from collections.abc import Callable, Coroutine

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from argosy.server.errors import ApiError
from argosy.server.streaming import CLIENT_GONE_STATUS

MAX_SHOWN_CHARS = 64
MAX_COMMAS = 2**20  # reading more values would hold the event loop up; in a text that fits a model there are fewer
_HALF_CHARACTER = "the body holds half of a surrogate pair, which is no character; remove it"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonRoute(APIRoute):
    """A route that reads its body with ``read_json``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[None, None, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            if request.method != "POST":
                return await handle(request)
            _check_type(request.headers)
            strict = _JsonRequest(request.scope, request.receive)
            try:
                await strict.json()  # here, because the framework has words of its own for whatever fails in there
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE_STATUS)
            return await handle(strict)

        return handle_strictly


class _JsonRequest(Request):
    """Parsed once."""

    async def json(self) -> object:
        if "argosy.body" not in self.scope:
            self.scope["argosy.body"] = read_json(await self.body())
        return self.scope["argosy.body"]


def read_json(body: bytes) -> object:
    """Raises ApiError (400) saying what is wrong."""
    if body.count(b",") > MAX_COMMAS:
        raise ApiError(400, f"the body holds more than {MAX_COMMAS} values; no model takes so many tokens")
    try:
        value = json.loads(body.decode(), object_pairs_hook=_build_object, parse_constant=_refuse_constant)
        if _SURROGATE.search(body) and not _is_unicode(value):
            raise ApiError(400, _HALF_CHARACTER, param=_find_half_character(value))
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start} cannot stand there") from error
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise ApiError(400, f"the body cannot be read: {error}") from error
    return value


def shorten(text: str) -> str:
    """What a client sent, as far as an error message repeats it."""
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."


def _check_type(headers: Headers) -> None:
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON; send Content-Type: application/json")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "the body is compressed, which is not supported; send it without Content-Encoding")


def _is_unicode(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _find_half_character(value: object) -> str | None:
    """The name of the field that holds it; None if that is in a name."""
    fields = value.items() if isinstance(value, dict) else ()
    return next((name for name, field in fields if _is_unicode(name) and not _is_unicode(field)), None)


def _build_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    built = dict(pairs)
    if len(built) < len(pairs):
        names = [name for name, _ in pairs]
        twice = shorten(next(name for name in names if names.count(name) > 1))
        raise ApiError(400, f"the body has {twice!r} twice in one object; give it once", param=twice)
    return built


def _refuse_constant(name: str) -> object:
    raise ApiError(400, f"the body is not JSON: {name} is no number; leave the field out")
