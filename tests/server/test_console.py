"""The console's page as it is served, and ``/deployment``, which feeds it."""

import asyncio
import base64
import hashlib
import re
from collections.abc import Callable
from html.parser import HTMLParser

import httpx
import pytest

from argosy.server.console import build_page
from tests.helpers.played_engines import PlayedEngines

ADDRESS = re.compile(r"(?:https?:|wss?:)?//[\w.-]+")


def get(stand, path: str, **headers: str) -> httpx.Response:
    async def go() -> httpx.Response:
        async with stand.client(**headers) as client:
            return await client.get(path)

    return asyncio.run(go())


class PageReader(HTMLParser):
    """What a page would run and load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.blocks: dict[str, list[str]] = {"script": [], "style": []}
        self.attributes: list[tuple[str, str, str]] = []
        self._block: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in self.blocks:
            self._block = tag
            self.blocks[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._block = None

    def handle_data(self, data: str) -> None:
        if self._block is not None:
            self.blocks[self._block][-1] += data


def test_the_page_is_open_and_its_data_is_not(build_stand: Callable) -> None:
    stand = build_stand(api_key=("key",))
    page = get(stand, "/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    assert "argosy-tiny" not in page.text and "1.2.3" not in page.text
    assert get(stand, "/deployment").status_code == 401
    assert get(stand, "/deployment", authorization="Bearer key").status_code == 200


def test_headers_let_the_page_reach_this_server_alone(stand) -> None:
    headers = get(stand, "/").headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    read = PageReader(get(stand, "/").text)
    for kind in ("script", "style"):
        (block,) = read.blocks[kind]
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert policy.pop(f"{kind}-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == "same-origin"


def test_the_page_names_no_other_host_and_has_no_inline_handlers(stand) -> None:
    page = get(stand, "/").text
    read = PageReader(page)
    assert not [each for each in read.attributes if each[1].startswith("on") or each[1] in ("style", "src", "srcset")]
    links = {value for _, name, value in read.attributes if name in ("href", "action", "data", "poster", "ping")}
    assert {link for link in links if not link.startswith("#")} == {
        link for link in links if link.startswith("data:image/svg+xml;base64,")
    }
    assert not ADDRESS.findall(page.replace("// ", ""))  # comments begin so
    for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "@import"):
        assert name not in page
    assert len(page.encode()) < 100_000


def test_the_page_is_whole() -> None:
    page, _ = build_page()
    assert page.startswith(b"<!doctype html>") and page.rstrip().endswith(b"</html>")
    assert b"the scripts */" not in page and b"/* console.css" not in page


def test_before_the_engines_are_ready(build_stand: Callable) -> None:
    stand = build_stand()
    stand.service._checker = None
    answer = get(stand, "/deployment").json()
    assert answer["server"]["status"] == "the engines are starting"
    assert answer["description"] is None and answer["ranks"] == answer["engines"] == [] and answer["experts"] is None


def test_ranks_have_the_coordinates_of_the_mesh(stand) -> None:
    engines = stand.service.engines = PlayedEngines(dp_size=2, tp_size=2, ep_size=4, nnodes=2)
    answer = get(stand, "/deployment").json()
    places = [[rank[name] for name in ("rank", "node", "local_rank", "dp", "tp", "ep")] for rank in answer["ranks"]]
    assert places == [[0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 1], [2, 1, 0, 1, 0, 2], [3, 1, 1, 1, 1, 3]]
    assert [rank["is_leader"] for rank in answer["ranks"]] == [True, False, True, False]
    assert [rank["pid"] for rank in answer["ranks"]] == [5000, 5001, 5002, 5003]
    assert answer["ranks"][0]["bytes_sent"] == {"ep": 10**9, "tp": 0}
    expected = [sum((rank[layer] for rank in engines.loads), []) for layer in range(engines.num_layers)]
    assert answer["experts"]["tokens"] == expected
    assert answer["experts"]["imbalance"] == [pytest.approx(max(line) / (sum(line) / len(line))) for line in expected]
    assert [len(replica["recent_steps"]) for replica in answer["replicas"]] == [96, 96]
    assert answer["server"]["version"] == "1.2.3" and answer["description"]["nnodes"] == 2
    assert get(stand, "/deployment?experts=false").json()["experts"] is None


def test_ranks_are_counted_over_independent_engines(stand) -> None:
    states = {1: "restarting"}
    engines = PlayedEngines(dp_size=3, tp_size=2, ep_size=2, num_engines=3, states=states)
    stand.service.engines = engines
    answer = get(stand, "/deployment").json()
    ranks = answer["ranks"]
    assert [(rank["engine"], rank["dp"], rank["tp"], rank["ep"]) for rank in ranks] == [
        (dp, dp, tp, tp) for dp in range(3) for tp in range(2)
    ]
    assert [rank["state"] for rank in ranks] == ["ready"] * 2 + ["restarting"] * 2 + ["ready"] * 2
    assert [rank["pid"] for rank in ranks] == [5000, 5001, None, None, 5004, 5005]
    assert [replica["dp"] for replica in answer["replicas"]] == [0, 2]
    assert answer["engines"][1]["pid"] is None and answer["engines"][1]["num_restarts"] == 1
    told = [engines.loads[rank] for rank in (0, 1, 4, 5)]
    first = [a + b for a, b in zip(told[0][0], told[2][0], strict=True)]
    second = [a + b for a, b in zip(told[1][0], told[3][0], strict=True)]
    assert answer["experts"]["tokens"][0] == first + second
    sums = sum(first), sum(second)
    assert answer["experts"]["rank_imbalance"][0] == pytest.approx(2 * max(sums) / sum(sums))
