"""Telling a completion's reasoning from its answer, by the ``</think>`` between them. Pure text.

It parses no tool calls and refuses nothing: the strict parser is ``models/deepseek/encoding_parser.py``. Invariant: the
reasoning and the answer of a cumulative text only grow while the text does.
"""

THINKING_END = "</think>"


def strip_reasoning(completion: str) -> str:
    """What follows the last ``</think>``; all of it where there is none."""
    return completion.rsplit(THINKING_END, 1)[-1]


def split_stream(text: str, *, is_finished: bool) -> tuple[str, str]:
    """``(reasoning, answer)`` of a completion so far, at the first ``</think>``.

    Without one all of it is reasoning, except an end that may be the beginning of the mark while more can follow.
    """
    before, mark, after = text.partition(THINKING_END)
    if mark:
        return before, after
    if is_finished:
        return text, ""
    longest = min(len(text), len(THINKING_END) - 1)
    held = next((size for size in range(longest, 0, -1) if text.endswith(THINKING_END[:size])), 0)
    return text[: len(text) - held], ""
