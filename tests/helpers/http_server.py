"""An application behind a real socket, in a thread of this process."""

import asyncio
import socket
import threading
from collections.abc import Callable
from types import TracebackType

import uvicorn

WAIT_S = 20.0


class ServedApp:
    """``with ServedApp(app) as served``: it answers at ``served.url`` until the end."""

    def __init__(self, app: object) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_config=None)  # type: ignore[arg-type]
        self._server = uvicorn.Server(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "ServedApp":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        self._socket.close()

    def call(self, function: Callable[[], None]) -> None:
        """In the application's event loop."""
        self._loop.call_soon_threadsafe(function)

    def _run(self) -> None:
        self._loop.run_until_complete(self._server.serve(sockets=[self._socket]))
        self._loop.close()
