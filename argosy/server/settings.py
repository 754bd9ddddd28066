"""Every setting of the server that is not the engine's: one frozen dataclass, one comment line a field.

Flags of ``argosy serve`` are generated from these fields. Invariant: an instance that exists is valid.
"""

import ipaddress
from dataclasses import dataclass
from typing import Literal

LogLevel = Literal["debug", "info", "warning", "error"]
MAX_KEYS = 64
MAX_SPARE_ENGINES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """How the server listens, whom it lets in, and what it takes at once.

    Raises:
        ValueError: naming the field, the value, the rule and the flag to change.
    """

    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 lets other machines in, and then keys are advisable
    port: int = 8000  # 0 = a free one, which the start prints
    served_model_name: tuple[str, ...] = ()  # names that requests may use for the model; none = the model's own
    api_key: tuple[str, ...] = ()  # requests must bring one of these; also ARGOSY_API_KEY
    admin_api_key: str | None = None  # opens the admin routes, which are closed without one; also ARGOSY_ADMIN_API_KEY
    max_num_queued_reqs: int = 256  # completions that may wait beside those that run; beyond: 503 and Retry-After
    max_body_bytes: int = 16 * 2**20  # of a request
    max_header_bytes: int = 32 * 2**10  # of all headers of a request together
    max_connections: int = 2048  # of clients to a port; beyond: 503 at once
    head_timeout_s: float = 15.0  # a client may take so long to send a request's line and headers
    body_timeout_s: float = 60.0  # and so long, after these, for the body
    request_timeout_s: float = 3600.0  # from arrival to the last token; a request may ask for less with "timeout"
    shutdown_timeout_s: float = 60.0  # after SIGTERM unfinished requests may take this long
    grammar_timeout_s: float = 2.0  # a schema or grammar that takes longer to compile is refused
    stuck_after_s: float = 60.0  # an engine with work that says nothing for so long is started again
    spare_engines: int | None = None  # processes with their imports done, for fast restarts; None = 1 if memory allows
    data_parallel_external_lb: bool = False  # one port a replica, from --port on: a balancer outside chooses
    ssl_certfile: str | None = None  # with ssl_keyfile: HTTPS
    ssl_keyfile: str | None = None
    allowed_origins: tuple[str, ...] = ()  # origins whose pages may call this server (CORS)
    vllm_metric_names: bool = False  # /metrics also under vLLM's names, for dashboards and routers that know those
    otlp_traces_endpoint: str | None = None  # URL of an OpenTelemetry collector (OTLP over HTTP); needs extra "otel"
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        if not self.host:
            raise ValueError("host is empty; set --host to an address of this machine, 127.0.0.1 for this machine only")
        if not _is_integer(self.port) or not 0 <= self.port <= 65535:
            raise ValueError(f"port must be an integer in [0, 65535], got {self.port!r}; set --port")
        for name in ("max_body_bytes", "max_header_bytes"):
            if not _is_integer(value := getattr(self, name)) or value < 1024:
                raise ValueError(f"{name} must be an integer >= 1024, got {value!r}; set --{name.replace('_', '-')}")
        if not _is_integer(self.max_num_queued_reqs) or self.max_num_queued_reqs < 0:
            raise ValueError(
                f"max_num_queued_reqs must be an integer >= 0, got {self.max_num_queued_reqs!r}; "
                "set --max-num-queued-reqs"
            )
        spares = self.spare_engines
        if spares is not None and (not _is_integer(spares) or not 0 <= spares <= MAX_SPARE_ENGINES):
            raise ValueError(
                f"spare_engines must be an integer in [0, {MAX_SPARE_ENGINES}], got {spares!r}; set --spare-engines"
            )
        if not _is_integer(self.max_connections) or self.max_connections < 1:
            raise ValueError(
                f"max_connections must be an integer >= 1, got {self.max_connections!r}; set --max-connections"
            )
        times = "head_timeout_s", "body_timeout_s", "grammar_timeout_s"
        for name in (*times, "request_timeout_s", "shutdown_timeout_s", "stuck_after_s"):
            if not 0 < getattr(self, name) < 1e9:
                raise ValueError(
                    f"{name} must be a number of seconds > 0, got {getattr(self, name)!r}; "
                    f"set --{name.replace('_', '-')}"
                )
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError(
                f"ssl_certfile ({self.ssl_certfile!r}) and ssl_keyfile ({self.ssl_keyfile!r}) belong together; set both"
            )
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ValueError(
                f"otlp_traces_endpoint must be a URL of http or https, got {endpoint!r}; set --otlp-traces-endpoint to "
                "something like http://127.0.0.1:4318/v1/traces"
            )
        self._check_keys()

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def _check_keys(self) -> None:
        keys = (*self.api_key, *([] if self.admin_api_key is None else [self.admin_api_key]))
        if len(keys) > MAX_KEYS:
            raise ValueError(f"{len(keys)} keys are given; at most {MAX_KEYS} are allowed, give teams one each")
        for key in keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(
                    "an API key is empty or holds characters that cannot stand in a header; "
                    "use printable ASCII without spaces in --api-key and --admin-api-key"
                )
        if self.admin_api_key is not None and self.admin_api_key in self.api_key:
            raise ValueError("admin_api_key is also an api_key, which would open admin routes to all; set another")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
