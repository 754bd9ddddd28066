"""Grammars are tried before an engine gets them, in the process of whoever asks for them.

It has no deadline: a server, whose grammars come from strangers, does this in a process that it can end. Invariant: a
grammar that was found good is compiled here once, as long as not too many others come.
"""

from collections import OrderedDict
from collections.abc import Callable

from argosy.grammar.compiler import GrammarCompiler, Vocabulary
from argosy.sampling_params import StructuredOutputsParams

_MAX_KEPT = 512


class GrammarChecker:
    """``load_vocabulary`` is called by the first grammar."""

    def __init__(self, load_vocabulary: Callable[[], Vocabulary]) -> None:
        self._load_vocabulary = load_vocabulary
        self._compiler: GrammarCompiler | None = None
        self._good: OrderedDict[StructuredOutputsParams, None] = OrderedDict()

    def check(self, structured: StructuredOutputsParams | None) -> None:
        """Raises ValueError for a grammar that does not compile within the limits, or matches nothing."""
        if structured is None or structured in self._good:
            return
        if self._compiler is None:
            self._compiler = GrammarCompiler(self._load_vocabulary())
        try:
            self._compiler.check(structured)
        except ValueError as error:
            raise ValueError(f"structured_outputs cannot be compiled: {error}") from error
        self._good[structured] = None
        if len(self._good) > _MAX_KEPT:
            self._good.popitem(last=False)
