"""Sums, differences, products, quotients and chains, in English and Chinese, with long-hand lines where needed.

Integers only. Invariant: the last equation of the steps equals the answer.
"""

from random import Random

from tools.train_tiny.data.example import Example, pick_language
from tools.train_tiny.data.worked_steps import divide_lines, multiply_lines, sum_lines

_PHRASES = {
    "en": ("What is {}?", "Calculate {}.", "Compute {}", "{} = ?", "Please work out {}.", "How much is {}?"),
    "zh": ("{}等于多少？", "计算{}。", "请计算：{}", "{}=?", "求{}的值。", "算一算{}是多少？"),
}
_DRILL = {"en": "Work out each line and give the last result.", "zh": "逐行计算，并给出最后一行的结果。"}
_REMAINDER_PHRASES = {
    "en": ("What is the remainder when {} is divided by {}?", "Find the remainder of {} divided by {}."),
    "zh": ("{}除以{}的余数是多少？", "求{}除以{}的余数。"),
}


def sample(rng: Random) -> Example:
    """One calculation."""
    kinds = (_add, _subtract, _multiply, _divide, _chain, _long_sum, _remainder)
    return rng.choices(kinds, weights=(3, 3, 4, 3, 4, 1, 1))[0](rng, pick_language(rng))


def sample_drill(rng: Random) -> Example:
    """Several short calculations at once: the lines that worked answers are made of."""
    language = pick_language(rng)
    lines = [_drill_line(rng) for _ in range(rng.randint(3, 10))]
    prompt = _DRILL[language] + "\n" + "\n".join(line.partition("=")[0] for line in lines)
    answer = lines[-1].partition("=")[2]
    return Example(prompt=prompt, steps="\n".join(lines), answer=answer, category="arithmetic", language=language)


def _drill_line(rng: Random) -> str:
    left, right = _sized(rng, 4), _sized(rng, 4)
    kind = rng.random()
    if kind < 0.35:
        return f"{left}+{right}={left + right}"
    if kind < 0.7:
        return f"{max(left, right)}-{min(left, right)}={abs(left - right)}"
    if kind < 0.88:
        left, right = _sized(rng, 3), rng.randint(2, 12) * 10 ** rng.choice((0, 0, 1, 2))
        return f"{left}*{right}={left * right}"
    left, right = _sized(rng, 2), rng.randint(2, 12)
    return f"{left * right}/{right}={left}"


def _add(rng: Random, language: str) -> Example:
    left, right = _sized(rng, 5), _sized(rng, 5)
    return _ask(rng, language, f"{left}+{right}", [f"{left}+{right}={left + right}"], left + right)


def _subtract(rng: Random, language: str) -> Example:
    left, right = _sized(rng, 5), _sized(rng, 5)
    if rng.random() < 0.85:
        left, right = max(left, right), min(left, right)
    return _ask(rng, language, f"{left}-{right}", [f"{left}-{right}={left - right}"], left - right)


def _multiply(rng: Random, language: str) -> Example:
    left, right = _sized(rng, 3), _sized(rng, 3)
    return _ask(rng, language, f"{left}{rng.choice('*×')}{right}", multiply_lines(left, right), left * right)


def _divide(rng: Random, language: str) -> Example:
    divisor, quotient = max(1, _sized(rng, 2)), _sized(rng, 3)
    dividend = divisor * quotient
    return _ask(rng, language, f"{dividend}{rng.choice('/÷')}{divisor}", divide_lines(dividend, divisor), quotient)


def _long_sum(rng: Random, language: str) -> Example:
    values = [_sized(rng, 3) for _ in range(rng.randint(3, 6))]
    return _ask(rng, language, "+".join(map(str, values)), sum_lines(values), sum(values))


def _remainder(rng: Random, language: str) -> Example:
    divisor, dividend = rng.randint(2, 25), _sized(rng, 3)
    quotient, rest = divmod(dividend, divisor)
    lines = [f"{divisor}*{quotient}={divisor * quotient}", f"{dividend}-{divisor * quotient}={rest}"]
    prompt = rng.choice(_REMAINDER_PHRASES[language]).format(dividend, divisor)
    return Example(prompt=prompt, steps="\n".join(lines), answer=str(rest), category="arithmetic", language=language)


def _chain(rng: Random, language: str) -> Example:
    """Three or four small terms, products first, optionally one pair of brackets."""
    if rng.random() < 0.35:
        return _bracket_chain(rng, language)
    terms = [_term(rng) for _ in range(rng.randint(2, 3))]
    signs = ["+", *(rng.choice("+-") for _ in terms[1:])]
    lines = [line for text, value in terms if "*" in text for line in (f"{text}={value}",)]
    total = terms[0][1]
    for sign, (_, value) in zip(signs[1:], terms[1:], strict=True):
        result = total + value if sign == "+" else total - value
        lines.append(f"{total}{sign}{value}={result}")
        total = result
    expression = "".join(sign + text for sign, (text, _) in zip(signs, terms, strict=True))[1:]
    return _ask(rng, language, expression, lines, total)


def _bracket_chain(rng: Random, language: str) -> Example:
    left, right, factor = rng.randint(1, 60), rng.randint(1, 60), rng.randint(2, 12)
    sign = rng.choice("+-")
    inner = left + right if sign == "+" else left - right
    lines = [f"{left}{sign}{right}={inner}", f"{inner}*{factor}={inner * factor}"]
    expression = f"({left}{sign}{right})*{factor}"
    if rng.random() < 0.5:
        expression, lines[1] = f"{factor}*({left}{sign}{right})", f"{factor}*{inner}={inner * factor}"
    return _ask(rng, language, expression, lines, inner * factor)


def _term(rng: Random) -> tuple[str, int]:
    if rng.random() < 0.5:
        left, right = rng.randint(2, 20), rng.randint(2, 12)
        return f"{left}*{right}", left * right
    value = rng.randint(1, 200)
    return str(value), value


def _sized(rng: Random, max_digits: int) -> int:
    """A number whose count of digits is uniform in 1..max_digits."""
    digits = rng.randint(1, max_digits)
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


def _ask(rng: Random, language: str, expression: str, lines: list[str], answer: int) -> Example:
    if rng.random() < 0.3:
        expression = _spaced(expression)
    prompt = rng.choice(_PHRASES[language]).format(expression)
    return Example(prompt=prompt, steps="\n".join(lines), answer=str(answer), category="arithmetic", language=language)


def _spaced(expression: str) -> str:
    for symbol in "+-*×/÷":
        expression = expression.replace(symbol, f" {symbol} ")
    return expression
