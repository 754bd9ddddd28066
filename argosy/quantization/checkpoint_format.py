"""In which number format a checkpoint's weights are stored, as its own files say.

It knows formats and patterns of module names, no tensors and no shapes; ``compressed_tensors.py`` and ``modelslim.py``
hold what is particular to those two layouts. Invariant: ``is_quantized`` is a pure function of a module's name in the
checkpoint, so every rank and every tool judges alike; what this engine cannot compute is refused, never guessed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from argosy.quantization import compressed_tensors, modelslim
from argosy.quantization.json_files import read_json_object
from argosy.quantization.module_names import REGEX_PREFIX, ModuleNames

WeightFormat = Literal["none", "w8a8", "fp8_block"]

CONFIG_NAME = "config.json"
SUPPORTED = (
    "this engine reads unquantised checkpoints, DeepSeek's FP8 blocks (quant_method fp8, fmt e4m3), "
    "compressed-tensors' W8A8 (weights INT8 per channel, activations INT8 dynamic per token), "
    "and ModelSlim's W8A8_DYNAMIC"
)

# Modules that hold a weight and are no linear in any of the formats: norms, the embedding, the router.
_NEVER_LINEAR = re.compile(r"(.*\.)?(\w*norm|embed_tokens|gate)")
# Linears that DeepSeek's FP8 checkpoints keep in bf16; their config.json does not say so.
_PLAIN_IN_FP8 = ("lm_head", r"re:.*\.indexer\.weights_proj$", r"re:.*\.eh_proj$", r"re:.*\.shared_head\.head$")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointQuantization:
    """The format of quantised modules, and which modules those are.

    Raises:
        ValueError: a pattern that is no regular expression.
    """

    kind: WeightFormat = "none"
    block_size: tuple[int, int] = (128, 128)  # of fp8_block's scales
    has_ue8m0_scales: bool = False  # fp8_block: activation scales are rounded up to powers of two, too
    targets: tuple[str, ...] = (compressed_tensors.ALL_LINEARS,)  # quantised modules: whole names, or "re:" patterns
    ignored: tuple[str, ...] = ()  # exceptions from the targets: whole names, or "re:" patterns
    _target_names: ModuleNames = field(init=False, repr=False, compare=False)
    _ignored_names: ModuleNames = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Derived once, so that judging tens of thousands of names is cheap; a frozen dataclass allows no other way.
        object.__setattr__(self, "_target_names", ModuleNames(self.targets))
        object.__setattr__(self, "_ignored_names", ModuleNames(self.ignored))

    def is_quantized(self, module_name: str) -> bool:
        """``module_name``: as in the checkpoint, without ``.weight``: "model.layers.3.self_attn.q_a_proj".

        Norms, embeddings and the router are never quantised, whatever the patterns say.
        """
        if self.kind == "none" or _NEVER_LINEAR.fullmatch(module_name):
            return False
        is_target = compressed_tensors.ALL_LINEARS in self.targets or module_name in self._target_names
        return is_target and module_name not in self._ignored_names


def read_raw_config(directory: Path) -> dict[str, object]:
    """The content of ``config.json``.

    Raises:
        ValueError: no such file, or not a JSON object.
        RuntimeError: a file that cannot be read.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{directory} has no config.json: give a directory in Hugging Face layout, or argosy-tiny")
    return read_json_object(path)


def load_checkpoint_quantization(directory: Path) -> CheckpointQuantization:
    """As ``read_checkpoint_quantization``, reading ``config.json`` too."""
    return read_checkpoint_quantization(directory, read_raw_config(directory))


def read_checkpoint_quantization(directory: Path, raw_config: Mapping[str, object]) -> CheckpointQuantization:
    """From the content of ``config.json``, and ModelSlim's description beside it if there is one.

    Raises:
        ValueError: a format that this engine does not compute, naming key, value and what is supported.
        RuntimeError: a file that cannot be read.
    """
    settings = raw_config.get("quantization_config")
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"config.json: quantization_config must be an object, got {settings!r}; {SUPPORTED}")
    method = None if settings is None else settings.get("quant_method")
    description = directory / modelslim.DESCRIPTION_NAME
    if description.is_file():
        return _read_modelslim(description, is_contradicted=settings is not None and method != modelslim.QUANT_METHOD)
    if settings is None:
        return CheckpointQuantization()
    if method == "fp8":
        return _parse_fp8(settings)
    if method == compressed_tensors.QUANT_METHOD:
        targets, ignored = compressed_tensors.parse_config(settings)
        return CheckpointQuantization(kind="w8a8", targets=targets, ignored=ignored)
    if method == modelslim.QUANT_METHOD:
        raise ValueError(
            f"config.json: quantization_config.quant_method {method!r} is ModelSlim's, but {directory} has no "
            f"{description.name}; copy it there"
        )
    raise ValueError(f"config.json: quantization_config.quant_method {method!r} is not supported; {SUPPORTED}")


def _read_modelslim(description: Path, *, is_contradicted: bool) -> CheckpointQuantization:
    if is_contradicted:
        raise ValueError(
            f"{description.parent} says two things: config.json has a quantization_config of another method, and "
            f"{description.name} is ModelSlim's; remove the one that does not belong to these weights"
        )
    return CheckpointQuantization(kind="w8a8", targets=modelslim.read_quantized_modules(description))


def _parse_fp8(settings: Mapping[str, object]) -> CheckpointQuantization:
    if settings.get("fmt", "e4m3") != "e4m3":
        raise ValueError(f"config.json: quantization_config.fmt {settings['fmt']!r} is not supported; {SUPPORTED}")
    if settings.get("activation_scheme", "dynamic") != "dynamic":
        raise ValueError(
            f"config.json: quantization_config.activation_scheme {settings['activation_scheme']!r} is not supported; "
            "this engine computes dynamic activation scales"
        )
    scale_format = settings.get("scale_fmt")
    if scale_format not in (None, "ue8m0"):
        raise ValueError(f"config.json: quantization_config.scale_fmt {scale_format!r} is not supported; {SUPPORTED}")
    block_size = settings.get("weight_block_size", [128, 128])
    is_pair = isinstance(block_size, list) and len(block_size) == 2
    if not is_pair or not all(type(n) is int and n > 0 for n in block_size):  # type: ignore[attr-defined]
        raise ValueError(f"config.json: weight_block_size must be two positive integers, got {block_size!r}")
    plain = settings.get("modules_to_not_convert") or []
    if not isinstance(plain, list) or not all(isinstance(name, str) for name in plain):
        raise ValueError(f"config.json: modules_to_not_convert must be a list of module names, got {plain!r}")
    return CheckpointQuantization(
        kind="fp8_block",
        block_size=(block_size[0], block_size[1]),  # type: ignore[index]
        has_ue8m0_scales=scale_format == "ue8m0",
        # transformers means a module with everything in it, wherever the name stands in the full one.
        ignored=(*_PLAIN_IN_FP8, *(rf"{REGEX_PREFIX}(.*\.)?{re.escape(name)}(\..*)?$" for name in plain)),
    )
