"""``Grammars`` of a server without a process: compiled here and now."""

from argosy.engine.tokenizer import Tokenizer
from argosy.grammar.checker import GrammarChecker
from argosy.sampling_params import StructuredOutputsParams
from argosy.server.errors import ApiError


class InstantGrammars:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._checker = GrammarChecker(tokenizer.vocabulary)

    async def check(self, structured: StructuredOutputsParams, param: str) -> None:
        try:
            self._checker.check(structured)
        except ValueError as error:
            raise ApiError(400, f"{param} cannot be compiled: {error}", param=param) from error
