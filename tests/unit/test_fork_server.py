"""What the fork server does first, in a process of its own: it lives through signals, and not beyond its parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVER = "import time, argosy.distributed.fork_server; print('ready', flush=True); time.sleep(60)"
# Starts the server as the launcher does, with the signals blocked, from a thread that ends; then tells its pid.
PARENT = f"""
import signal, subprocess, sys, threading, time

def start():
    global server
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    server = subprocess.Popen([sys.executable, "-c", {SERVER!r}], stdout=subprocess.PIPE)
    server.stdout.readline()

thread = threading.Thread(target=start)
thread.start()
thread.join()
print(server.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def parent() -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    yield process
    process.kill()
    process.wait()


def read_pid(parent: "subprocess.Popen[str]") -> int:
    assert parent.stdout is not None
    return int(parent.stdout.readline())


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"


def test_it_leaves_signals_to_its_parent(parent: "subprocess.Popen[str]") -> None:
    server = read_pid(parent)
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{server}/status").read_text().splitlines())
    assert int(status["SigBlk"], 16) == 0  # ranks would inherit it
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(server, number)
    time.sleep(0.3)
    assert is_alive(server)
    parent.kill()


def test_it_dies_with_its_parent(parent: "subprocess.Popen[str]") -> None:
    server = read_pid(parent)  # the thread that started it has ended, which it survived
    parent.kill()
    parent.wait()
    deadline_s = time.monotonic() + 5.0
    while is_alive(server) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not is_alive(server)


def test_it_ends_at_once_if_its_parent_died_while_python_started() -> None:
    late = "import time; time.sleep(0.5); import argosy.distributed.fork_server; print('lives', flush=True)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {late!r}])"
    run = subprocess.run(
        [sys.executable, "-c", parent],
        capture_output=True,  # until the server, too, has closed its end
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        timeout=30,
    )
    assert (run.stdout, run.stderr, run.returncode) == ("", "", 0)
