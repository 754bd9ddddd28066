"""The number formats that the equality table goes through: how weights are stored, and what the cache holds.

Each is a config that differs from the user's in that alone, and what rounding may do to its results when topology
changes. Invariant: a format is compared with itself on one rank, never with another format.
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

from argosy.config import EngineConfig
from argosy.engine.model_directory import resolve_model_directory
from argosy.models.deepseek.config import load_model_config
from argosy.models.deepseek.quantized_modules import build_w8a8_format
from argosy.quantization.convert import ConversionOptions, convert_checkpoint

STORED = "stored"
NAMES = (STORED, "w8a8", "int8_cache", "fp8_cache", "fp8_index_keys")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """What a way on a topology may differ in from one rank."""

    share: float = 1.0  # of all tokens, those before each request's first difference must be this many at least
    logprob_difference: float  # of equal tokens, the largest that passes
    median_difference: float = math.inf  # of the same
    gap: float = 0.0  # at a request's first difference: by how much the other token may have been less likely


# float32: sums in another order, nothing else.
SUMS = Tolerance(logprob_difference=1e-4)
# NOTE(numerics): a sum's last bit decides now and then how a number in the middle between two steps is rounded to 8
# bits, and a step is 1/127 of the largest number beside it. Log probabilities show it; tokens change at ties alone, of
# which random prompts are full. One such rounding moves those behind it, so a single token may be further off than the
# format is from the model (argosy-tiny in W8A8, whole against chunked: 0.77 on a CPU, 0.49 on an H200; 0.41 from the
# model), but half of the tokens stay where they were (median 0.002; 0.04 from the model).
ROUNDINGS = Tolerance(share=0.8, logprob_difference=1.0, median_difference=0.02, gap=1.0)
# A row-parallel linear quantises its local slice with a scale of its own: other roundings in every layer.
W8A8_SLICES = Tolerance(share=0.5, logprob_difference=1.0, gap=1.0)
# In bfloat16 every number is rounded, and only the share is judged.
BFLOAT16 = Tolerance(share=0.5, logprob_difference=math.inf, gap=math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberFormat:
    """A config to deploy on every topology, and how far its results may be apart in float32."""

    name: str
    config: EngineConfig
    whole: Tolerance = SUMS  # where tp_size is 1
    sliced: Tolerance = SUMS  # where it is more

    def tolerance(self, dtype_name: str, tp_size: int) -> Tolerance:
        if dtype_name != "float32":
            return BFLOAT16
        return self.whole if tp_size == 1 else self.sliced


def build_number_format(name: str, config: EngineConfig, scratch: Path) -> NumberFormat:
    """``scratch``: a directory for a converted checkpoint.

    Raises:
        ValueError: no such format, or a checkpoint that cannot be converted to it.
        RuntimeError: files that cannot be written.
    """
    if name == STORED:
        return NumberFormat(name=name, config=config)
    if name == "w8a8":
        converted = dataclasses.replace(config, model=str(_convert(config, scratch / name)))
        return NumberFormat(name=name, config=converted, whole=ROUNDINGS, sliced=W8A8_SLICES)
    if name == "int8_cache":
        rounded = dataclasses.replace(config, kv_cache_dtype="int8")
    elif name == "fp8_cache":
        rounded = dataclasses.replace(config, kv_cache_dtype="fp8")
    elif name == "fp8_index_keys":
        rounded = dataclasses.replace(config, index_cache_dtype="fp8")
    else:
        raise ValueError(f"no number format {name!r}; set --formats to some of {', '.join(NAMES)}")
    return NumberFormat(name=name, config=rounded, whole=ROUNDINGS, sliced=ROUNDINGS)


def _convert(config: EngineConfig, destination: Path) -> Path:
    source = resolve_model_directory(config.model)
    target = build_w8a8_format(load_model_config(source), quantize_kv_b=False, quantize_mtp=False)
    num_threads = len(os.sched_getaffinity(0))
    options = ConversionOptions(source=source, destination=destination, target=target, num_threads=num_threads)
    convert_checkpoint(options, lambda progress: None)
    return destination
