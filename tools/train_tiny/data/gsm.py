"""Grade-school word problems: reasoning-gym's `gsm_symbolic` templates with its worked answers, made easier to follow.

Hard products and quotients inside a worked answer get long-hand lines before them; nothing else is changed.
Invariant: item seeds at or above `HELD_OUT_SEED` are never drawn by `sample`.
"""

import re
from collections.abc import Callable
from decimal import Decimal
from functools import cache
from random import Random

from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import GSMSymbolicDataset, GSMSymbolicDatasetConfig, tasks_ok

from tools.train_tiny.data.example import Example
from tools.train_tiny.data.worked_steps import divide_steps, multiply_steps

HELD_OUT_SEED = 10**12  # seeds from here on belong to the questions
PROMPT_SUFFIX = " Give the result as your final answer. Do not include units."
_MAX_DECIMALS = 3  # longer fractions are left as they are
_NUMBER = r"(\d[\d,]*(?:\.\d+)?)"
_UNIT = r"(?:/[A-Za-z]\w*)?(?:\s+[A-Za-z][\w\s/-]*?)?"  # 155/day, 28 days/month
_PRODUCT = re.compile(rf"{_NUMBER}{_UNIT}\s*[*x×]\s*[$£€]?{_NUMBER}(/100)?")
_QUOTIENT = re.compile(rf"{_NUMBER}{_UNIT}\s*[/÷]\s*[$£€]?{_NUMBER}{_UNIT}\s*=\s*[$£€]?{_NUMBER}")
_RATIO = re.compile(r"(\d+)/(\d+)\*(\d+) = ")
_TERM = rf"[$£€]?{_NUMBER.replace('(', '(?:', 1)}{_UNIT}"
_SUM = re.compile(rf"({_TERM}(?:\s*[+-]\s*{_TERM}){{2,}})\s*=\s*[$£€]?{_NUMBER}")
_SIGNED = re.compile(rf"([+-]?)\s*[$£€]?{_NUMBER}")
_PRODUCT_SUM = re.compile(rf"{_NUMBER} \* {_NUMBER} \+ {_NUMBER} = ")


def sample(rng: Random) -> Example:
    """One training problem."""
    return build_example(rng.randrange(HELD_OUT_SEED))


def build_example(item_seed: int) -> Example:
    """The problem of one item seed: the seed picks both the template and its numbers."""
    rng = Random(item_seed)
    template = rng.choice(tasks_ok)
    item = _templates()[template](rng, 1.0)
    answer = _drop_zero_fraction(str(item["answer"]))
    steps = _drop_zero_fraction(item["metadata"]["answer_cot"]).rsplit("####", 1)[0].strip()
    steps = _fix_email_step(steps, item["metadata"]["variables"])
    return Example(
        prompt=item["question"] + PROMPT_SUFFIX,
        answer=answer,
        steps=add_long_hand(steps),
        category="gsm",
        language="en",
    )


def add_long_hand(steps: str) -> str:
    """Puts long-hand lines before every line that holds a hard product or quotient."""
    lines: list[str] = []
    for line in steps.split("\n"):
        lines += _long_hand(line)
        lines.append(line)
    return "\n".join(lines)


@cache
def _templates() -> dict[int, Callable]:
    """reasoning-gym's template functions by number."""
    return GSMSymbolicDataset(GSMSymbolicDatasetConfig(seed=0, size=1)).generators


def _long_hand(line: str) -> list[str]:
    """Long-hand lines for the hard operations of one line."""
    lines: list[str] = []
    ratio = _RATIO.search(line)
    if ratio:
        return _ratio_lines(*map(int, ratio.groups()))
    for left, right, percent in _PRODUCT.findall(line):
        if _decimals(left) > _MAX_DECIMALS or _decimals(right) > _MAX_DECIMALS:
            continue
        steps = multiply_steps(_scaled_int(left), _scaled_int(right))
        if percent and steps:
            steps.append(f"{_scaled_int(left)}*{_scaled_int(right)}={_scaled_int(left) * _scaled_int(right)}")
        lines += steps
    for left, right, result in _QUOTIENT.findall(line):
        lines += _quotient_lines(left, right, result)
    for left, right, _ in _PRODUCT_SUM.findall(line):
        lines.append(f"{left}*{right}={format(Decimal(left) * Decimal(right), 'f').rstrip('0').rstrip('.')}")
    for terms, result in _SUM.findall(line):
        lines += _running_sum(terms, result)
    return lines


def _ratio_lines(part: int, whole: int, total: int) -> list[str]:
    """part / whole * total, the division first."""
    if total % whole:
        return []
    share = total // whole
    return [*divide_steps(total, whole), f"{total}/{whole}={share}", *multiply_steps(part, share)]


def _quotient_lines(left: str, right: str, result: str) -> list[str]:
    """Long division of an exact quotient, decimals scaled to integers first."""
    dividend, divisor, quotient = (Decimal(_plain(t)) for t in (left, right, result))
    if dividend != divisor * quotient or quotient != int(quotient):
        return []
    scale = 10 ** max(_decimals(left), _decimals(right))
    whole = (int(dividend * scale), int(divisor * scale))
    lines = divide_steps(*whole)
    return [*lines, f"{whole[0]}/{whole[1]}={int(quotient)}"] if lines and scale > 1 else lines


def _running_sum(terms: str, result: str) -> list[str]:
    """One line per addition of a sum of three or more integers."""
    signed = [(sign, _plain(number)) for sign, number in _SIGNED.findall(terms)]
    if any("." in number for _, number in signed):
        return []
    total, lines = int(signed[0][1]), []
    for sign, number in signed[1:]:
        after = total - int(number) if sign == "-" else total + int(number)
        lines.append(f"{total}{sign}{number}={after}")
        total = after
    return lines if _plain(result) == str(total) and all(sign for sign, _ in signed[1:]) else []


def _decimals(number: str) -> int:
    return len(number.partition(".")[2])


def _plain(number: str) -> str:
    return number.replace(",", "")


def _scaled_int(number: str) -> int:
    """The digits of a decimal as an integer: 2.75 -> 275, 0.4 -> 4, 12.50 -> 125."""
    plain = _plain(number)
    if "." in plain:
        plain = plain.rstrip("0").replace(".", "")
    return int(plain or "0")


def _drop_zero_fraction(text: str) -> str:
    return re.sub(r"(?<=\d)\.0(?!\d)", "", text)


def _fix_email_step(steps: str, variables: dict) -> str:
    """One template hides its percentage behind an identity such as 48=48; write the product instead."""
    if "no_response_percent" not in variables:
        return steps
    value = variables["no_response"]
    product = f"{variables['num_emails']}*{variables['no_response_percent']}/100={value}"
    return steps.replace(f"{value}={value}", product, 1)
