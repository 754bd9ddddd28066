"""Argosy: an engine that serves DeepSeek-V3.2 on many accelerators, or on one CPU."""

from typing import TYPE_CHECKING

from argosy.config import EngineConfig
from argosy.messages import CompletionOutput, RequestOutput
from argosy.sampling_params import SamplingParams

if TYPE_CHECKING:
    from argosy.engine.generation import LLM

__all__ = ["LLM", "CompletionOutput", "EngineConfig", "RequestOutput", "SamplingParams"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """``LLM`` is imported when first used: it brings torch, and ``argosy --help`` should not wait for that."""
    if name == "LLM":
        from argosy.engine.generation import LLM

        return LLM
    raise AttributeError(f"module 'argosy' has no attribute {name!r}")
