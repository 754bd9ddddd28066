"""Reads a JSON object from a file of a checkpoint, with errors that name the file.

It knows no keys. Invariant: what it returns is a dict with string keys, or it raises.
"""

import json
from pathlib import Path


def read_json_object(path: Path) -> dict[str, object]:
    """Raises ValueError for anything but a JSON object, RuntimeError for a file that cannot be read."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RuntimeError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(raw).__name__}")
    return raw
