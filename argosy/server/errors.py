"""Errors as the API shows them: always ``{"error": {"message", "type", "param", "code"}}``.

Invariant: whatever goes wrong in a request, its answer is one of these with the right status, never a traceback.
"""

import msgspec
from starlette.responses import Response

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """Ends a request with ``status``. ``param`` is the field at fault, ``retry_after_s`` becomes Retry-After."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, object]:
        error = {"message": self.message, "type": _TYPES.get(self.status, "server_error"), "param": self.param}
        return {"error": error | {"code": self.code or self.status}}

    def as_response(self) -> Response:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(
            msgspec.json.encode(self.body), status_code=self.status, media_type="application/json", headers=headers
        )


def overloaded(message: str, retry_after_s: int = 1) -> ApiError:
    return ApiError(503, message, code="overloaded", retry_after_s=retry_after_s)
