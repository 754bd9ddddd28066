"""Which replica a request names: in its body, in a header, by its port; and what is refused."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from argosy.server.api_server import build_app

DP_SIZE = 4


@pytest.fixture
def ask(build_stand: Callable[..., Any]) -> Callable[..., tuple[httpx.Response, list[int | None]]]:
    """One request to a server of four replicas: the answer, and the replicas that were asked of the pool."""

    def ask(
        path: str = "/v1/completions", port_of: int | None = None, header: str | None = None, **body: object
    ) -> tuple[httpx.Response, list[int | None]]:
        stand = build_stand()
        stand.service.open(2048, 8, DP_SIZE)
        headers = {} if header is None else {"X-data-parallel-rank": header}
        content: dict[str, object] = {"prompt": "1 + 1"}
        if "chat" in path:
            content = {"messages": [{"role": "user", "content": "1 + 1"}]}

        async def post() -> httpx.Response:
            transport = httpx.ASGITransport(app=build_app(stand.service, data_parallel_rank=port_of))
            async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
                return await client.post(path, json=content | body)

        return asyncio.run(post()), stand.pool.replicas

    return ask


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_body_header_and_port_name_the_replica(ask: Callable[..., Any], path: str) -> None:
    for how in ({"data_parallel_rank": 3}, {"header": "3"}, {"port_of": 3}, {"data_parallel_rank": 3, "header": "3"}):
        answer, replicas = ask(path, **how)
        assert answer.status_code == 200 and replicas == [3], how
    assert ask(path)[1] == [None]


def test_every_prompt_of_a_request_goes_there(ask: Callable[..., Any]) -> None:
    answer, replicas = ask(prompt=["1", "2"], header="2")
    assert answer.status_code == 200 and replicas == [2, 2]


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ({"data_parallel_rank": 4}, "data_parallel_rank (4) must be in [0, dp_size = 4)"),
        ({"header": "4"}, "data_parallel_rank (4) must be in [0, dp_size = 4)"),
        ({"data_parallel_rank": -1}, "data_parallel_rank: Input should be greater than or equal to 0"),
        ({"data_parallel_rank": "1"}, "data_parallel_rank: Input should be a valid integer"),
        ({"header": "one"}, "the header X-data-parallel-rank must be the number of a replica"),
        ({"header": "-1"}, "the header X-data-parallel-rank must be the number of a replica"),
        ({"header": "9" * 5000}, "the header X-data-parallel-rank must be the number of a replica"),
        ({"data_parallel_rank": 1, "header": "2"}, "the body says 1, the header X-data-parallel-rank says 2"),
        ({"data_parallel_rank": 1, "port_of": 0}, "the body says 1, this port says 0"),
    ],
)
def test_what_is_no_replica_or_two_is_refused(ask: Callable[..., Any], how: dict[str, Any], complaint: str) -> None:
    answer, replicas = ask(**how)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "data_parallel_rank")
    assert complaint in error["message"] and replicas == []
