"""How a node other than 0 finds a run to join: node 0's newest one, in which its place is free.

After a failure node 0 ends the run and opens another at the same address; until then the old store may still answer,
or the place may be held by a process of this node that was killed. Here is what must be looked at before
``host_ranks``. Invariant: a process that lives keeps its place.
"""

import os
import socket
import time

from argosy.config import EngineConfig
from argosy.distributed.rendezvous import KeyValueStore, StoreAddress, StoreLostError, connect_store
from argosy.distributed.startup import Abort, publish_abort, read_abort

_POLL_S = 0.25


class NoRunError(RuntimeError):
    """Node 0 has opened no run in which this node has a place."""


def await_run(config: EngineConfig) -> None:
    """Return when there is one.

    Raises:
        NoRunError: not within ``startup_timeout_s``.
    """
    assert config.master_addr is not None and config.master_port is not None, "several nodes have a meeting place"
    address = StoreAddress(config.master_addr, config.master_port)
    deadline_s = time.monotonic() + config.startup_timeout_s
    while True:
        left_s = max(deadline_s - time.monotonic(), _POLL_S)
        try:
            store = connect_store(address, left_s)
        except RuntimeError as error:
            raise NoRunError(str(error)) from error
        try:
            obstacle = find_obstacle(store, config.node_rank)
        except StoreLostError as error:  # it has just ended, to be opened again
            obstacle = str(error)
        finally:
            store.close()
        if obstacle is None:
            return
        if time.monotonic() > deadline_s:
            raise NoRunError(
                f"node 0 at {address} has had no place for node {config.node_rank} for {config.startup_timeout_s:g} s: "
                f"{obstacle}; start each node once, with its own --node-rank"
            )
        time.sleep(_POLL_S)


def find_obstacle(store: KeyValueStore, node_rank: int) -> str | None:
    """Why this node cannot join the run, in words.

    A place whose holder died on this machine ends the run, so that another begins.
    """
    abort = read_abort(store)
    if abort is not None:
        return f"the last run failed ({abort.text.splitlines()[0]}) and no other has begun"
    holder = store.try_get(f"claim/node/{node_rank}")
    if holder is None:
        return None
    if is_gone(holder):
        publish_abort(store, Abort(text=f"node {node_rank} was started again: {holder} is gone"))
    return f"node {node_rank} is {holder}"


def is_gone(holder: str) -> bool:
    """Whether ``pid 17 on somewhere`` (``claim_place``) was a process of this machine that ended, or had our number."""
    words = holder.split()
    if len(words) != 4 or words[3] != socket.gethostname() or not words[1].isdecimal():
        return False
    pid = int(words[1])
    if pid == os.getpid():
        return True  # we have claimed nothing yet
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
