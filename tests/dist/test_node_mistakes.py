"""Two nodes, each ``argosy`` of its own, on one machine over the loopback: one answer, and what goes wrong is named.

What needs a real link between the nodes is in ``test_two_nodes.py``.
"""

import io
import multiprocessing
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from argosy.cli.main import main
from argosy.cli.terminal import Terminal
from argosy.distributed.rendezvous import host_store
from argosy.platforms.cpu import CpuPlatform
from tests.helpers.program import Program, free_port

pytestmark = pytest.mark.processes

SETTINGS = ("generate", "--device", "cpu", "--num-threads", "1", "--max-model-len", "256")
QUESTION = ("--chat", "What is 17 + 25?")

StartNode = Callable[..., Program]


def node(rank: int, port: int, nnodes: int = 2) -> tuple[str, ...]:
    place = ("--nnodes", str(nnodes), "--node-rank", str(rank))
    return (*SETTINGS, *place, "--master-addr", "127.0.0.1", "--master-port", str(port))


@pytest.fixture
def start_node() -> Iterator[StartNode]:
    programs: list[Program] = []

    def start(rank: int, port: int, *more: str, question: tuple[str, ...] = QUESTION) -> Program:
        programs.append(Program(*node(rank, port), *more, *question))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()


def run_here(*arguments: str) -> tuple[int, str]:
    """``argosy`` in this process, for what must fail before any rank starts: exit code and stderr."""
    before = set(multiprocessing.active_children())
    stderr = io.StringIO()
    code = main([*arguments, *QUESTION], terminal=Terminal(stdin=io.StringIO(), stdout=io.StringIO(), stderr=stderr))
    assert set(multiprocessing.active_children()) == before
    return code, stderr.getvalue()


# --- two nodes -------------------------------------------------------------------------------------------------------


def test_node_0_answers_and_node_1_only_computes(start_node: StartNode) -> None:
    port = free_port()
    programs = [start_node(rank, port, "--dp", "2") for rank in (0, 1)]
    assert [program.end(timeout_s=90.0) for program in programs] == [
        (0, ""),
        (0, "node 1 of 2: computes until node 0 is done\n"),
    ]
    assert "42" in programs[0].output and programs[1].output == ""


def test_flags_that_differ_are_named_with_both_values_on_both_nodes(start_node: StartNode) -> None:
    port = free_port()
    programs = [start_node(rank, port, "--dp", "2", "--max-num-seqs", number) for rank, number in ((0, "8"), (1, "16"))]
    for program in programs:
        code, errors = program.end(timeout_s=60.0)
        assert code == 2, errors
        (line,) = [line for line in errors.splitlines() if line.startswith("argosy: error: ")]
        assert "--max-num-seqs must be equal on all ranks, got '8' on rank 0, '16' on rank 1" in line


def test_two_nodes_with_one_number_are_told_so(start_node: StartNode) -> None:
    # The store is this test's, so no node 0 is needed, and the first node 1 is surely there before the second.
    store = host_store()
    first = start_node(1, store.address.port, "--dp", "2")
    assert store.wait_for("claim/node/1", 60.0)
    second = start_node(1, store.address.port, "--dp", "2")
    for program in (first, second):
        code, errors = program.end(timeout_s=60.0)
        assert code == 2, errors
        holders = rf"pid {first.process.pid} on \S+, and pid {second.process.pid} on"
        assert re.search(
            rf"argosy: error: two processes claim node 1 of 2: {holders} \S+; start each node once", errors
        )
    store.close()


def test_a_killed_node_0_ends_node_1_with_the_reason(start_node: StartNode, tmp_path: Path) -> None:
    port = free_port()
    lines = tmp_path / "prompts.jsonl"
    many = '{"prompt": "12 + 30 =", "max_tokens": 200}\n' * 200
    lines.write_text('{"prompt": "12 + 30 =", "max_tokens": 2}\n' + many, encoding="utf-8")
    work = ("--ignore-eos", "--input", str(lines))
    programs = [start_node(rank, port, "--dp", "2", question=work) for rank in (0, 1)]
    assert "prompt" in programs[0].wait_for_line()
    programs[0].process.kill()
    programs[0].end()
    code, errors = programs[1].end()
    assert code == 1, errors
    _, *of_rank, error = errors.splitlines()
    assert len(of_rank) == 1 and of_rank[0].startswith("argosy rank 1: the store at"), errors
    assert f"argosy: error: the store at 127.0.0.1:{port} does not answer" in error


# --- before any rank starts ------------------------------------------------------------------------------------------


def test_a_taken_port_is_a_user_error() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, errors = run_here(*node(0, port), "--dp", "2")
    assert code == 2
    assert f"master_port ({port}) on 127.0.0.1 is taken by another process; set --master-port" in errors


def test_an_unreachable_master_is_named_in_time() -> None:
    port, started_s = free_port(), time.monotonic()
    code, errors = run_here(*node(1, port), "--dp", "2", "--startup-timeout-s", "4")
    assert code == 1
    assert 3.0 < time.monotonic() - started_s < 12.0
    assert f"the store at 127.0.0.1:{port} could not be reached within 4 s" in errors
    assert "--master-addr" in errors


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--tp", "3"), r"num_attention_heads \(\d+\) must be divisible by tp_size \(3\)"),
        (("--dp", "3"), r"num_experts \(\d+\) must be divisible by ep_size \(3, which is the world_size"),
        (("--tp", "2", "--ep", "3"), r"ep_size \(3\)"),
        (("--tp", "2", "--ep", "4"), r"ep_size \(4\)"),
        (("--tp", "3", "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", "1"), r"3.*nnodes \(2\)"),
        (("--tp", "0"), r"tp_size.*0"),
    ],
)
def test_sizes_that_do_not_divide_are_a_user_error(flags: tuple[str, ...], complaint: str) -> None:
    code, errors = run_here(*SETTINGS, *flags)
    assert code == 2, errors
    assert re.search(complaint, errors), errors


class TwoCards(CpuPlatform):
    """A machine with two devices that ranks cannot share."""

    def num_devices(self) -> int | None:
        return 2


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--tp", "4"), r"4 ranks of this node .* need a device each, but there are 2 from number 0 on; lower --dp"),
        (("--dp", "2", "--tp", "2"), r"4 ranks of this node .* but there are 2 from number 0 on"),
        (("--tp", "2", "--first-device", "1"), r"2 ranks of this node .* but there are 1 from number 1 on"),
        (
            ("--first-device", "2"),
            r"first_device \(2\) must be below the number of devices \(2\); lower --first-device",
        ),
        (("--first-device", "-1"), r"first_device must be an integer >= 0, got -1"),
    ],
)
def test_more_ranks_than_devices_is_a_user_error(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], complaint: str
) -> None:
    monkeypatch.setattr("argosy.engine.build.select_platform", lambda device: TwoCards())
    code, errors = run_here(*SETTINGS, *flags)
    assert code == 2, errors
    assert re.search(complaint, errors), errors
