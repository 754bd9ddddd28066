"""The server over a fake pool behind a real socket, in a thread of the test's process or as a program.

``python -m tests.helpers.socket_server PORT`` is the program: for tools that want an address.
"""

import asyncio
import contextlib
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import argosy
from argosy.engine.tokenizer import Tokenizer
from argosy.server.api_server import Service
from argosy.server.logs import set_up
from argosy.server.metrics import ServerMetrics
from argosy.server.outputs import RequestBoard
from argosy.server.run import Endpoint, build_server
from argosy.server.settings import ServerConfig
from tests.helpers.fake_pool import FakePool
from tests.helpers.grammars import InstantGrammars

MODEL = "argosy-tiny"
ASSETS = Path(argosy.__file__).parent / "assets" / MODEL
START_S = 30.0


@dataclass
class SocketServer:
    """A running one."""

    port: int
    service: Service
    pool: FakePool

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)


def build_service(tokenizer: Tokenizer, text: str = "It is 42.", **settings: object) -> tuple[Service, FakePool]:
    token_ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    pool = FakePool(lambda prompt: list(token_ids), tokenizer.eos_token_id)
    metrics = ServerMetrics(MODEL)
    board = RequestBoard(tokenizer, metrics, pool)
    pool.deliver = board.deliver
    service = Service(
        ServerConfig(**settings),  # type: ignore[arg-type]
        tokenizer,
        board,
        metrics,
        InstantGrammars(tokenizer),
        model_names=(MODEL,),
        version="1.2.3",
        describe_health=lambda: None,
    )
    service.open(max_model_len=2048, max_num_running=8)
    return service, pool


@contextlib.contextmanager
def serve_on_socket(tokenizer: Tokenizer, **settings: object) -> Iterator[SocketServer]:
    service, pool = build_service(tokenizer, **settings)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    server = build_server(service, service.settings, Endpoint(listener))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    try:
        yield SocketServer(listener.getsockname()[1], service, pool)
    finally:
        server.should_exit = True
        thread.join(START_S)
        assert not thread.is_alive()


def main() -> None:
    service, _ = build_service(
        Tokenizer.from_directory(ASSETS), api_key=("key",), admin_api_key="admin", port=int(sys.argv[1])
    )
    set_up("info")
    with socket.create_server(("127.0.0.1", service.settings.port), backlog=2048) as listener:
        server = build_server(service, service.settings, Endpoint(listener))
        asyncio.run(server.serve(sockets=[listener]))


if __name__ == "__main__":
    main()
