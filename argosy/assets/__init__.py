"""What ships inside the package: the built-in model, its held-out questions, and the console's page."""

from importlib.resources import files
from pathlib import Path

BUILTIN_MODELS = ("argosy-tiny",)


def builtin_model_directory(name: str) -> Path:
    """The directory of a built-in model.

    Raises:
        ValueError: no such model.
    """
    if name not in BUILTIN_MODELS:
        raise ValueError(f"no built-in model {name!r}; there is {', '.join(BUILTIN_MODELS)}")
    return Path(str(files("argosy.assets").joinpath(name)))


def builtin_questions_file() -> Path:
    """The held-out questions of ``argosy eval``, one JSON object a line."""
    return Path(str(files("argosy.assets").joinpath("questions.jsonl")))


def read_console_file(name: str) -> str:
    """A part of the console's page."""
    return files("argosy.assets").joinpath("console", name).read_text(encoding="utf-8")
