"""``argosy`` under torchrun: each of its processes is one rank, and rank 0's answers."""

import io

import pytest

from argosy.cli.main import main
from argosy.cli.terminal import Terminal
from tests.helpers.program import Program, free_port

pytestmark = pytest.mark.processes

SETTINGS = ("generate", "--device", "cpu", "--num-threads", "1", "--max-model-len", "256")
QUESTION = ("--chat", "What is 17 + 25?")


def test_one_process_answers_and_all_end_well() -> None:
    torchrun = ("--nnodes", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    command = (*torchrun, "--nproc-per-node", "2", "-m", "argosy", *SETTINGS, "--tp", "2", *QUESTION)
    program = Program(*command, module="torch.distributed.run")
    try:
        code, errors = program.end(timeout_s=90.0)
        assert code == 0, errors
        assert "42" in program.output and program.output.count("####") == 1, program.output  # said once
        assert "socket.cpp" not in errors and "argosy" not in errors, errors
    finally:
        program.kill()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--tp", "4"), "torchrun started 2 processes (WORLD_SIZE), but dp_size (1) x tp_size (4) is 4"),
        (("--dp", "3"), "torchrun started 2 processes (WORLD_SIZE), but dp_size (3) x tp_size (1) is 3"),
        ((), "torchrun started 2 processes (WORLD_SIZE), but dp_size (1) x tp_size (1) is 1"),
        (
            ("--tp", "2", "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", "1"),
            "nnodes (2) would start ranks itself; give --nnodes to torchrun alone",
        ),
    ],
    ids=["tp", "dp", "one rank", "nnodes"],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_sizes_that_are_not_torchruns_are_a_user_error(
    monkeypatch: pytest.MonkeyPatch, rank: str, flags: tuple[str, ...], complaint: str
) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal(stdin=io.StringIO(), stdout=io.StringIO(), stderr=io.StringIO())
    assert main([*SETTINGS, *flags, *QUESTION], terminal=terminal) == 2
    assert isinstance(terminal.stderr, io.StringIO)
    assert complaint in terminal.stderr.getvalue()
