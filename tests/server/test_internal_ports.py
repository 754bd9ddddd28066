"""Every socket of a server of two ranks that share experts: where it listens, and garbage sent to each."""

import contextlib
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
import zmq

from argosy.engine.wire import Hub, Spoke
from tests.helpers.listeners import Listeners, family_of, find_listeners
from tests.helpers.program import free_port

START_S = 90.0
NOTICE_S = 1.0
RANDOM = random.Random(3).randbytes(4096)
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(15) + bytes(32)
STORE_MAGIC = b"\x00" + struct.pack("<I", 0x3C85F7CE)
GARBAGE = {
    "nothing": b"",
    "random": RANDOM,
    "zeros": bytes(65536),
    "ones": b"\xff" * 65536,
    "huge by its first word": struct.pack("<Q", 2**62) + RANDOM,
    "a huge frame to ZeroMQ": GREETING + b"\x06" + struct.pack(">Q", 2**62) + RANDOM,
    "another mechanism to ZeroMQ": GREETING.replace(b"CURVE", b"NULL\x00") + b"\x04\x19\x05READY" + RANDOM,
    "a huge key to the store": STORE_MAGIC + b"\x01" + struct.pack("<Q", 2**60) + RANDOM,
    "an unknown word to the store": STORE_MAGIC + b"\xee" + RANDOM,
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, str]]:
    """pid and URL."""
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "argosy", "serve", "--port", str(port), "--num-threads", "1", "--dp", "2"]
    command += ["--spare-engines", "0"]  # one would start once all has been calm, and be taken for a restart
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file)
    url, deadline_s = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    while b"listening on" not in log.read_bytes():
        assert process.poll() is None and time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.1)
    try:
        yield process.pid, url
        assert "Traceback" not in log.read_text() and "is lost" not in log.read_text()
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0


def ask(url: str) -> str:
    answer = httpx.post(
        f"{url}/v1/completions", json={"prompt": "1 + 1", "max_tokens": 4, "temperature": 0}, timeout=20
    )
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def connect(address: tuple[str, int] | str) -> socket.socket:
    """Raises OSError: nobody can."""
    if not isinstance(address, str):
        return socket.create_connection(address, timeout=2)
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(2)
    client.connect("\0" + address[1:] if address.startswith("@") else address)
    return client


@pytest.mark.processes
@pytest.mark.e2e
def test_a_server_of_two_ranks_listens_on_loopback_and_survives_garbage_everywhere(server: tuple[int, str]) -> None:
    pid, url = server
    found, family, text = find_listeners(pid), set(family_of(pid)), ask(url)
    public = ("127.0.0.1", int(url.rpartition(":")[2]))
    assert public in found.tcp and {host for host, _ in found.tcp} == {"127.0.0.1"}
    assert len(found.tcp) >= 4  # HTTP, the store, and gloo of both ranks: else this test looks past them
    check_unix_sockets(found)
    addresses = [*sorted(found.tcp - {public}), *sorted(found.unix)]
    with contextlib.ExitStack() as half_open:
        for address in addresses:
            for garbage in GARBAGE.values():
                with contextlib.suppress(OSError), connect(address) as client:
                    client.sendall(garbage)
            with contextlib.suppress(OSError):
                half_open.enter_context(connect(address))  # says nothing, and stays
            assert ask(url) == text
    assert set(family_of(pid)) == family  # nobody died, nobody was replaced
    assert find_listeners(pid).unix == found.unix


def check_unix_sockets(found: Listeners) -> None:
    """Abstract ones are the hubs, which have a filter; the fork server's file is gone, so nobody can connect."""
    hubs = {name for name in found.unix if name.startswith("@argosy-")}
    assert len(hubs) >= 2
    for name in found.unix - hubs:
        assert not Path(name).exists(), name


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_at_a_hub_is_not_a_message(kind: str) -> None:
    with hub_and_spoke() as (hub, spoke):
        with connect("@" + hub.address.endpoint.removeprefix("ipc://@")) as client:
            client.sendall(GARBAGE[kind])
            spoke.send("good")
            assert hub.receive(5.0) == [(7, "good")]
        assert hub.receive(0.05) == []


def test_the_hubs_key_is_needed() -> None:
    with hub_and_spoke() as (hub, _):
        stranger = msgspec.structs.replace(hub.address, public_key=zmq.curve_keypair()[0].decode())
        spoke: Spoke[str, str] = Spoke(msgspec.msgpack.Decoder(str), stranger, 8)
        spoke.send("let me in")
        assert hub.receive(NOTICE_S / 2) == []
        with pytest.raises(RuntimeError, match="cannot send to process 8"):
            hub.send(8, "who are you")
        spoke.close()


def test_other_users_of_the_machine_are_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)  # the hub's user, so that we are somebody else
    hub: Hub[str, str] = Hub(msgspec.msgpack.Decoder(str), None)
    try:
        with connect("@" + hub.address.endpoint.removeprefix("ipc://@")) as client:
            assert client.recv(64) == b""  # closed before ZeroMQ has greeted
    finally:
        hub.close()


@contextlib.contextmanager
def hub_and_spoke() -> "Iterator[tuple[Hub[str, str], Spoke[str, str]]]":
    hub: Hub[str, str] = Hub(msgspec.msgpack.Decoder(str), None)
    spoke: Spoke[str, str] = Spoke(msgspec.msgpack.Decoder(str), hub.address, 7)
    try:
        spoke.send("hello")
        assert hub.receive(5.0) == [(7, "hello")]
        yield hub, spoke
    finally:
        spoke.close()
        hub.close()
