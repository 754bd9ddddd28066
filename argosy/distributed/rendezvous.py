"""Where ranks meet: the key-value store, its address, and the network interface that leads there.

The store is hosted by the process that launches the ranks of node 0, never by a rank, so that it outlives every rank;
under torchrun it is torchrun's own. What the ranks say to each other through it is ``startup.py`` and ``watchdog.py``.
Values are short text, never pickle. Invariant: every wait has a deadline, and its error says where it waited.
"""

import contextlib
import errno
import fcntl
import queue
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

# torch exports these without saying so in its stubs.
from torch.distributed import (  # type: ignore[attr-defined]
    DistError,
    DistStoreError,
    PrefixStore,
    Store,
    TCPStore,
)

LOOPBACK_ADDRESS = "127.0.0.1"
LOOPBACK_INTERFACE = "lo"
STORE_TIMEOUT_S = 30.0  # of one request to a store that answers; a dead one is noticed at once
CONNECT_RETRY_S = 0.2
TORCHRUN_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


class StoreLostError(RuntimeError):
    """The store does not answer: the process that hosts it is gone, or the network to it."""


class KeyValueStore(Protocol):
    """What start-up and watchdog ask of a store; unit tests answer with a dictionary."""

    def set(self, key: str, value: str) -> None: ...

    def set_first(self, key: str, value: str) -> str:
        """Set unless somebody did; returns what stands there now. ``value`` is not empty."""
        ...

    def try_get(self, key: str) -> str | None: ...

    def get_all(self, keys: Sequence[str]) -> list[str | None]: ...

    def add(self, key: str, amount: int) -> int:
        """The sum so far. Such a key is for ``add`` only."""
        ...

    def wait_for(self, key: str, timeout_s: float) -> bool:
        """Whether the key was set in time."""
        ...

    def clone(self) -> "KeyValueStore":
        """Another connection: a thread that waits must not hold up the others."""
        ...


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where the store listens. ``prefix`` keeps two uses of one store (a restart under torchrun) apart."""

    host: str
    port: int
    prefix: str = "argosy"

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class TorchrunPlace:
    """What torchrun's environment says about this process."""

    rank: int
    world_size: int
    local_rank: int
    num_local_ranks: int  # on this node
    address: StoreAddress
    is_store_hosted: bool  # by torchrun; else rank 0's process hosts it


class RankStore:
    """A connection to the store over TCP. ``interface`` is the network interface that leads to it."""

    def __init__(self, tcp: TCPStore, address: StoreAddress) -> None:
        self.address = address
        self.interface = find_interface(address.host)
        self._tcp = tcp
        self._store = PrefixStore(address.prefix, tcp)

    def close(self) -> None:
        """Disconnect; the host's port becomes free. Not for a store that process groups use."""
        del self._store
        del self._tcp

    def group_store(self) -> Store:
        """For torch's process groups."""
        return PrefixStore("groups", self._store)

    def clone(self) -> "RankStore":
        return connect_store(self.address, STORE_TIMEOUT_S)

    def set(self, key: str, value: str) -> None:
        with self._translate_errors(key):
            self._store.set(key, value)

    def set_first(self, key: str, value: str) -> str:
        with self._translate_errors(key):
            return str(self._store.compare_set(key, "", value).decode())

    def try_get(self, key: str) -> str | None:
        with self._translate_errors(key):
            return self._store.get(key).decode() if self._store.check([key]) else None

    def get_all(self, keys: Sequence[str]) -> list[str | None]:
        with self._translate_errors(keys[0]):
            if self._store.check(list(keys)):
                return [value.decode() for value in self._store.multi_get(list(keys))]
        return [self.try_get(key) for key in keys]

    def add(self, key: str, amount: int) -> int:
        with self._translate_errors(key):
            return int(self._store.add(key, amount))

    def wait_for(self, key: str, timeout_s: float) -> bool:
        with self._translate_errors(key):
            try:
                self._store.wait([key], timedelta(seconds=max(timeout_s, 0.001)))
            except DistStoreError:  # what a wait that ran out of time raises
                return False
        return True

    @contextlib.contextmanager
    def _translate_errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except DistError as error:
            raise StoreLostError(
                f"the store at {self.address} does not answer (key {key!r}): {_first_line(error)}; "
                "the process that started the ranks of node 0 is gone, or the network to it"
            ) from error


def host_store(host: str = LOOPBACK_ADDRESS, port: int = 0, prefix: str = "argosy") -> RankStore:
    """Listen on ``host`` alone; port 0 takes a free one. The store lives as long as the object.

    Raises:
        ValueError: the port is taken, or ``host`` is no address of this machine.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an ended run's connections may linger
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ValueError(_explain_bind(host, port, error)) from error
    listener.listen()
    bound_port = listener.getsockname()[1]
    tcp = TCPStore(
        host,
        bound_port,
        is_master=True,
        timeout=timedelta(seconds=STORE_TIMEOUT_S),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return RankStore(tcp, StoreAddress(host, bound_port, prefix))


def connect_store(address: StoreAddress, timeout_s: float) -> RankStore:
    """Retry until the store listens: node 0 may start last.

    Raises:
        RuntimeError: nobody listened there within ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    # Probing first: TCPStore's own retries are silent about the cause and print stack traces.
    while True:
        remaining_s = deadline - time.monotonic()
        try:
            socket.create_connection((address.host, address.port), timeout=max(remaining_s, 0.001)).close()
            break
        except OSError as error:
            if remaining_s <= CONNECT_RETRY_S:
                raise RuntimeError(
                    f"the store at {address} could not be reached within {timeout_s:g} s ({error}); start node 0 "
                    "with the same --master-addr and --master-port, and check that this machine may connect to it"
                ) from error
            time.sleep(CONNECT_RETRY_S)
    tcp = _connect_within(address, max(deadline - time.monotonic(), 1.0))
    tcp.set_timeout(timedelta(seconds=STORE_TIMEOUT_S))
    return RankStore(tcp, address)


def _connect_within(address: StoreAddress, timeout_s: float) -> TCPStore:
    """In a thread: towards a listener that never answers, TCPStore waits for ever, whatever its timeout."""
    outcome: queue.Queue[TCPStore | DistError] = queue.Queue()

    def connect() -> None:
        timeout = timedelta(seconds=timeout_s)
        try:
            outcome.put(TCPStore(address.host, address.port, None, False, timeout, wait_for_workers=False))
        except DistError as error:
            outcome.put(error)

    threading.Thread(target=connect, name="argosy-connect", daemon=True).start()
    try:
        result = outcome.get(timeout=timeout_s)
    except queue.Empty:
        result = DistError("no answer")
    if isinstance(result, DistError):
        raise RuntimeError(
            f"something listens at {address} but does not answer as a store ({_first_line(result)}); check "
            "--master-addr and --master-port"
        )
    return result


def find_interface(host: str) -> str:
    """The interface whose address this machine uses to reach ``host``; the loopback's for this machine itself.

    Raises:
        ValueError: no such host, or no route to it.
    """
    try:
        family, _, _, _, sockaddr = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(sockaddr)  # of a datagram socket: picks a route, sends nothing
            own_address = probe.getsockname()[0]
    except OSError as error:
        raise ValueError(f"no route to {host!r} ({error}); set --master-addr to an address of node 0") from error
    for _, name in socket.if_nameindex():
        if _interface_address(name) == own_address:
            return name
    return LOOPBACK_INTERFACE


def read_torchrun_environment(environ: Mapping[str, str]) -> TorchrunPlace | None:
    """None: this process was not started by torchrun (or a launcher that speaks its language).

    Raises:
        ValueError: a part of the environment is missing or is not a number.
    """
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    numbers = {name: _read_number(environ, name) for name in TORCHRUN_NUMBERS}
    if "MASTER_ADDR" not in environ:
        raise ValueError("RANK is set but MASTER_ADDR is not; start through torchrun, or unset RANK")
    restart = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    address = StoreAddress(environ["MASTER_ADDR"], numbers["MASTER_PORT"], f"argosy/{restart}")
    return TorchrunPlace(
        rank=numbers["RANK"],
        world_size=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        num_local_ranks=numbers["LOCAL_WORLD_SIZE"],
        address=address,
        is_store_hosted=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _read_number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"RANK is set but {name} is {text!r}, not a number; start through torchrun, or unset RANK")
    return int(text)


def _explain_bind(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"master_port ({port}) on {host} is taken by another process; set --master-port to a free port"
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"master_addr ({host}) is no address of this machine, which is node 0; "
            "set --master-addr to one of node 0's addresses, or --node-rank to this node's number"
        )
    return f"cannot listen on {host}:{port} ({error}); set --master-addr and --master-port"


def _interface_address(name: str) -> str:
    request = struct.pack("256s", name.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
        except OSError:  # an interface without an IPv4 address
            return ""
    return socket.inet_ntoa(answer[20:24])


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
