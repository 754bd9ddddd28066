"""Turns a growing list of tokens into a growing text, and finds stop strings in it.

It decides what may be shown: not half a character, and nothing that may yet turn out to be a stop string. It knows no
requests. Invariant: shown text is never taken back; without a stop, all of it together equals ``Tokenizer.decode``.
"""

import codecs
from collections.abc import Sequence

from argosy.engine.tokenizer import Tokenizer

_NewUtf8Decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """The text of one completion.

    A stop string counts as soon as its last character is there, whichever tokens its characters came from; of several
    that end at one character the longest counts. ``num_tokens`` is the number of tokens that belong to the completion:
    all given so far, or those up to the one that completed the stop string. ``stop_reason`` is that string, or None.
    """

    __slots__ = (
        "_byte_table",
        "_decode",
        "_held",
        "_include_stop",
        "_matcher",
        "_min_tokens",
        "_state",
        "num_tokens",
        "stop_reason",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: "Sequence[str] | StopMatcher" = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        """Starts with no token.

        Args:
            stop: strings that end the text, none empty; or a matcher of them, which many completions may share.
            include_stop: whether the stop string itself belongs to the text.
            skip_special_tokens: leave special tokens out of the text (and so out of the search for stop strings).
            min_tokens: a stop string completed before this many tokens does not count.
        """
        self._byte_table = tokenizer.byte_table(skip_special_tokens=skip_special_tokens)
        self._decode = _NewUtf8Decoder(errors="replace").decode
        self._matcher = stop if isinstance(stop, StopMatcher) else StopMatcher(stop) if stop else None
        self._state = 0
        self._held = ""
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self.num_tokens = 0
        self.stop_reason: str | None = None

    def append(self, token_ids: Sequence[int]) -> str:
        """Takes new tokens and returns the text that may now be shown; after a stop string it ignores them."""
        table, decode, matcher = self._byte_table, self._decode, self._matcher
        shown = ""
        for token_id in token_ids:
            if self.stop_reason is not None:
                break
            assert 0 <= token_id < len(table), f"token id {token_id} is not in [0, {len(table)}): sampled from padding?"
            self.num_tokens += 1
            piece = decode(table[token_id])
            shown += piece if matcher is None else self._search(piece, matcher)
        return shown

    def finish(self) -> str:
        """Ends the text and returns what was still held back; half a character becomes U+FFFD."""
        if self.stop_reason is not None:
            return ""
        piece = self._decode(b"", True)
        shown = piece if self._matcher is None else self._search(piece, self._matcher)
        if self.stop_reason is None:
            shown += self._held
            self._held = ""
        return shown

    def _search(self, piece: str, matcher: "StopMatcher") -> str:
        """Looks for a stop string that ends in ``piece`` and returns what may be shown."""
        state = self._state
        may_stop = self.num_tokens >= self._min_tokens
        pending = self._held + piece
        for end, character in enumerate(piece, start=len(self._held) + 1):
            state = matcher.advance(state, character)
            stop = matcher.completed[state]
            if stop is not None and may_stop:
                self.stop_reason = stop
                self._held = ""
                return pending[: end if self._include_stop else end - len(stop)]
        self._state = state
        num_shown = len(pending) - matcher.depths[state]
        self._held = pending[num_shown:]
        return pending[:num_shown]


class StopMatcher:
    """Aho-Corasick: reads text character by character at a cost that does not grow with the number of stop strings.

    A state is the longest end of the text that begins some stop string; ``depths`` is its length. State 0: no such end.
    It never changes, so one serves many texts.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        assert all(stop), "an empty stop string would stop before the first token"
        self._next_states: list[dict[str, int]] = [{}]
        self.depths = [0]
        self.completed: list[str | None] = [None]  # by state: the longest stop string that the text ends with
        for text in stop:
            self._add(text)
        self._fallbacks = [0] * len(self.depths)
        self._link()

    def advance(self, state: int, character: str) -> int:
        while state and character not in self._next_states[state]:
            state = self._fallbacks[state]
        return self._next_states[state].get(character, 0)

    def _add(self, text: str) -> None:
        state = 0
        for character in text:
            if character not in self._next_states[state]:
                self._next_states[state][character] = len(self.depths)
                self._next_states.append({})
                self.depths.append(self.depths[state] + 1)
                self.completed.append(None)
            state = self._next_states[state][character]
        self.completed[state] = text

    def _link(self) -> None:
        """Sets each state's fallback: the next shorter end of the text that also begins a stop string."""
        order = [0]
        for state in order:  # grows while it is walked: breadth first, so shorter states are linked before longer ones
            for character, next_state in self._next_states[state].items():
                order.append(next_state)
                if state:
                    fallback = self.advance(self._fallbacks[state], character)
                    self._fallbacks[next_state] = fallback
                    self.completed[next_state] = self.completed[next_state] or self.completed[fallback]
