"""``argosy serve``: starts the engines and the endpoints, drains on SIGTERM, and says why it ended.

The ports are bound before anything is loaded, so that a taken one is told at once; ``/health`` answers while engines
load. Invariant: when ``serve`` returns or raises, no engine is left.
"""

import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from argosy.config import EngineConfig
from argosy.distributed.layout import ParallelLayout
from argosy.engine.model_directory import resolve_model_directory
from argosy.engine.tokenizer import Tokenizer
from argosy.server.api_server import Service, build_app
from argosy.server.connections import ConnectionLimits, allow_connections, bounded_protocol
from argosy.server.engine_metrics import EngineMetrics
from argosy.server.engine_pool import EnginePool
from argosy.server.engine_seat import PoolSettings, StartProcess
from argosy.server.errors import ApiError
from argosy.server.grammar_door import GrammarDoor
from argosy.server.logs import logger, set_up
from argosy.server.metrics import ServerMetrics
from argosy.server.outputs import RequestBoard
from argosy.server.settings import ServerConfig
from argosy.server.spare_engines import SpareEngines
from argosy.server.tracing import build_tracer

Say = Callable[[str], None]
OnProgress = Callable[[str, int, int], None]
_POLL_S = 0.05
CLOSE_S = 10.0  # for engines to end in good order
_BACKLOG = 2048
_KEEP_ALIVE_S = 30
_ECHO_S = 1.0  # a signal so soon after the first is the same one, told by a terminal and by a program in between


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A listening socket; ``data_parallel_rank``: all its requests go to that replica."""

    socket: socket.socket
    data_parallel_rank: int | None = None

    @property
    def address(self) -> str:
        host, port = self.socket.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def serve(
    config: EngineConfig,
    settings: ServerConfig,
    *,
    version: str,
    say: Say,
    on_progress: OnProgress | None = None,
    start_process: StartProcess | None = None,
) -> bool:
    """Serve until a signal ends it. False: requests were cut off by the end of the shutdown's time.

    ``start_process`` is for tests and benchmarks; without it engines start as usual, from spares if there are some.

    Raises:
        ValueError: settings, a model or a machine that cannot work.
        RuntimeError: a file, a device, an engine or a port failed.
    """
    ParallelLayout(dp_size=config.dp_size, tp_size=config.tp_size, ep_size=config.ep_size)  # refuses what cannot be
    directory = resolve_model_directory(config.model)
    tokenizer_directory = Path(config.tokenizer).expanduser() if config.tokenizer else directory
    tokenizer = Tokenizer.from_directory(tokenizer_directory)
    grammars = GrammarDoor(tokenizer_directory, settings.grammar_timeout_s)
    set_up(settings.log_level)
    allow_connections(settings.max_connections * (config.dp_size if settings.data_parallel_external_lb else 1))
    with _open_endpoints(settings, config.dp_size) as endpoints:
        return asyncio.run(
            _serve(config, settings, tokenizer, grammars, endpoints, version, say, on_progress, start_process)
        )


@contextlib.contextmanager
def _open_endpoints(settings: ServerConfig, dp_size: int) -> Iterator[list[Endpoint]]:
    with contextlib.ExitStack() as stack:
        if not settings.data_parallel_external_lb:
            yield [Endpoint(stack.enter_context(_listen(settings.host, settings.port)))]
            return
        ports = [settings.port + rank if settings.port else 0 for rank in range(dp_size)]
        yield [Endpoint(stack.enter_context(_listen(settings.host, port)), rank) for rank, port in enumerate(ports)]


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise RuntimeError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; set --host and --port"
        ) from error


async def _serve(
    config: EngineConfig,
    settings: ServerConfig,
    tokenizer: Tokenizer,
    grammars: GrammarDoor,
    endpoints: list[Endpoint],
    version: str,
    say: Say,
    on_progress: OnProgress | None,
    start_process: StartProcess | None,
) -> bool:
    names = settings.served_model_name or (config.model,)
    metrics = ServerMetrics(names[0], version)
    tracer = build_tracer(settings.otlp_traces_endpoint, names[0], version)
    board = RequestBoard(tokenizer, metrics, tracer=tracer)
    pool: EnginePool | None = None
    service = Service(
        settings,
        tokenizer,
        board,
        metrics,
        grammars,
        model_names=names,
        version=version,
        describe_health=lambda: _describe_problem(pool),
    )
    signals = _StopSignals()
    servers = [build_server(service, settings, endpoint) for endpoint in endpoints]
    running = [
        asyncio.create_task(server.serve(sockets=[endpoint.socket]))
        for server, endpoint in zip(servers, endpoints, strict=True)
    ]
    spares = SpareEngines(settings.spare_engines, config)
    starting = asyncio.create_task(
        EnginePool.start(
            config,
            PoolSettings(stuck_after_s=settings.stuck_after_s),
            deliver=board.deliver,
            refuse=board.refuse,
            on_progress=on_progress,
            start_process=start_process or spares.start,
        )
    )
    try:
        stopping = asyncio.create_task(signals.first.wait())
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return True  # nobody was served yet
        pool = board.engines = service.engines = starting.result()
        metrics.watch_engines(EngineMetrics(metrics.model, pool))
        if start_process is None:
            spares.keep(lambda: pool.engines)
        service.open(pool.description.max_model_len, config.max_num_seqs * config.dp_size, config.dp_size)
        _settle_memory()
        _announce(service, settings, pool, endpoints, say)
        await asyncio.wait((stopping, *running), return_when=asyncio.FIRST_COMPLETED)
        return await _drain(service, settings, signals, say)
    finally:
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*running, return_exceptions=True)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        await grammars.aclose()
        if pool is not None:
            await pool.aclose(CLOSE_S)
        await spares.aclose()
        await asyncio.to_thread(tracer.close)


def _settle_memory() -> None:
    """What the start has built stays: a full collection that walks through it would hold every request up, for tens of
    milliseconds. Later ones look at what came after."""
    gc.collect()
    gc.freeze()


async def _drain(service: Service, settings: ServerConfig, signals: "_StopSignals", say: Say) -> bool:
    """No new requests; those under way may finish, unless a second signal comes. Whether all did."""
    service.is_draining = True
    board = service.board
    if board.num_requests:
        say(
            f"shutting down: {board.num_requests} completions may take up to {settings.shutdown_timeout_s:g} s; "
            "a second signal cuts them off"
        )
    deadline_s = asyncio.get_running_loop().time() + settings.shutdown_timeout_s
    while board.num_requests and asyncio.get_running_loop().time() < deadline_s and not signals.is_urgent:
        await asyncio.sleep(_POLL_S)
    left = board.request_ids
    for request_id in left:
        board.end(request_id, ApiError(503, "the server shut down before the request was finished", code="shutdown"))
    if left:
        logger.warning("requests cut off by shutdown", extra={"num_requests": len(left)})
    return not left


class _StopSignals:
    """SIGTERM and Ctrl-C: the first asks for an orderly end, one that comes later for a fast one."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.is_urgent = False
        self._loop = asyncio.get_running_loop()
        self._first_s = 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._hear)

    def _hear(self) -> None:
        if not self.first.is_set():
            self._first_s = self._loop.time()
            self.first.set()
        elif self._loop.time() - self._first_s >= _ECHO_S:
            self.is_urgent = True


class _Server(uvicorn.Server):
    """Signals are ours: the drain comes before the end of the connections."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def build_server(service: Service, settings: ServerConfig, endpoint: Endpoint) -> uvicorn.Server:
    config = uvicorn.Config(
        build_app(service, data_parallel_rank=endpoint.data_parallel_rank),
        # On h11: httptools swallows headers of many megabytes and answers 200.
        http=bounded_protocol(ConnectionLimits(settings.max_connections, settings.head_timeout_s)),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=5,
        # Beyond this h11 gives up with 400 before the gate sees the headers, so that they are never held in memory.
        h11_max_incomplete_event_size=2 * settings.max_header_bytes,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
    )
    return _Server(config)


def _describe_problem(pool: EnginePool | None) -> str | None:
    """None while at least one engine serves."""
    if pool is None or any(engine.state == "ready" for engine in pool.engines):
        return None
    return "; ".join(f"engine {engine.index} is {engine.state}" for engine in pool.engines)


def _announce(service: Service, settings: ServerConfig, pool: EnginePool, endpoints: list[Endpoint], say: Say) -> None:
    engine = pool.description
    for line in engine.memory_report:
        say(line)
    scheme = "https" if settings.ssl_certfile else "http"
    replicas = f", {len(pool.engines)} engines" if len(pool.engines) > 1 else ""
    say(
        f"{service.model_names[0]} ({engine.number_format}, {engine.device_name}{replicas}) "
        f"is ready after {engine.start_s:.1f} s, up to {engine.max_model_len} tokens a request"
    )
    for endpoint in endpoints:
        rank = "" if endpoint.data_parallel_rank is None else f" (replica {endpoint.data_parallel_rank})"
        say(f"listening on {scheme}://{endpoint.address}{rank}")
    if not settings.is_loopback and not settings.api_key:
        say(f"warning: whoever reaches {settings.host} can use this server; set --api-key")
