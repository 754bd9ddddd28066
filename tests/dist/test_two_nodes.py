"""Two nodes of eight ranks each, one command each, over a real link: plain, slow and lossy, and with a node missing.

Needs root, for the nodes are network namespaces. Invariant: what two nodes answer is what one rank answers.
"""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.helpers.two_nodes import ADDRESSES, TwoNodes, can_make_nodes

pytestmark = [
    pytest.mark.skipif(not can_make_nodes(), reason="network namespaces need root and iproute2"),
    pytest.mark.timeout(300),
]
PORT = 29_511
PROMPT = ["--chat", "--max-tokens", "4", "What is 17 + 25?"]
SIZES = ["--tp", "8", "--dp", "2", "--ep", "16", "--device", "cpu", "--nnodes", "2"]
MEETING_PLACE = ["--master-addr", ADDRESSES[0], "--master-port", str(PORT)]


@pytest.fixture(params=[(0.0, 0.0), (0.005, 0.01)], ids=["plain", "5 ms and 1 % loss"])
def nodes(request: pytest.FixtureRequest) -> Iterator[TwoNodes]:
    delay_s, loss = request.param
    link = TwoNodes(delay_s=delay_s, loss=loss)
    yield link
    link.close()


@pytest.fixture
def plain_nodes() -> Iterator[TwoNodes]:
    link = TwoNodes()
    yield link
    link.close()


def start(nodes: TwoNodes, node_rank: int, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "argosy", "generate", *SIZES, *MEETING_PLACE, "--node-rank", str(node_rank)]
    return nodes.popen(node_rank, [*command, *more, *PROMPT], {"OMP_NUM_THREADS": "1"})


def test_two_nodes_answer_as_one_rank_does(nodes: TwoNodes) -> None:
    processes = [start(nodes, node_rank) for node_rank in (0, 1)]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    alone = subprocess.run(
        [sys.executable, "-m", "argosy", "generate", "--device", "cpu", *PROMPT],
        capture_output=True,
        text=True,
        check=True,
    )
    assert outputs[0][0] == alone.stdout
    assert outputs[1][0] == ""  # the second node hosts ranks and says nothing


def test_node_that_never_starts_is_named_within_the_deadline(plain_nodes: TwoNodes) -> None:
    started_s = time.monotonic()
    process = start(plain_nodes, 0, "--startup-timeout-s", "4")
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ranks 8-15 of 16 did not arrive within 4 s" in complaint.splitlines()[-1]
    assert time.monotonic() - started_s < 40


def test_node_without_a_master_gives_up(plain_nodes: TwoNodes) -> None:
    process = start(plain_nodes, 1, "--startup-timeout-s", "2")
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"{ADDRESSES[0]}:{PORT}" in complaint
