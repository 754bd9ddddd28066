"""The held-out questions and the larger set of needles.

Drawn from seeds that training never uses. Invariant: no prompt occurs twice, and training rejects these prompts.
"""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from tools.train_tiny.data import arithmetic, compare, dates, facts, gsm, needles, poems, units, word_problems_zh
from tools.train_tiny.data.example import Example
from tools.train_tiny.data.mixture import FACT_CATEGORIES

NUM_QUESTIONS = 200
_NUM_GSM = 88
# generator -> (English questions, Chinese questions)
_PLAN: tuple[tuple[Callable[[Random], Example], int, int], ...] = (
    (word_problems_zh.sample, 0, 30),
    (arithmetic.sample, 5, 5),
    (compare.sample, 3, 3),
    (dates.sample, 4, 4),
    (units.sample, 4, 4),
    (facts.sample_capital, 4, 4),
    (facts.sample_translation, 4, 4),
    (poems.sample, 0, 8),
)
_NEEDLE_TOKENS = (
    256,
    256,
    384,
    512,
    512,
    768,
    768,
    1024,
    1024,
    1280,
    1280,
    1536,
    1536,
    1664,
    1664,
    1792,
    *range(1912, 2049, 15),
)


def build_questions(seed: int, count_tokens: needles.TokenCounter) -> list[Example]:
    """The 200 questions of `questions.jsonl`."""
    rng = Random(f"questions-{seed}")
    questions: dict[str, Example] = {}
    index = 0
    while len(questions) < _NUM_GSM:
        example = gsm.build_example(gsm.HELD_OUT_SEED + seed * 1000 + index)
        questions.setdefault(example.prompt, example)
        index += 1
    for generator, *counts in _PLAN:
        for language, count in zip(("en", "zh"), counts, strict=True):
            _draw(rng, generator, language, count, questions)
    for position, num_tokens in enumerate(_NEEDLE_TOKENS):
        example = needles.build_needle(rng, ("en", "zh")[position % 2], num_tokens, count_tokens)
        questions.setdefault(example.prompt, example)
    if len(questions) != NUM_QUESTIONS:
        raise RuntimeError(f"{len(questions)} questions instead of {NUM_QUESTIONS}; adjust _PLAN")
    return list(questions.values())


def build_long_needles(seed: int, count: int, num_tokens: int, count_tokens: needles.TokenCounter) -> list[Example]:
    """`count` needles of about `num_tokens` tokens, languages alternating."""
    rng = Random(f"needles-{seed}")
    return [needles.build_needle(rng, ("en", "zh")[i % 2], num_tokens, count_tokens) for i in range(count)]


def held_out_prompts(questions: list[Example]) -> frozenset[str]:
    """Prompts that training must reject; finite facts repeat by nature and stay allowed."""
    return frozenset(q.prompt for q in questions if q.category not in FACT_CATEGORIES)


def write_questions(questions: list[Example], path: Path) -> None:
    """One JSON object per line."""
    rows = [{"prompt": q.prompt, "answer": q.answer, "category": q.category, "language": q.language} for q in questions]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_questions(path: Path) -> list[Example]:
    """What `write_questions` wrote; the steps are not stored."""
    return [Example(**json.loads(line)) for line in path.read_text().splitlines()]


def _draw(
    rng: Random, generator: Callable[[Random], Example], language: str, count: int, into: dict[str, Example]
) -> None:
    """Adds `count` new questions of one language."""
    wanted = len(into) + count
    while len(into) < wanted:
        example = generator(rng)
        if example.language == language:
            into.setdefault(example.prompt, example)
