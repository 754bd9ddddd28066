"""The record every generator returns, and the text a model should answer with.

Does not know about tokens or chat markers. Invariant: `completion` ends with exactly the `answer` string.
"""

from dataclasses import dataclass

ANSWER_MARK = "#### "


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One question with its worked answer."""

    prompt: str  # what the user says
    answer: str  # what the evaluation compares with
    category: str  # generator name, e.g. "needle"
    language: str  # "en" or "zh"
    steps: str = ""  # worked steps; empty: the answer is given at once

    @property
    def completion(self) -> str:
        """The assistant's text: the steps and a final `#### answer` line, or the bare answer."""
        if not self.steps:
            return self.answer
        return f"{self.steps}\n{ANSWER_MARK}{self.answer}"


def extract_answer(completion: str) -> str:
    """What follows the last `####`, or everything, trimmed."""
    return completion.rsplit("####", 1)[-1].strip()


def pick_language(rng, zh_share: float = 0.5) -> str:
    """ "zh" with probability `zh_share`, else "en"."""
    return "zh" if rng.random() < zh_share else "en"
