"""``argosy`` with ranks in processes of their own, from outside: how it ends, whoever ends it."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.helpers.program import Program
from tests.helpers.rank_entries import is_port_free

pytestmark = pytest.mark.processes

GENERATE = ("generate", "--device", "cpu", "--num-threads", "1", "--max-model-len", "256", "--tp", "2", "--dp", "2")
MARGIN_S = 5.0  # from the end of a collective's time to that of every process

STAGES = ("imports", "start-up", "steps")  # in the order in which a program comes to them

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


def each_at_its_stage(stages: Sequence[str], start: Start, arguments: tuple[str, ...]) -> Iterator[tuple[str, Program]]:
    """A program for each stage, when it is there. All are started at once: most of a start waits for one core."""
    for stage, program in [(stage, start(*arguments)) for stage in stages]:
        wait_for(stage, program)
        yield stage, program


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


@pytest.mark.parametrize(
    ("end_signal", "exit_code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143)],
    ids=["ctrl-c", "sigterm"],
)
def test_interruption_ends_everything_with_one_line(
    start: Start, long_run: tuple[str, ...], end_signal: signal.Signals, exit_code: int
) -> None:
    for stage, program in each_at_its_stage(STAGES, start, long_run):
        # As terminals and service managers do: fork server and ranks get it too.
        os.killpg(program.process.pid, end_signal)
        code, errors = program.end()
        assert code == exit_code, (stage, errors)
        lines = errors.splitlines()
        assert len(lines) == 1 and lines[0].startswith(("argosy: interrupted", "argosy: terminated")), (stage, errors)


def test_a_program_started_without_ctrl_c_runs_and_ends_at_sigterm(start: Start, long_run: tuple[str, ...]) -> None:
    """A shell that starts a program in the background makes it ignore SIGINT, and so all that it starts."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        program = start(*long_run)
    finally:
        signal.signal(signal.SIGINT, handler)
    wait_for("steps", program)
    for pid in program.wait_for_ranks(4):
        os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    assert program.process.poll() is None and len(program.wait_for_ranks(4)) == 4
    os.killpg(program.process.pid, signal.SIGTERM)
    code, errors = program.end()
    assert code == 143, errors
    assert len(errors.splitlines()) == 1 and errors.startswith("argosy: interrupted"), errors


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_outlives_a_killed_driver(start: Start, long_run: tuple[str, ...], stage: str) -> None:
    program = start(*long_run)
    wait_for(stage, program)
    program.process.kill()
    code, errors = program.end(timeout_s=5.0)
    assert code == -signal.SIGKILL
    assert errors == ""  # who killed it knows


def test_a_killed_rank_is_named_in_one_line_and_ends_everything(start: Start, long_run: tuple[str, ...]) -> None:
    for stage, program in each_at_its_stage(STAGES[1:], start, long_run):
        victim = program.wait_for_ranks(4)[1]
        os.kill(victim, signal.SIGKILL)
        code, errors = program.end()
        assert code == 1, (stage, errors)
        (line,) = [line for line in errors.splitlines() if line.startswith("argosy: error: ")]
        assert f"(pid {victim}, node 0) was killed by SIGKILL" in line, (stage, errors)


@pytest.mark.parametrize(
    ("flags", "timeout_s"),
    [
        pytest.param(("--collective-timeout-s", "3"), 3.0, id="3 s"),
        pytest.param((), 30.0, marks=pytest.mark.slow, id="by default"),
    ],
)
def test_a_stopped_rank_is_named_and_everything_ends_in_time(
    start: Start, long_run: tuple[str, ...], flags: tuple[str, ...], timeout_s: float
) -> None:
    program = start(*long_run, *flags)
    wait_for("steps", program)
    victim = program.wait_for_ranks(4)[3]
    ports, shared_memory = program.listening_ports(), program.shared_memory()
    assert ports and shared_memory
    started_s = time.monotonic()
    os.kill(victim, signal.SIGSTOP)
    code, errors = program.end(timeout_s=timeout_s + MARGIN_S)
    assert time.monotonic() - started_s < timeout_s + MARGIN_S
    assert code == 1, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("argosy: error: ")]
    assert re.search(r"no answer from rank 3\b|no sign of life from rank 3\b|rank 3 stopped", line), errors
    assert {int(rank) for rank in re.findall(r"^argosy rank (\d): ", errors, re.MULTILINE)} == {0, 1, 2}
    assert all(is_port_free(port) for port in ports)
    assert not [path for path in shared_memory if path.exists()]
    assert [path.name.rpartition("-")[0] for path in program.temporary_directory.iterdir()] == ["argosy-failure"]
