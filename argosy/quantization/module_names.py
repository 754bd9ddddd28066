"""A set of module names given by names and patterns, as compressed-tensors writes them.

Invariant: membership is exact: an entry is a whole name, or ``re:`` and a pattern matched from the name's beginning.
"""

import re
from collections.abc import Iterable

REGEX_PREFIX = "re:"


class ModuleNames:
    """Tens of thousands of whole names cost one look-up; patterns are tried one after another, so there may be few.

    Raises:
        ValueError: a pattern that is no regular expression.
    """

    __slots__ = ("_names", "_patterns")

    def __init__(self, entries: Iterable[str]) -> None:
        entries = tuple(entries)
        self._names = frozenset(entry for entry in entries if not entry.startswith(REGEX_PREFIX))
        self._patterns = tuple(_compile(entry) for entry in entries if entry.startswith(REGEX_PREFIX))

    def __contains__(self, name: str) -> bool:
        return name in self._names or any(pattern.match(name) for pattern in self._patterns)


def _compile(entry: str) -> re.Pattern[str]:
    try:
        return re.compile(entry.removeprefix(REGEX_PREFIX))
    except re.error as error:
        raise ValueError(f"quantization_config: {entry!r} is no regular expression: {error}") from error
