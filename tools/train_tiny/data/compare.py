"""Which number is larger, the extremes of a list, sorting, and parity.

Answers directly, without steps. Invariant: ties never occur.
"""

from random import Random

from tools.train_tiny.data.example import Example, pick_language

_PAIR = {
    "en": {
        True: ("Which is larger, {} or {}?", "Which number is greater: {} or {}?"),
        False: ("Which is smaller, {} or {}?", "Which number is less: {} or {}?"),
    },
    "zh": {True: ("{}和{}哪个大？", "{}与{}，哪个数更大？"), False: ("{}和{}哪个小？", "{}与{}，哪个数更小？")},
}
_LIST = {
    "en": {
        "max": "What is the largest number in {}?",
        "min": "What is the smallest number in {}?",
        "up": "Sort {} in ascending order.",
        "down": "Sort {} in descending order.",
    },
    "zh": {
        "max": "{}中最大的数是多少？",
        "min": "{}中最小的数是多少？",
        "up": "把{}从小到大排列。",
        "down": "把{}从大到小排列。",
    },
}
_PARITY = {
    "en": ("Is {} even or odd?", "even", "odd"),
    "zh": ("{}是奇数还是偶数？", "偶数", "奇数"),
}


def sample(rng: Random) -> Example:
    """One comparison."""
    language = pick_language(rng)
    return rng.choices((_pair, _list, _parity), weights=(4, 4, 1))[0](rng, language)


def _pair(rng: Random, language: str) -> Example:
    draw = _decimal if rng.random() < 0.35 else _near_integer
    left = draw(rng, None)
    right = draw(rng, left)
    wants_larger = rng.random() < 0.6
    answer = max(left, right, key=float) if wants_larger else min(left, right, key=float)
    return _build(rng.choice(_PAIR[language][wants_larger]).format(left, right), answer, language)


def _near_integer(rng: Random, other: str | None) -> str:
    """An integer; given another one, often close to it and never equal."""
    digits = rng.randint(1, 5)
    value = rng.randint(10 ** (digits - 1), 10**digits - 1)
    if other is not None and rng.random() < 0.6:
        value = abs(int(other) + rng.choice((-1, 1)) * rng.choice((1, 2, 9, 10, 11, 90, 100)))
    if other is not None and value == int(other):
        value += 1
    return str(value)


def _decimal(rng: Random, other: str | None) -> str:
    """A decimal with one or two places; given another one, often with the same whole part."""
    whole = rng.randint(0, 30) if other is None or rng.random() < 0.3 else int(float(other))
    places = rng.randint(1, 2)
    text = f"{whole}.{rng.randint(1, 10**places - 1):0{places}d}"
    if other is not None and float(text) == float(other):
        return str(whole + 1) + text[text.index(".") :]
    return text


def _list(rng: Random, language: str) -> Example:
    top = rng.choice((30, 100, 1000))
    values = rng.sample(range(1, top), rng.randint(3, 6))
    kind = rng.choice(("max", "min", "up", "down"))
    separator = ", " if language == "en" else "、"
    ordered = sorted(values, reverse=kind == "down")
    answer = {"max": str(max(values)), "min": str(min(values))}.get(kind, separator.join(map(str, ordered)))
    return _build(_LIST[language][kind].format(separator.join(map(str, values))), answer, language)


def _parity(rng: Random, language: str) -> Example:
    value = rng.randint(0, 10 ** rng.randint(1, 5))
    question, even, odd = _PARITY[language]
    return _build(question.format(value), odd if value % 2 else even, language)


def _build(prompt: str, answer: str, language: str) -> Example:
    return Example(prompt=prompt, answer=answer, category="compare", language=language)
