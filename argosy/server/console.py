"""The console at ``/``: one page that fetches nothing but this server's API, and ``/deployment``, which feeds it.

The page's parts are files in ``argosy/assets/console/``; here they become one document. It holds no data, so it is
open; all it shows comes through routes that want the key. Invariant: the browser runs exactly the style and the script
whose hashes are in the page's policy, and neither inline handlers nor markup made of strings.
"""

import base64
import hashlib
from collections.abc import Callable
from functools import cache

from fastapi import FastAPI
from starlette.responses import Response

from argosy.assets import read_console_file
from argosy.server.deployment import Deployment
from argosy.server.streaming import as_json

SCRIPTS = ("words.js", "page.js", "playground.js", "charts.js", "deployment.js", "main.js")
_STYLE_PLACE = "/* console.css */"
_SCRIPT_PLACE = "/* the scripts */"


def add_console(app: FastAPI, describe: Callable[[bool], Deployment]) -> None:
    """``describe(has_experts)``."""
    page, headers = build_page()

    @app.get("/", include_in_schema=False)
    async def console() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/deployment")
    async def deployment(experts: bool = True) -> Response:
        """Ranks, engines, queues, caches, recent steps; ``experts=false`` leaves out the experts' counters."""
        return as_json(describe(experts))


@cache
def build_page() -> tuple[bytes, dict[str, str]]:
    """The document and the headers that it is served with."""
    style = read_console_file("console.css")
    script = "".join(read_console_file(name) for name in SCRIPTS)
    page = read_console_file("console.html")
    for place, text in ((_STYLE_PLACE, style), (_SCRIPT_PLACE, script)):
        assert page.count(place) == 1 and "</s" not in text
        page = page.replace(place, text)
    policy = (
        "default-src 'none'",
        f"script-src {_hash(script)}",
        f"style-src {_hash(style)}",
        "connect-src 'self'",
        "img-src data:",  # the page's icon
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # innerHTML and its like throw
        "trusted-types 'none'",
    )
    headers = {
        "Content-Security-Policy": "; ".join(policy),
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return page.encode(), headers


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
