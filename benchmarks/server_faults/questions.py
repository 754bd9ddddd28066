"""Prompts of mixed lengths with the tokens that greedy decoding gives offline, from which all shorter answers follow.

Invariant: the tokens are the engine's own without a server, computed before one is started.
"""

import random
from dataclasses import dataclass

from argosy import LLM, SamplingParams
from benchmarks.server_faults.client import Answer

MODEL_SETTINGS = {"num_threads": 1}


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, and what it must be answered."""

    body: dict[str, object]
    token_ids: list[int]
    finish_reason: str

    def judge(self, answer: Answer) -> str:
        """What is wrong with the answer; empty: nothing."""
        if answer.problem:
            return answer.problem
        if answer.token_ids != self.token_ids:
            return f"other tokens than offline: {answer.token_ids} instead of {self.token_ids}"
        if answer.ends != [self.finish_reason]:
            return f"it ended by {answer.ends}, not by {self.finish_reason}"
        return ""


class Questions:
    """Conversations about ``min_sums`` sums and up to ``max_sums`` - 1 more, with ``num_tokens`` tokens of answer."""

    def __init__(self, number: int, num_tokens: int, max_sums: int = 12, min_sums: int = 1, seed: int = 0) -> None:
        draw = random.Random(seed)
        with LLM(**MODEL_SETTINGS) as llm:  # type: ignore[arg-type]
            self._eos = llm.tokenizer.eos_token_id
            self.prompts = [llm.encode_chat(_build_messages(draw, min_sums + i % max_sums)) for i in range(number)]
            params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
            outputs = llm.generate(self.prompts, params)
            self._answers = [output.outputs[0].token_ids for output in outputs]

    def ask(self, i: int, num_tokens: int, *, ignores_eos: bool, is_streamed: bool) -> Ask:
        """Number ``i`` of the prompts, which repeat."""
        i %= len(self.prompts)
        expected = self._answers[i][:num_tokens]
        assert len(expected) == num_tokens
        reason = "length"
        if not ignores_eos and self._eos in expected:
            expected = expected[: expected.index(self._eos) + 1]
            reason = "stop"
        body: dict[str, object] = {
            "prompt_token_ids": self.prompts[i],
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": ignores_eos,
            "stream": is_streamed,
        }
        return Ask(body, expected, reason)


def _build_messages(draw: random.Random, num_sums: int) -> list[dict[str, str]]:
    messages = []
    for _ in range(num_sums):
        left, right = draw.randint(1, 99), draw.randint(1, 99)
        messages += [
            {"role": "user", "content": f"{left} + {right} = ?"},
            {"role": "assistant", "content": str(left + right)},
        ]
    return messages[:-1]
