"""ModelSlim's layout: which modules ``quant_model_description.json`` says are quantised, and how.

The weights themselves are named as in compressed-tensors' W8A8, with a ``weight_offset`` beside each scale that must be
zero (the loader checks it). Invariant: only dynamic W8A8 passes; anything else is refused by its own name.
"""

from collections.abc import Iterator
from pathlib import Path

from argosy.quantization.json_files import read_json_object

DESCRIPTION_NAME = "quant_model_description.json"
QUANT_METHOD = "ascend"  # what config.json says beside such a description, if it says anything
QUANTIZED_KIND = "W8A8_DYNAMIC"
PLAIN_KIND = "FLOAT"
_WEIGHT_SUFFIX = ".weight"


def read_quantized_modules(description: Path) -> tuple[str, ...]:
    """The full names of all quantised modules.

    Raises:
        ValueError: a module of another kind, or no module at all.
        RuntimeError: a file that cannot be read.
    """
    kinds = list(_weight_kinds(description))
    if not kinds:
        raise ValueError(
            f"{description} describes no weights: it must map tensor names such as 'lm_head.weight' to "
            f"{QUANTIZED_KIND!r} or {PLAIN_KIND!r}"
        )
    for module_name, kind in kinds:
        if kind not in (QUANTIZED_KIND, PLAIN_KIND):
            raise ValueError(
                f"{description}: {module_name}{_WEIGHT_SUFFIX} is {kind!r}; this engine reads {QUANTIZED_KIND!r} "
                f"(weights per channel, activations per token) and {PLAIN_KIND!r}"
            )
    return tuple(module_name for module_name, kind in kinds if kind == QUANTIZED_KIND)


def _weight_kinds(description: Path) -> Iterator[tuple[str, object]]:
    """Beside weights the file has an entry for every scale and offset, and settings of its own, such as its version."""
    for name, kind in read_json_object(description).items():
        if name.endswith(_WEIGHT_SUFFIX):
            yield name.removesuffix(_WEIGHT_SUFFIX), kind
