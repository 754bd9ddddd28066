"""Log lines: one JSON object a line on stderr, with the request's id where there is one.

Invariant: no prompt, no completion and no key is ever logged.
"""

import logging
import sys
import time

import msgspec

logger = logging.getLogger("argosy.server")
_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _PLAIN}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def set_up(level: str) -> None:
    """Send the server's and uvicorn's own messages to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("argosy.server", "uvicorn.error"):
        log = logging.getLogger(name)
        log.handlers = [handler]
        log.propagate = False
        log.setLevel(level.upper() if name == "argosy.server" else logging.WARNING)


def log_answer(method: str, path: str, status: int, request_id: str, duration_s: float) -> None:
    """One line an answer; those that only say "still alive" are for debugging."""
    level = logging.DEBUG if path in ("/health", "/ready", "/metrics", "/deployment") else logging.INFO
    if logger.isEnabledFor(level):
        fields = {"request_id": request_id, "method": method, "path": path, "status": status}
        logger.log(level, "answer", extra=fields | {"first_byte_ms": round(duration_s * 1e3, 2)})
