"""Draws conversations from all domains. Needs the `train` extra, as two domains use its packages.

Does not tokenise. Invariant: no conversation holds a held-out prompt.
"""

from collections.abc import Callable
from dataclasses import replace
from random import Random

from tools.train_tiny.data import (
    arithmetic,
    compare,
    dates,
    facts,
    greetings,
    gsm,
    needles,
    poems,
    units,
    word_problems_zh,
)
from tools.train_tiny.data.conversation import Conversation, MixtureConfig
from tools.train_tiny.data.example import Example
from tools.train_tiny.data.needles import TokenCounter

Generator = Callable[[Random], Example]
# the domains that examples are drawn from; needles are drawn apart because they need a tokenizer
DOMAINS: tuple[Generator, ...] = (
    gsm.sample, word_problems_zh.sample, arithmetic.sample, compare.sample, dates.sample, units.sample,
    facts.sample_capital, facts.sample_translation, poems.sample, greetings.sample, arithmetic.sample_drill,
)  # fmt: skip
# categories whose prompts are finite facts: they repeat in training by nature
FACT_CATEGORIES = frozenset({"capitals", "translation", "poems", "greetings"})
_SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a careful calculator.",
    "你是一个有帮助的助手。",
    "请认真计算。",
)
_CONTEXT_FRAMES = {
    "en": "Here are some notes.\n{text}\n\nNow answer this question: {question}",
    "zh": "下面是一些笔记。\n{text}\n\n现在请回答：{question}",
}


def sample_conversation(
    rng: Random, config: MixtureConfig, count_tokens: TokenCounter, held_out: frozenset[str]
) -> Conversation:
    """One conversation of the mixture."""
    if rng.random() < config.needle_share:
        return Conversation(turns=needles.sample_turns(rng, count_tokens))
    system = rng.choice(_SYSTEM_TEXTS) if rng.random() < config.system_share else ""
    first = sample_example(rng, config, held_out)
    draw = rng.random()
    if draw < config.long_context_share:
        return Conversation(turns=(_after_long_context(rng, first, count_tokens),), system=system)
    if draw < config.long_context_share + config.multi_turn_share:
        turns = tuple(sample_example(rng, config, held_out) for _ in range(rng.randint(1, 2)))
        return Conversation(turns=(first, *turns), system=system)
    return Conversation(turns=(first,), system=system, is_thinking=rng.random() < config.thinking_share)


def sample_example(rng: Random, config: MixtureConfig, held_out: frozenset[str]) -> Example:
    """One example whose prompt is not held out."""
    while True:
        example = rng.choices(DOMAINS, weights=config.domain_weights)[0](rng)
        if example.prompt not in held_out:
            return example


def _after_long_context(rng: Random, example: Example, count_tokens: TokenCounter) -> Example:
    text = needles.filler_text(rng, example.language, rng.choice((100, 300, 700, 1500)), count_tokens)
    prompt = _CONTEXT_FRAMES[example.language].format(text=text, question=example.prompt)
    return replace(example, prompt=prompt)
