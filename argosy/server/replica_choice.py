"""Which replica a request goes to, where somebody says so: its endpoint, its body, or a balancer's header.

Invariant: what is said twice must agree, and a replica that does not exist is an error, never another replica.
"""

from starlette.requests import Request

from argosy.engine.dp_load_balancer import check_replica
from argosy.server.errors import ApiError

HEADER = "X-data-parallel-rank"  # vLLM's
FIELD = "data_parallel_rank"
_MAX_DIGITS = 6


def choose_replica(http: Request, asked: int | None, dp_size: int) -> int | None:
    """None: nobody says. ``asked``: by the body.

    Raises:
        ApiError: 400, no such replica, or two that differ.
    """
    of_endpoint: int | None = getattr(http.app.state, FIELD, None)
    of_header = _read_header(http.headers.get(HEADER))
    named = {"the body": asked, f"the header {HEADER}": of_header, "this port": of_endpoint}
    said = {who: replica for who, replica in named.items() if replica is not None}
    if len(set(said.values())) > 1:
        differing = ", ".join(f"{who} says {replica}" for who, replica in said.items())
        raise ApiError(400, f"{FIELD} is said differently: {differing}; name one replica", param=FIELD)
    replica = next(iter(said.values()), None)
    if replica is not None:
        try:
            check_replica(replica, dp_size)
        except ValueError as error:
            raise ApiError(400, str(error), param=FIELD) from error
    return replica


def _read_header(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS):
        raise ApiError(400, f"the header {HEADER} must be the number of a replica, from 0 on", param=FIELD)
    return int(text)
