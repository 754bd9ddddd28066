"""Messages between processes over ZeroMQ: a ``Hub`` that binds and the ``Spoke``s that connect to it.

The driver has a hub with a spoke in every leader, a leader has one with a spoke in each rank that follows it. What the
messages mean is in ``replica_messages.py``. Traffic is encrypted, and who does not know the hub's key cannot connect;
on one node it goes through a socket without a file, so that a killed process leaves nothing behind, and the kernel
lets other users' processes not even say a word.
Invariant: messages from one end to another arrive complete, once and in order, or the process that waits is told.
"""

import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

import msgspec
import zmq

_LINGER_MS = 2000  # for the last messages of a process that ends
_UNLIMITED = 0  # ZeroMQ's word: no message is dropped or held back because many wait
_MAX_MESSAGE_BYTES = 2**28  # far beyond any of ours; who says that more will come is cut off
_ENVELOPE_BYTES = 33  # of encryption, around each message

SentT = TypeVar("SentT")
ReceivedT = TypeVar("ReceivedT")


class WireAddress(msgspec.Struct, frozen=True):
    """How to reach a hub. The key is a secret of the deployment: who has it may connect."""

    endpoint: str
    public_key: str


class Hub(Generic[SentT, ReceivedT]):
    """The end that binds. Peers are known by a number, which they bring.

    ``host`` is this node's address as the peers' nodes reach it; None = all peers are on this node.
    """

    def __init__(self, decoder: msgspec.msgpack.Decoder[ReceivedT], host: str | None) -> None:
        public_key, secret_key = zmq.curve_keypair()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = _build_socket(self._context, zmq.ROUTER)
        self._socket.curve_server = True
        self._socket.curve_secretkey = secret_key
        if host is None and sys.platform == "linux":
            self._socket.setsockopt(zmq.IPC_FILTER_UID, os.getuid())
        self._socket.router_mandatory = True  # a message to a peer that left is an error, not silence
        self._socket.bind(_choose_endpoint(host))
        endpoint = str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0")
        if host is not None:  # the port is what was left to the system
            endpoint = f"{_choose_endpoint(host)[:-1]}{endpoint.rpartition(':')[2]}"
        self.address = WireAddress(endpoint=endpoint, public_key=public_key.decode())
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = decoder

    def send(self, peer: int, message: SentT) -> None:
        self.send_to_all((peer,), message)

    def send_to_all(self, peers: tuple[int, ...], message: SentT) -> None:
        """Encoded once.

        Raises:
            RuntimeError: a peer is not connected.
        """
        data = _encode(self._encoder, message)
        for peer in peers:
            try:
                self._socket.send_multipart((_identity(peer), data))
            except zmq.ZMQError as error:
                raise RuntimeError(f"cannot send to process {peer}: {error}; it has ended") from error

    def fileno(self) -> int:
        """For an event loop: readable when something may have arrived.

        It tells once, not for every message: call ``receive(0.0)`` then, and also after every ``send``, which may
        use the signal up.
        """
        return int(self._socket.FD)

    @property
    def is_closed(self) -> bool:
        return self._socket.closed

    def receive(self, timeout_s: float, interrupt: "AnySpoke | None" = None) -> list[tuple[int, ReceivedT]]:
        """All that has arrived, with the peers' numbers; waits for the first until the timeout, or until something has
        arrived at ``interrupt``."""
        if interrupt is not None:
            _wait_for_any((self._socket, interrupt.socket), timeout_s)
            timeout_s = 0.0
        return [(int(peer), self._decoder.decode(data)) for peer, data in _drain(self._socket, timeout_s)]

    def receive_from(self, peers: tuple[int, ...], timeout_s: float) -> dict[int, ReceivedT]:
        """One message of every peer, by number.

        Raises:
            RuntimeError: naming those that said nothing in time.
        """
        received: dict[int, ReceivedT] = {}
        deadline_s = time.monotonic() + timeout_s
        while len(received) < len(peers):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                missing = sorted(set(peers) - set(received))
                raise RuntimeError(f"ranks {missing} said nothing within {timeout_s:g} s")
            received.update(self.receive(left_s))
        return received

    def close(self) -> None:
        """Waits a moment for messages that are still to go out."""
        self._context.destroy(linger=_LINGER_MS)


class Spoke(Generic[SentT, ReceivedT]):
    """The end that connects, as number ``peer``."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[ReceivedT], address: WireAddress, peer: int) -> None:
        public_key, secret_key = zmq.curve_keypair()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = _build_socket(self._context, zmq.DEALER)
        self._socket.curve_serverkey = address.public_key.encode()
        self._socket.curve_publickey = public_key
        self._socket.curve_secretkey = secret_key
        self._socket.routing_id = _identity(peer)
        self._socket.connect(address.endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = decoder

    def send(self, message: SentT) -> None:
        self._socket.send(_encode(self._encoder, message))

    def receive(self, *, waits: bool) -> list[ReceivedT]:
        """All that has arrived. ``waits``: without limit, for at least one message; whoever connects a spoke lives no
        longer than the process at its hub, which the launcher sees to."""
        frames = _drain(self._socket, None if waits else 0.0)
        return [self._decoder.decode(data) for (data,) in frames]

    def wait(self, timeout_s: float) -> bool:
        """Until something has arrived; whether it has."""
        return bool(self._socket.poll(max(0, int(timeout_s * 1000))))

    @property
    def socket(self) -> "zmq.Socket[bytes]":
        """For waiting only."""
        return self._socket

    def close(self) -> None:
        """Waits a moment for messages that are still to go out."""
        self._context.destroy(linger=_LINGER_MS)


class AnySpoke(Protocol):
    """A spoke, whatever it carries, to wait for."""

    @property
    def socket(self) -> "zmq.Socket[bytes]": ...

    def wait(self, timeout_s: float) -> bool: ...


def own_address_towards(host: str) -> str:
    """This machine's address on the way to ``host``: how machines on that way reach it.

    Raises:
        RuntimeError: there is no way to it.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # of a datagram socket: picks a route, sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise RuntimeError(f"there is no route to {host!r} ({error}); set --master-addr") from error


def _encode(encoder: msgspec.msgpack.Encoder, message: object) -> bytes:
    data = encoder.encode(message)
    assert len(data) <= _MAX_MESSAGE_BYTES, f"a {type(message).__name__} of {len(data)} bytes would never arrive"
    return data


def _build_socket(context: "zmq.Context[zmq.Socket[bytes]]", kind: int) -> "zmq.Socket[bytes]":
    built = context.socket(kind)
    built.linger = _LINGER_MS
    built.sndhwm = _UNLIMITED
    built.rcvhwm = _UNLIMITED
    built.ipv6 = True
    built.maxmsgsize = _MAX_MESSAGE_BYTES + _ENVELOPE_BYTES
    return built


def _choose_endpoint(host: str | None) -> str:
    if host is None:
        return f"ipc://@argosy-{os.getpid()}-{secrets.token_hex(16)}"  # "@": a name in the kernel, not in a directory
    return f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*"


def _identity(peer: int) -> bytes:
    return str(peer).encode()


def _wait_for_any(sources: "tuple[zmq.Socket[bytes], ...]", timeout_s: float) -> None:
    poller = zmq.Poller()
    for source in sources:
        poller.register(source, zmq.POLLIN)
    poller.poll(max(0, int(timeout_s * 1000)))


def _drain(source: "zmq.Socket[bytes]", timeout_s: float | None) -> Iterator[list[bytes]]:
    """Every message that is there, after waiting for the first; None waits without limit."""
    timeout_ms = None if timeout_s is None else max(0, int(timeout_s * 1000))
    if timeout_ms != 0 and not source.poll(timeout_ms):
        return
    while True:
        try:
            yield source.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
