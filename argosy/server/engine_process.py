"""The program of an engine process: it connects to the pool, says that it lives, and becomes an engine.

``python -m argosy.server.engine_process``, started by ``child_process.py``, with its settings on standard input. Here
is what must happen before the seconds in which torch is imported; the engine is in ``engine_loop.py``. A spare one
(``SPARE_ARGUMENT``) has them behind it when it hears what to be.
Invariant: it never outlives its parent, nor ends without a word unless it is killed; terminals and service managers
cannot end it, for the parent does, after its requests.
"""

import os
import signal
import sys
import traceback

import msgspec

from argosy.distributed.fork_server_start import begin_fork_server
from argosy.engine.rank_imports import import_as_rank, modules_of_ranks
from argosy.engine.wire import Spoke
from argosy.server.child_process import die_with_parent, read_first_words, take_stdin, watch_parent
from argosy.server.engine_messages import (
    SPARE_ARGUMENT,
    EngineCommand,
    EngineFailed,
    EngineLaunch,
    EngineReport,
    EngineStarted,
)

FAILURE_EXIT_CODE = 1


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal or service manager sends them to all
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    stdin = take_stdin()
    if sys.argv[1:2] == [SPARE_ARGUMENT]:
        _import_engine(num_ranks=int(sys.argv[2]))
    try:
        launch = msgspec.msgpack.decode(read_first_words(stdin), type=EngineLaunch)
    except (RuntimeError, msgspec.MsgspecError) as error:
        sys.exit(f"{__package__}: {error}")
    watch_parent(stdin)
    decoder: msgspec.msgpack.Decoder[EngineCommand] = msgspec.msgpack.Decoder(EngineCommand)
    spoke: Spoke[EngineReport, EngineCommand] = Spoke(decoder, launch.address, launch.peer)
    spoke.send(EngineStarted(os.getpid()))
    exit_code = 0
    try:
        _import_engine(num_ranks=launch.config.world_size)
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


def _import_engine(num_ranks: int) -> None:
    """A second time it takes no time."""
    if num_ranks > 1:
        begin_fork_server(modules_of_ranks())  # its imports take as long as ours: at the same time
    import argosy.server.engine_loop  # noqa: F401

    if num_ranks == 1:
        import_as_rank()


def _describe(error: BaseException) -> EngineFailed:
    if not isinstance(error, (ValueError, RuntimeError)):
        traceback.print_exception(error)
        return EngineFailed(f"{type(error).__name__}: {error}")
    return EngineFailed(str(error), isinstance(error, ValueError))


if __name__ == "__main__":
    main()
