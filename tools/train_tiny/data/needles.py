"""Needle questions: one fact hidden in a long text of other facts and filler, asked for at the end.

Standard library only, so that the engine's validation can build as many as it likes.
Invariant: the asked key occurs in exactly one needle of its text.
"""

from collections.abc import Callable
from random import Random

from tools.train_tiny.data import needle_words
from tools.train_tiny.data.example import Example, pick_language

TokenCounter = Callable[[list[str]], list[int]]  # texts -> number of tokens of each
PROMPT_OVERHEAD = 40  # tokens of the instruction, the question and the chat markers
MAX_TRAINING_TOKENS = 2160

# kind -> (fact, question); {k} is the key, {v} the value
_KINDS = {
    "en": {
        "code": ("The access code of the {k} is {v}.", "What is the access code of the {k}?"),
        "phone": ("The room number of {k} is {v}.", "What is the room number of {k}?"),
        "spot": ("The {k} is hidden in the {v}.", "Where is the {k} hidden?"),
        "fruit": ("The favorite fruit of {k} is {v}.", "What is the favorite fruit of {k}?"),
    },
    "zh": {
        "code": ("{k}的密码是{v}。", "{k}的密码是多少？"),
        "phone": ("{k}的房间号是{v}。", "{k}的房间号是多少？"),
        "spot": ("{k}藏在{v}。", "{k}藏在哪里？"),
        "fruit": ("{k}最喜欢的水果是{v}。", "{k}最喜欢的水果是什么？"),
    },
}
_FRAMES = {
    "en": (
        "Read the text and answer the question.\n\n{text}\n\nQuestion: {question}",
        "{text}\n\n{question}",
        "Here is a text:\n{text}\n\nAnswer from the text: {question}",
    ),
    "zh": (
        "阅读下面的文字，回答问题。\n\n{text}\n\n问题：{question}",
        "{text}\n\n{question}",
        "下面是一段文字：\n{text}\n\n请根据文字回答：{question}",
    ),
}


def sample_turns(rng: Random, count_tokens: TokenCounter) -> tuple[Example, ...]:
    """One text of a random length with one to four questions; only the first prompt holds the text."""
    low, high = rng.choices(((64, 256), (256, 640), (640, 1280), (1280, MAX_TRAINING_TOKENS)), weights=(4, 4, 3, 3))[0]
    return _build(rng, pick_language(rng), rng.randint(low, high), count_tokens, rng.choice((1, 2, 4)))


def build_needle(rng: Random, language: str, num_tokens: int, count_tokens: TokenCounter) -> Example:
    """A question whose encoded prompt has at most `num_tokens` tokens, and nearly as many."""
    return _build(rng, language, num_tokens, count_tokens, 1)[0]


def _build(
    rng: Random, language: str, num_tokens: int, count_tokens: TokenCounter, max_questions: int
) -> tuple[Example, ...]:
    kind = rng.choice(tuple(_KINDS[language]))
    facts = _draw_facts(rng, language, kind, rng.randint(2, 8))
    fact_form, question_form = _KINDS[language][kind]
    needles = [fact_form.format(k=k, v=v) for k, v in facts]
    others = _other_facts(rng, language, kind, rng.randint(0, 4))
    sentences = _fit(rng, needles + others, language, num_tokens - PROMPT_OVERHEAD, count_tokens)
    text = (" " if language == "en" else "").join(sentences)
    kept = [fact for fact, needle in zip(facts, needles, strict=True) if needle in sentences]
    turns = []
    for key, value in kept[:max_questions]:
        prompt = question_form.format(k=key)
        if not turns:
            prompt = rng.choice(_FRAMES[language]).format(text=text, question=prompt)
        turns.append(Example(prompt=prompt, answer=value, category="needle", language=language))
    return tuple(turns)


def filler_text(rng: Random, language: str, num_tokens: int, count_tokens: TokenCounter) -> str:
    """Filler sentences of about `num_tokens` tokens."""
    return (" " if language == "en" else "").join(_fit(rng, [], language, num_tokens, count_tokens))


def _draw_facts(rng: Random, language: str, kind: str, count: int) -> list[tuple[str, str]]:
    """`count` (key, value) pairs of one kind with distinct keys and distinct values."""
    keys = rng.sample(_all_keys(language, kind), count)
    if kind == "code":
        values = [str(v) for v in rng.sample(range(10000, 100000), count)]
    elif kind == "phone":
        values = [str(v) for v in rng.sample(range(100, 1000), count)]
    else:
        values = rng.sample(needle_words.SPOTS[language] if kind == "spot" else needle_words.LIKES[language], count)
    return list(zip(keys, values, strict=True))


def _all_keys(language: str, kind: str) -> list[str]:
    if kind in ("phone", "fruit"):
        return needle_words.NAMES[language]
    nouns = needle_words.PLACES[language] if kind == "code" else needle_words.OBJECTS[language]
    joint = " " if language == "en" else ""
    return [f"{color}{joint}{noun}" for color in needle_words.COLORS[language] for noun in nouns]


def _other_facts(rng: Random, language: str, kind: str, count: int) -> list[str]:
    """Facts of other kinds, so that the kind of question matters."""
    kinds = [k for k in _KINDS[language] if k != kind]
    lines = []
    for _ in range(count):
        other = rng.choice(kinds)
        key, value = _draw_facts(rng, language, other, 1)[0]
        lines.append(_KINDS[language][other][0].format(k=key, v=value))
    return lines


def _filler_sentence(rng: Random, language: str) -> str:
    name, other = rng.sample(needle_words.NAMES[language], 2)
    return rng.choice(needle_words.FILLER[language]).format(
        name=name,
        other=other,
        day=rng.choice(needle_words.DAYS[language]),
        place=rng.choice(needle_words.PLACES[language]),
        color=rng.choice(needle_words.COLORS[language]),
        n=rng.randint(2, 60),
        h=rng.randint(6, 11),
    )


def _fit(rng: Random, needles: list[str], language: str, budget: int, count_tokens: TokenCounter) -> list[str]:
    """The needles among as many filler sentences as fit; the first needle is always kept."""
    kept, used = [], 0
    for sentence, count in zip(needles, count_tokens(needles) if needles else [], strict=True):
        if not kept or used + count <= budget:
            kept.append(sentence)
            used += count
    filler: list[str] = []
    while used < budget:
        drawn = [_filler_sentence(rng, language) for _ in range(32)]
        for sentence, count in zip(drawn, count_tokens(drawn), strict=True):
            if used + count > budget:
                used = budget
                break
            filler.append(sentence)
            used += count
    for needle in kept:
        filler.insert(rng.randint(0, len(filler)), needle)
    return filler
