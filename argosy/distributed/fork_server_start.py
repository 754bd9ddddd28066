"""Starts the process from which this node's ranks are forked, which has imported torch before.

Both take seconds of imports, so a program that knows early that it will have ranks begins here before it imports torch
itself: this file does not. What the server does first is ``fork_server.py``; ranks are ``launcher.py``'s. Invariant: a
process has one fork server, however often it is begun.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from typing import Any

FORK_SERVER_MODULE = "argosy.distributed.fork_server"
LAUNCHER_MODULE = "argosy.distributed.launcher"
SHIELDED_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # the fork server unblocks them when it is ready to ignore them
UNSENT_SIGNAL = signal.SIGURG  # nobody sends it


def begin_fork_server(preload: tuple[str, ...]) -> None:
    """Returns while the server still imports ``preload``, torch, and what this process has loaded of ours.

    Nothing if there is one already.
    """
    ours = [name for name in sys.modules if name.startswith("argosy.") and not name.endswith("__main__")]
    multiprocessing.set_forkserver_preload([FORK_SERVER_MODULE, "torch", LAUNCHER_MODULE, *ours, *preload])
    with environment_of_ranks():
        resource_tracker.ensure_running()  # NOTE(order): first, for it unblocks the signals
        signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED_SIGNALS)  # the server inherits it
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SHIELDED_SIGNALS)


def start_fork_server(preload: tuple[str, ...]) -> None:
    """Returns when the imports are done and a fork takes milliseconds."""
    begin_fork_server(preload)
    probe = multiprocessing.get_context("forkserver").Process(target=_become_nothing)
    probe.start()
    probe.join()


def end_fork_server() -> None:
    """After a start that was broken off in the seconds of its imports."""
    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None:
        os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()


def close_fork_server_door() -> None:
    """No more processes will be wanted: whoever connects to the server with something else would end it, and all ranks.

    For programs that start their ranks once. Nothing if there is no server.
    """
    address = getattr(forkserver._forkserver, "_forkserver_address", None)
    if address is not None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address)


@contextlib.contextmanager
def environment_of_ranks() -> Iterator[None]:
    """For processes started within."""
    warnings_setting = [os.environ["PYTHONWARNINGS"]] if os.environ.get("PYTHONWARNINGS") else []
    changes = {
        # When a peer dies, torch's own stack traces would bury our report.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        # torch.distributed.elastic would replace the handlers of the program that uses us, and raise from them.
        "TORCHELASTIC_SIGNALS_TO_HANDLE": UNSENT_SIGNAL.name,
        # When this process is killed, Python's resource tracker cleans up after it; that is no news.
        "PYTHONWARNINGS": ",".join([*warnings_setting, "ignore:resource_tracker"]),
    }
    previous = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _become_nothing() -> None:
    """In a new process, which shows that the fork server can make some."""
