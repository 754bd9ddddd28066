"""The program of an engine process: it connects to the pool, says that it lives, and becomes an engine.

``python -m argosy.server.engine_process``, started by ``child_process.py``, with its settings on standard input. Here
is what must happen before the seconds in which torch is imported; the engine is in ``engine_loop.py``. Invariant: it
never outlives its parent, nor ends without a word unless it is killed; terminals and service managers cannot end it,
for the parent does, after its requests.
"""

import ctypes
import os
import signal
import sys
import threading
import traceback

import msgspec

from argosy.distributed.fork_server_start import begin_fork_server
from argosy.engine.wire import Spoke
from argosy.server.child_process import read_first_words
from argosy.server.engine_messages import EngineCommand, EngineFailed, EngineLaunch, EngineReport, EngineStarted

PR_SET_PDEATHSIG = 1  # Linux: the signal this process gets when its parent dies
FAILURE_EXIT_CODE = 1


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal or service manager sends them to all
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    stdin = _take_stdin()
    try:
        launch = msgspec.msgpack.decode(read_first_words(stdin), type=EngineLaunch)
    except (RuntimeError, msgspec.MsgspecError) as error:
        sys.exit(f"{__package__}: {error}")
    threading.Thread(target=_end_with_parent, args=(stdin,), name="parent watcher", daemon=True).start()
    decoder: msgspec.msgpack.Decoder[EngineCommand] = msgspec.msgpack.Decoder(EngineCommand)
    spoke: Spoke[EngineReport, EngineCommand] = Spoke(decoder, launch.address, launch.peer)
    spoke.send(EngineStarted(os.getpid()))
    exit_code = 0
    try:
        if launch.config.world_size > 1:
            begin_fork_server(("argosy.engine.worker",))  # its imports take as long as ours: at the same time
        from argosy.server.engine_loop import serve_engine

        serve_engine(launch.config, spoke)
    except BaseException as error:
        spoke.send(_describe(error))
        exit_code = FAILURE_EXIT_CODE
    spoke.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # NOTE(order): no interpreter shutdown: a device that failed may hold its threads.
    os._exit(exit_code)


def _take_stdin() -> int:
    """The standard input, which nobody else sees from now on."""
    stdin = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return stdin


def _end_with_parent(stdin: int) -> None:
    """A thread: the other end is open as long as the parent lives. The ranks of this process end with it."""
    os.read(stdin, 1)
    os._exit(FAILURE_EXIT_CODE)


def _describe(error: BaseException) -> EngineFailed:
    if not isinstance(error, (ValueError, RuntimeError)):
        traceback.print_exception(error)
        return EngineFailed(f"{type(error).__name__}: {error}")
    return EngineFailed(str(error), isinstance(error, ValueError))


if __name__ == "__main__":
    main()
