"""Every setting of the engine: one frozen dataclass, one comment line a field, all cross-field checks.

Command-line flags are generated from these fields (``cli/flags.py``). What a checkpoint says about itself is not
here but in ``models/deepseek/config.py``. Invariant: nobody writes to a config after construction; use
``dataclasses.replace``.
"""

from dataclasses import dataclass
from typing import Literal

DTypeName = Literal["auto", "bfloat16", "float32"]
DeviceName = Literal["auto", "cpu", "cuda"]


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
    seed: int = 0  # seeds requests that bring none
    max_model_len: int | None = None  # longest prompt + output in tokens; None = the model's own limit
    max_num_seqs: int = 64  # requests that run at once
    max_num_batched_tokens: int = 2048  # tokens that one step may compute
    block_size: int = 64  # tokens per cache block
    num_blocks: int | None = None  # cache blocks; None = as many as the memory settings allow
    kv_cache_memory_bytes: int | None = None  # cache size; None = measured on accelerators, up to 1 GiB on a CPU
    device_memory_utilization: float = 0.9  # share of an accelerator's memory that weights + cache + workspace may take
    enable_prefix_caching: bool = True  # share the cache blocks of equal prompt prefixes
    num_threads: int | None = None  # CPU threads; None = torch's choice

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        _check_at_least("max_num_seqs", self.max_num_seqs, 1)
        _check_at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _check_at_least("seed", self.seed, 0)
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


def _check_at_least(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}; set --{name.replace('_', '-')}")
