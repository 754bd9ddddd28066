"""Refuses generation where nothing more is taken, before a body is read: a full server has no time for that.

It counts nothing itself, and sees no fields: what a request of several completions needs is checked again with them.
Invariant: a request that is refused here costs neither its body's bytes nor a reading of them.
"""

from collections.abc import Callable

from argosy.server.errors import ApiError
from argosy.server.gate import App, Receive, Scope, Send

GENERATING_PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/generate"})


class Admission:
    """ASGI, inside of what answers for other origins. ``check`` raises ApiError if not even one completion is taken."""

    def __init__(self, app: App, check: Callable[[], None]) -> None:
        self._app = app
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in GENERATING_PATHS:
            try:
                self._check()
            except ApiError as refusal:
                await refusal.as_response()(scope, receive, send)
                return
        await self._app(scope, receive, send)
