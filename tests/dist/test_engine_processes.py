"""``argosy`` with ranks in processes of their own, from outside: how it ends, whoever ends it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

GENERATE = ("generate", "--device", "cpu", "--num-threads", "1", "--max-model-len", "256", "--tp", "2", "--dp", "2")
END_S = 20.0  # generous: other tests may keep the cores busy


class Program:
    """``argosy`` in a session of its own, so that all its processes can be found and signalled together."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "argosy", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for_ranks(self, number: int) -> list[int]:
        """Until a fork server has ``number`` children; their pids."""
        deadline_s = time.monotonic() + 60.0
        while time.monotonic() < deadline_s:
            assert self.process.poll() is None, self.process.communicate()[1]
            processes = _session(self.process.pid)
            servers = [pid for pid, parent in processes.items() if parent == self.process.pid]
            ranks = [pid for pid, parent in processes.items() if parent in servers]
            if len(ranks) == number:
                return sorted(ranks)
            time.sleep(0.05)
        raise AssertionError(f"{number} ranks did not start")

    def end(self) -> tuple[int, str]:
        """Exit code and stderr. Fails if any process of the session is left afterwards."""
        errors = self.process.communicate(timeout=END_S)[1]
        deadline_s = time.monotonic() + END_S
        while (left := _session(self.process.pid)) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert not left, f"processes {sorted(left)} are left"
        return self.process.returncode, errors

    def kill(self) -> None:
        for pid in _session(self.process.pid):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def start(*arguments: str) -> Program:
        programs.append(Program(*GENERATE, *arguments))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()


@pytest.fixture
def long_run(tmp_path: Path) -> tuple[str, ...]:
    """Arguments of a run that takes far longer than the test."""
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "12 + 30 ="}\n' * 200, encoding="utf-8")
    return ("--input", str(lines), "--ignore-eos", "--max-tokens", "200")


def _session(session: int) -> dict[int, int]:
    """pid -> parent pid of every living process of a session."""
    processes = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            fields = (directory / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # it ended just now
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            processes[int(directory.name)] = int(fields[1])
    return processes


def test_a_prompt_is_answered_and_nothing_is_left(start: Callable[..., Program]) -> None:
    program = start("--chat", "What is 17 + 25?")
    output = program.process.communicate(timeout=60.0)[0]
    assert program.process.returncode == 0 and "42" in output
    assert _session(program.process.pid) == {}


@pytest.mark.parametrize(
    ("end_signal", "exit_code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143)],
    ids=["ctrl-c", "sigterm"],
)
def test_interruption_ends_everything_with_one_line(
    start: Callable[..., Program], long_run: tuple[str, ...], end_signal: signal.Signals, exit_code: int
) -> None:
    program = start(*long_run)
    program.wait_for_ranks(4)
    time.sleep(2.5)  # into the steps, or the end of the start: both must end well
    if end_signal == signal.SIGINT:
        os.killpg(program.process.pid, signal.SIGINT)  # as a terminal does: ranks get it too
    else:
        program.process.terminate()
    code, errors = program.end()
    assert code == exit_code, errors
    lines = errors.splitlines()
    assert len(lines) == 1 and lines[0].startswith(("argosy: interrupted", "argosy: terminated")), errors


@pytest.mark.parametrize("wait_s", [0.0, 3.0], ids=["in start-up", "in a step"])
def test_ranks_do_not_outlive_a_killed_driver(
    start: Callable[..., Program], long_run: tuple[str, ...], wait_s: float
) -> None:
    program = start(*long_run)
    program.wait_for_ranks(4)
    time.sleep(wait_s)
    program.process.kill()
    assert program.end()[0] == -signal.SIGKILL


@pytest.mark.parametrize("wait_s", [0.0, 3.0], ids=["in start-up", "in a step"])
def test_a_killed_rank_is_named_in_one_line_and_ends_everything(
    start: Callable[..., Program], long_run: tuple[str, ...], wait_s: float
) -> None:
    program = start(*long_run)
    victim = program.wait_for_ranks(4)[1]
    time.sleep(wait_s)
    os.kill(victim, signal.SIGKILL)
    code, errors = program.end()
    assert code == 1, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("argosy: error: ")]
    assert f"(pid {victim}, node 0) was killed by SIGKILL" in line
