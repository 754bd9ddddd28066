"""``argosy serve`` on two nodes, one command each, over the loopback: one API, a node that dies, one end.

What needs a real link between the nodes is in ``tests/dist/test_two_nodes.py``.
"""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.helpers.program import Program, free_port

pytestmark = [pytest.mark.processes, pytest.mark.e2e, pytest.mark.timeout(240)]
SETTINGS = ("serve", "--device", "cpu", "--num-threads", "1", "--max-model-len", "512", "--dp", "2", "--nnodes", "2")
SERVING_S = 90.0  # generous: other tests may keep the cores busy
BODY = {"prompt": "12 + 30 =", "max_tokens": 60, "ignore_eos": True, "temperature": 0}


class Nodes:
    def __init__(self) -> None:
        self.port, self._meeting_port = free_port(), free_port()
        self.programs = [self._start(node_rank) for node_rank in (0, 1)]
        self.url = f"http://127.0.0.1:{self.port}"

    def _start(self, node_rank: int) -> Program:
        place = ("--node-rank", str(node_rank), "--master-addr", "127.0.0.1", "--master-port", str(self._meeting_port))
        return Program(*SETTINGS, *place, "--port", str(self.port))

    def wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + SERVING_S
        while time.monotonic() < deadline_s:
            for program in self.programs:
                assert program.process.poll() is None, program.process.communicate()[1]
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError("the server is not ready")

    def complete(self) -> str:
        answer = httpx.post(f"{self.url}/v1/completions", json=BODY, timeout=SERVING_S).raise_for_status()
        text: str = answer.json()["choices"][0]["text"]
        return text

    def num_under_way(self) -> int:
        load: int = httpx.get(f"{self.url}/load").json()["server_load"]
        return load


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    for program in nodes.programs:
        program.kill()


def test_a_dead_node_comes_back_and_both_end_together(nodes: Nodes) -> None:
    nodes.wait_until_ready()
    expected = nodes.complete()
    (computing,) = children_of(nodes.programs[1].process.pid)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(nodes.complete)
        while not nodes.num_under_way():
            time.sleep(0.01)
        os.kill(computing, signal.SIGKILL)
        assert answer.result() == expected  # behind the tokens that were told, on the next run of both nodes
        last = pool.submit(nodes.complete)
        while not nodes.num_under_way():
            time.sleep(0.01)
        for program in reversed(nodes.programs):  # as when a cluster takes both away: node 1 first
            program.process.send_signal(signal.SIGTERM)
        assert last.result() == expected
    ends = [program.end(timeout_s=60.0) for program in nodes.programs]
    assert [code for code, _ in ends] == [0, 0], ends
    assert "node 1: the run failed; joins the next one" in ends[1][1]
