"""In which number format this engine's linears compute: ``--quantization``, the device, and what the checkpoint holds.

The rule is ``resolve_quantization``'s; where a linear is quantised is the checkpoint's business
(``quantization/checkpoint_format.py``). Invariant: what is chosen can be loaded from what is stored, so a contradiction
ends here and not in the middle of a load.
"""

import dataclasses
from pathlib import Path

from argosy.config import EngineConfig
from argosy.platforms import Platform
from argosy.quantization.checkpoint_format import CheckpointQuantization, load_checkpoint_quantization
from argosy.quantization.scheme import resolve_quantization


def choose_quantization(config: EngineConfig, directory: Path, platform: Platform) -> CheckpointQuantization:
    """The format to compute in; ``kind`` "none" where the model is plain, or is dequantised on load.

    Raises:
        ValueError: a ``--quantization`` that contradicts what is stored or what the device can, or a stored format that
            cannot be computed.
    """
    stored = load_checkpoint_quantization(directory)
    is_fp8 = "fp8_block" in (config.quantization, stored.kind)
    kind = resolve_quantization(
        config.quantization,
        stored.kind,
        has_fp8_compute=is_fp8 and platform.has_fp8_compute,
        is_dummy=config.load_format == "dummy",
    )
    if kind in (stored.kind, "none"):
        return dataclasses.replace(stored, kind=kind)
    # There is no checkpoint to contradict: every linear is quantised that its scheme can hold.
    return CheckpointQuantization(kind=kind)
