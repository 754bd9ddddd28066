"""Every setting of the engine: one frozen dataclass, one comment line a field, all cross-field checks.

Command-line flags are generated from these fields (``cli/flags.py``). What a checkpoint says about itself is not
here but in ``models/deepseek/config.py``. Invariant: nobody writes to a config after construction; use
``dataclasses.replace``.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

DTypeName = Literal["auto", "bfloat16", "float32"]
DeviceName = Literal["auto", "cpu", "cuda"]
EPMode = Literal["auto", "low_latency", "high_throughput", "all_gather"]
ExchangeMode = Literal["low_latency", "high_throughput", "all_gather"]  # what "auto" chooses from
EPPayload = Literal["model", "int8", "fp8"]
LLTransport = Literal["collective", "symmetric"]
QuantizationName = Literal["auto", "none", "w8a8", "fp8_block"]
LoadFormat = Literal["auto", "dummy"]
KVCacheDType = Literal["auto", "int8", "fp8"]
IndexCacheDType = Literal["auto", "model", "int8", "fp8"]
StoredDType = Literal["model", "int8", "fp8"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheDTypes:
    """What the two parts of a token's place in the cache are stored as; ``model``: in the model's dtype."""

    latent: StoredDType = "model"
    index_key: StoredDType = "model"


def choose_cache_dtypes(kv_cache_dtype: KVCacheDType, index_cache_dtype: IndexCacheDType = "auto") -> CacheDTypes:
    """Index keys follow the latent unless they are told otherwise."""
    latent: StoredDType = "model" if kv_cache_dtype == "auto" else kv_cache_dtype
    return CacheDTypes(latent=latent, index_key=latent if index_cache_dtype == "auto" else index_cache_dtype)


IN_MODEL_DTYPE = CacheDTypes()


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How one engine runs.

    Raises:
        ValueError: naming the field, the value, the rule and the flag to change.
    """

    model: str = "argosy-tiny"  # a directory in Hugging Face layout, or the name of the built-in model
    tokenizer: str | None = None  # a directory with tokenizer.json; None = the model's
    dtype: DTypeName = "auto"  # auto: the checkpoint's dtype on accelerators, float32 on a CPU
    device: DeviceName = "auto"  # auto: cuda where a card is present, else cpu
    quantization: QuantizationName = "auto"  # how linears compute; auto: as the checkpoint is stored
    load_format: LoadFormat = "auto"  # dummy: random weights instead of the checkpoint's, to measure real shapes
    kv_cache_dtype: KVCacheDType = "auto"  # what the cache holds; auto: the model's dtype
    index_cache_dtype: IndexCacheDType = "auto"  # what it holds of index keys; auto: as kv_cache_dtype
    seed: int = 0  # seeds requests that bring none
    max_model_len: int | None = None  # longest prompt + output in tokens; None = the model's own limit
    max_num_seqs: int = 64  # requests that run at once in a replica
    max_num_batched_tokens: int = 2048  # tokens that one step of a replica may compute
    block_size: int = 64  # tokens per cache block
    num_blocks: int | None = None  # cache blocks; None = as many as the memory settings allow
    kv_cache_memory_bytes: int | None = None  # cache size; None = measured on accelerators, up to 1 GiB on a CPU
    device_memory_utilization: float = 0.9  # share of an accelerator's memory that weights + cache + workspace may take
    async_scheduling: bool | None = None  # plan the next step while one runs; None = on accelerators
    enforce_eager: bool = False  # no device graphs: every kernel of a decode step is launched by the host
    emulate_graphs: bool = False  # on a CPU: decode in the padded, static batches that cards replay; for tests
    enable_prefix_caching: bool = True  # share the cache blocks of equal prompt prefixes
    num_threads: int | None = None  # CPU threads of each rank; None = torch's choice, shared among a node's ranks
    tp_size: int = field(default=1, metadata={"aliases": ("--tp",)})  # ranks that share each layer of a replica
    dp_size: int = field(default=1, metadata={"aliases": ("--dp",)})  # replicas, each with requests of its own
    ep_size: int | None = field(default=None, metadata={"aliases": ("--ep",)})  # ranks sharing the experts; None = all
    first_device: int = 0  # number of the first accelerator of each node that this engine uses
    nnodes: int = 1  # machines; each holds an equal share of the ranks
    node_rank: int = 0  # which of them this is; node 0 answers
    master_addr: str | None = None  # address of node 0, as the other nodes reach it
    master_port: int | None = None  # a free TCP port of node 0; None = chosen by the system, on one node only
    ep_mode: EPMode = "auto"  # how tokens reach their experts; auto: by the number of tokens of the step, agreed by all
    ll_max_tokens_per_rank: int | None = (
        None  # low_latency up to this many on the fullest rank; None = where it pays, -1 = never
    )
    ll_transport: LLTransport = (
        "collective"  # what low_latency travels by; symmetric: puts into shared memory, between cards of one node
    )
    ep_payload: EPPayload = "model"  # what tokens travel to their experts as; model: what loses nothing
    collective_timeout_s: float = 30.0  # a collective that takes longer ends all ranks with a report
    startup_timeout_s: float = 120.0  # longest wait, in each phase of the start, for all ranks to arrive
    weights_timeout_s: float = (
        3600.0  # the same for the phases that load weights, try the largest step and record decode steps
    )
    flight_recorder_dir: str | None = None  # on failure ranks write their last collectives here; None = a new directory

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        _check_at_least("max_num_seqs", self.max_num_seqs, 1)
        _check_at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _check_at_least("seed", self.seed, 0)
        _check_at_least("first_device", self.first_device, 0)
        for name in ("max_model_len", "kv_cache_memory_bytes", "num_threads"):
            if getattr(self, name) is not None:
                _check_at_least(name, getattr(self, name), 1)
        if self.num_blocks is not None:
            _check_at_least("num_blocks", self.num_blocks, 2)  # block 0 is the null block
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size ({self.block_size}) must be a power of two; set --block-size to 16, 32 or 64")
        if not 0.0 < self.device_memory_utilization <= 1.0:
            raise ValueError(
                f"device_memory_utilization ({self.device_memory_utilization}) must be in (0, 1]; "
                "set --device-memory-utilization to 0.9, say"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), or running requests would starve; "
                "raise --max-num-batched-tokens or lower --max-num-seqs"
            )
        _check_choice("quantization", self.quantization, get_args(QuantizationName))
        _check_choice("load_format", self.load_format, get_args(LoadFormat))
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, get_args(KVCacheDType))
        _check_choice("index_cache_dtype", self.index_cache_dtype, get_args(IndexCacheDType))
        self._check_ranks()
        self._check_nodes()
        self._check_exchange()

    @property
    def world_size(self) -> int:
        """All ranks on all nodes. Which rank does what is in ``distributed/layout.py``, checks of ``ep_size`` too."""
        return self.dp_size * self.tp_size

    @property
    def number_format(self) -> str:
        """The dtype, and what is computed or cached in fewer bits: "float32", "bfloat16, w8a8, int8 cache"."""
        parts: list[str] = [self.dtype]
        if self.quantization != "none":
            parts.append(self.quantization)
        stored = self.cache_dtypes
        if stored.latent != "model":
            parts.append(f"{stored.latent} cache")
        if stored.index_key != stored.latent:
            parts.append(
                "index keys in the model's dtype" if stored.index_key == "model" else f"{stored.index_key} index keys"
            )
        return ", ".join(parts)

    @property
    def cache_dtypes(self) -> CacheDTypes:
        return choose_cache_dtypes(self.kv_cache_dtype, self.index_cache_dtype)

    def _check_ranks(self) -> None:
        for name in ("tp_size", "dp_size", "nnodes"):
            _check_at_least(name, getattr(self, name), 1)
        if self.ep_size is not None:
            _check_at_least("ep_size", self.ep_size, 1)

    def _check_nodes(self) -> None:
        _check_at_least("node_rank", self.node_rank, 0)
        if self.master_port is not None:
            _check_at_least("master_port", self.master_port, 1)
            if self.master_port > 65535:
                raise ValueError(f"master_port ({self.master_port}) must be at most 65535; set --master-port")
        if self.world_size % self.nnodes:
            raise ValueError(
                f"world_size ({self.world_size} = dp_size {self.dp_size} x tp_size {self.tp_size}) must be divisible "
                f"by nnodes ({self.nnodes}), for nodes hold equal shares; set --nnodes, --dp-size or --tp-size"
            )
        if self.node_rank >= self.nnodes:
            raise ValueError(
                f"node_rank ({self.node_rank}) must be below nnodes ({self.nnodes}); "
                f"set --node-rank to 0 .. {self.nnodes - 1}, or raise --nnodes"
            )
        if self.nnodes > 1 and not (self.master_addr and self.master_port):
            raise ValueError(
                f"nnodes ({self.nnodes}) needs the place where nodes meet, got master_addr {self.master_addr!r} and "
                f"master_port {self.master_port!r}; set --master-addr and --master-port to node 0's, on every node"
            )

    def _check_exchange(self) -> None:
        _check_choice("ep_mode", self.ep_mode, get_args(EPMode))
        _check_choice("ep_payload", self.ep_payload, get_args(EPPayload))
        _check_choice("ll_transport", self.ll_transport, get_args(LLTransport))
        if self.ll_transport == "symmetric" and (self.device == "cpu" or self.nnodes > 1):
            raise ValueError(
                "ll_transport symmetric needs NVIDIA cards of one node, which reach each other's memory, got device "
                f"{self.device!r} and nnodes ({self.nnodes}); set --ll-transport collective"
            )
        ll_max = self.ll_max_tokens_per_rank
        if ll_max is not None and ll_max != -1 and not _is_integer(ll_max, 1):
            raise ValueError(
                "ll_max_tokens_per_rank must be an integer >= 1, or -1 for never, "
                f"got {ll_max!r}; set --ll-max-tokens-per-rank"
            )
        if ll_max == -1 and self.ep_mode == "low_latency":
            raise ValueError(
                "ep_mode low_latency contradicts ll_max_tokens_per_rank -1 (never); set one of --ep-mode "
                "high_throughput and --ll-max-tokens-per-rank 64"
            )
        for name in ("collective_timeout_s", "startup_timeout_s", "weights_timeout_s"):
            _check_seconds(name, getattr(self, name))


def _check_at_least(name: str, value: int, low: int) -> None:
    if not _is_integer(value, low):
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}; set --{name.replace('_', '-')}")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        flag = f"--{name.replace('_', '-')}"
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}; set {flag}")


def _check_seconds(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number of seconds > 0, got {value!r}; set --{name.replace('_', '-')}")


def _is_integer(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
