"""The program that computes on a node other than 0: it waits for node 0, runs this node's ranks once, says how it was.

``python -m argosy.server.node_process``, started by ``node.py``, with its settings on standard input. A process for
every run, so that each has the code that is installed now and nothing of the run before. Invariant: SIGTERM ends it
while it waits, and does nothing while ranks run: node 0 ends those, after its requests.
"""

import os
import signal
import sys
from typing import NoReturn

import msgspec

from argosy.config import EngineConfig
from argosy.distributed.fork_server_start import begin_fork_server
from argosy.engine.rank_imports import modules_of_ranks
from argosy.server.child_process import die_with_parent, read_first_words, take_stdin, watch_parent

EXIT_OK = 0  # node 0 has ended the engine in good order
EXIT_FAILED = 1  # the run failed; there may be another
EXIT_USER_ERROR = 2  # and trying again would not help
EXIT_NO_RUN = 3  # node 0 is not there


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()
    stdin = take_stdin()
    try:
        config = msgspec.msgpack.decode(read_first_words(stdin), type=EngineConfig)
    except (RuntimeError, msgspec.MsgspecError) as error:
        sys.exit(f"{__package__}: {error}")
    watch_parent(stdin)
    _leave(_host(config))


def _host(config: EngineConfig) -> int:
    begin_fork_server(modules_of_ranks())  # its imports take as long as ours: at the same time
    from argosy.engine.deployment import host_ranks
    from argosy.engine.rejoin import NoRunError, await_run

    try:
        await_run(config)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("has found node 0", flush=True)
        host_ranks(config)
    except NoRunError as error:
        return _complain(error, EXIT_NO_RUN)
    except ValueError as error:
        return _complain(error, EXIT_USER_ERROR)
    except (RuntimeError, OSError) as error:
        return _complain(error, EXIT_FAILED)
    return EXIT_OK


def _complain(error: Exception, exit_code: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return exit_code


def _leave(exit_code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    # NOTE(order): no interpreter shutdown: a device that failed may hold its threads.
    os._exit(exit_code)


if __name__ == "__main__":
    main()
