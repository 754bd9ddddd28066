"""What must be equal on all nodes before they compute together: settings, model files, versions.

Ranks compare these when they have met (``distributed/startup.py``). What may differ between machines, as paths, is left
out: contents count. Invariant: two nodes with equal fingerprints compute the same function of the same tokens.
"""

import dataclasses
import hashlib
import platform
from pathlib import Path

import torch

from argosy.config import EngineConfig

# Places and resources of one machine; the address is checked by meeting there.
_LOCAL_FIELDS = frozenset(
    {
        "model",
        "tokenizer",
        "num_threads",
        "first_device",
        "node_rank",
        "master_addr",
        "master_port",
        "flight_recorder_dir",
        "device",
    }
)
_SAMPLE_BYTES = 2**16  # of every shard: the whole would take as long as loading it


def build_fingerprints(config: EngineConfig, directory: Path, device_type: str) -> dict[str, str]:
    """``config``: with ``max_model_len`` and ``dtype`` filled in. Field, as the user knows it -> value.

    Raises:
        RuntimeError: a file cannot be read.
    """
    fields = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    settings = {
        f"--{name.replace('_', '-')}": str(value) for name, value in fields.items() if name not in _LOCAL_FIELDS
    }
    tokenizer_directory = Path(config.tokenizer).expanduser() if config.tokenizer else directory
    try:
        files = {
            "config.json": _hash_file(directory / "config.json"),
            "tokenizer.json": _hash_file(tokenizer_directory / "tokenizer.json"),
            "weight files": _describe_weights(config, directory),
        }
    except OSError as error:
        raise RuntimeError(f"cannot read {error.filename}: {error.strerror}; check --model") from error
    versions = {
        "argosy's own code": _hash_code(),
        "torch version": str(torch.__version__),
        "Python version": ".".join(platform.python_version_tuple()[:2]),
    }
    return {**settings, "device": device_type, **files, **versions}


def _describe_weights(config: EngineConfig, directory: Path) -> str:
    """Made weights follow from config.json and the settings, and files beside them do not matter."""
    return "none, load_format dummy" if config.load_format == "dummy" else _hash_shards(directory)


def _hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _hash_code() -> str:
    """Of the whole package: a version number says nothing of an edited checkout."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent.parent
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)} ".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _hash_shards(directory: Path) -> str:
    """Of names, sizes, first bytes (the header is there) and last bytes."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as shard:
            digest.update(shard.read(_SAMPLE_BYTES))
            shard.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(shard.read())
    return digest.hexdigest()[:16]
