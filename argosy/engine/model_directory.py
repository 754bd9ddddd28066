"""Where a model lies: a directory in Hugging Face layout, or one that came with the package. No torch."""

from pathlib import Path

from argosy.assets import BUILTIN_MODELS, builtin_model_directory


def resolve_model_directory(model: str) -> Path:
    """The directory of a built-in model's name or of a path.

    Raises:
        ValueError: neither.
    """
    if model in BUILTIN_MODELS:
        return builtin_model_directory(model)
    directory = Path(model).expanduser()
    if not directory.is_dir():
        raise ValueError(
            f"no such model: {model!r} is neither a directory nor built in ({', '.join(BUILTIN_MODELS)}); "
            "give a directory with config.json, tokenizer.json and *.safetensors"
        )
    return directory
