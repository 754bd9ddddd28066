"""``argosy`` with ranks in processes of their own, from outside: how it ends, whoever ends it."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.program import Program

GENERATE = ("generate", "--device", "cpu", "--num-threads", "1", "--max-model-len", "256", "--tp", "2", "--dp", "2")
COLLECTIVE_TIMEOUT_S = 4.0

Start = Callable[..., Program]


@pytest.fixture
def start() -> Iterator[Start]:
    programs: list[Program] = []

    def start(*arguments: str) -> Program:
        programs.append(Program(*GENERATE, *arguments))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()


@pytest.fixture
def long_run(tmp_path: Path) -> tuple[str, ...]:
    """Arguments of a run that answers one line soon, and takes far longer than the test for the others."""
    lines = tmp_path / "prompts.jsonl"
    many = '{"prompt": "12 + 30 =", "max_tokens": 200}\n' * 200
    lines.write_text('{"prompt": "12 + 30 =", "max_tokens": 2}\n' + many, encoding="utf-8")
    return ("--input", str(lines), "--ignore-eos")


def wait_for(stage: str, program: Program) -> None:
    match stage:
        case "imports":
            program.wait_for_fork_server()
            time.sleep(0.3)  # into them: they take a second or more
        case "start-up":
            program.wait_for_ranks(4)
        case "steps":
            assert "prompt" in program.wait_for_line()


def test_a_prompt_is_answered_and_nothing_is_left(start: Start) -> None:
    program = start("--chat", "What is 17 + 25?")
    server = program.wait_for_fork_server()
    for number in (signal.SIGINT, signal.SIGTERM):  # for the driver to decide on, which did not get them
        os.kill(server, number)
    code, errors = program.end(timeout_s=60.0)
    assert (code, errors) == (0, "") and "42" in program.output


@pytest.mark.parametrize("stage", ["imports", "start-up", "steps"])
@pytest.mark.parametrize(
    ("end_signal", "exit_code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143)],
    ids=["ctrl-c", "sigterm"],
)
def test_interruption_ends_everything_with_one_line(
    start: Start, long_run: tuple[str, ...], end_signal: signal.Signals, exit_code: int, stage: str
) -> None:
    program = start(*long_run)
    wait_for(stage, program)
    os.killpg(program.process.pid, end_signal)  # as terminals and service managers do: fork server and ranks get it too
    code, errors = program.end()
    assert code == exit_code, errors
    lines = errors.splitlines()
    assert len(lines) == 1 and lines[0].startswith(("argosy: interrupted", "argosy: terminated")), errors


@pytest.mark.parametrize("stage", ["imports", "start-up", "steps"])
def test_nothing_outlives_a_killed_driver(start: Start, long_run: tuple[str, ...], stage: str) -> None:
    program = start(*long_run)
    wait_for(stage, program)
    program.process.kill()
    code, errors = program.end(timeout_s=5.0)
    assert code == -signal.SIGKILL
    assert errors == ""  # who killed it knows


@pytest.mark.parametrize("stage", ["start-up", "steps"])
def test_a_killed_rank_is_named_in_one_line_and_ends_everything(
    start: Start, long_run: tuple[str, ...], stage: str
) -> None:
    program = start(*long_run)
    wait_for(stage, program)
    victim = program.wait_for_ranks(4)[1]
    os.kill(victim, signal.SIGKILL)
    code, errors = program.end()
    assert code == 1, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("argosy: error: ")]
    assert f"(pid {victim}, node 0) was killed by SIGKILL" in line


def test_a_stopped_rank_is_named_and_ends_everything_in_time(start: Start, long_run: tuple[str, ...]) -> None:
    program = start(*long_run, "--collective-timeout-s", str(COLLECTIVE_TIMEOUT_S))
    wait_for("steps", program)
    victim = program.wait_for_ranks(4)[3]
    started_s = time.monotonic()
    os.kill(victim, signal.SIGSTOP)
    code, errors = program.end()
    assert time.monotonic() - started_s < COLLECTIVE_TIMEOUT_S + 5.0
    assert code == 1, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("argosy: error: ")]
    assert re.search(r"no answer from rank 3\b|no sign of life from rank 3\b|rank 3 stopped", line), errors
