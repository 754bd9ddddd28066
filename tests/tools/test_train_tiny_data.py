"""The generators of the built-in model's training data: answers recomputed, held-out prompts never trained on."""

import re
from collections.abc import Callable
from datetime import date, timedelta
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest

from argosy.assets import builtin_model_directory, builtin_questions_file
from tools.train_tiny import chat
from tools.train_tiny.data import arithmetic, compare, dates, needles, poems, units, word_problems_zh
from tools.train_tiny.data.example import Example, extract_answer
from tools.train_tiny.data.worked_steps import divide_lines, multiply_lines
from tools.train_tiny.tokenizer import load_tokenizer, token_counter

EQUATION = re.compile(r"([\d.+*/-]*\d[\d.]*[+*/-][\d.+*/-]*\d)=(-?[\d.]+)")
OWN_GENERATORS = (arithmetic.sample, arithmetic.sample_drill, compare.sample, dates.sample, units.sample, poems.sample)


def draw(generator: Callable[[Random], Example], count: int = 400) -> list[Example]:
    rng = Random(7)
    return [generator(rng) for _ in range(count)]


def evaluate_exactly(expression: str) -> Fraction:
    """Value of an expression of numbers, + - * / and brackets, without rounding."""
    plain = expression.replace("×", "*").replace("÷", "/").replace(" ", "")
    exact = re.sub(r"\d+(?:\.\d+)?", lambda number: f"Fraction('{number.group()}')", plain)
    return eval(exact, {"Fraction": Fraction})  # noqa: S307 - our own generated digits and operators


@pytest.mark.parametrize(
    "generator", [*OWN_GENERATORS, word_problems_zh.sample], ids=lambda g: g.__module__.rsplit(".")[-1]
)
def test_every_equation_of_the_steps_is_true(generator):
    for example in draw(generator):
        for left, right in EQUATION.findall(example.steps):
            assert evaluate_exactly(left) == Fraction(right), (example.prompt, left, right)
        assert extract_answer(example.completion) == example.answer


def test_arithmetic_answers_equal_the_recomputed_expression():
    expression = re.compile(r"[(]?\d[\d\s+*×/÷()-]*[+*×/÷-][\d\s+*×/÷()-]*[\d)]")
    checked = 0
    for example in draw(arithmetic.sample):
        found = expression.search(example.prompt)
        if found:
            checked += 1
            assert evaluate_exactly(found.group()) == int(example.answer), example.prompt
    assert checked > 300


def test_chinese_word_problems_end_with_their_answer():
    rng = Random(3)
    for template in word_problems_zh.TEMPLATES:
        for _ in range(30):
            question, lines, answer = template(rng)
            assert re.search(r"=(-?\d+)\D*$", lines[-1]).group(1) == str(answer), question
            assert answer >= 0


def test_comparisons_name_the_extreme_number():
    for example in draw(compare.sample):
        numbers = re.findall(r"\d+(?:\.\d+)?", example.prompt)
        if re.search("largest|larger|greater|大？|最大", example.prompt):
            assert float(example.answer) == max(map(float, numbers))
        elif re.search("smallest|smaller|less:|小？|最小", example.prompt):
            assert float(example.answer) == min(map(float, numbers))


def test_dates_agree_with_the_calendar():
    later = re.compile(r"What date is (\d+) days after (\w+) (\d+), (\d+)\?")
    weekday = re.compile(r"Today is (\w+)\. What day of the week will it be in (\d+) days\?")
    for example in draw(dates.sample, 1500):
        if found := later.match(example.prompt):
            days, month, day, year = found.groups()
            end = date(int(year), dates.MONTHS.index(month) + 1, int(day)) + timedelta(days=int(days))
            assert example.answer == f"{dates.MONTHS[end.month - 1]} {end.day}, {end.year}"
        elif found := weekday.match(example.prompt):
            names = dates.WEEKDAYS["en"]
            assert example.answer == names[(names.index(found[1]) + int(found[2])) % 7]
        elif found := re.match(r"(\d+)年是闰年吗", example.prompt):
            year = int(found[1])
            assert (example.answer == "是") == ((year % 4 == 0 and year % 100 != 0) or year % 400 == 0)


def test_units_scale_by_one_factor_per_pair():
    for example in draw(units.sample):
        amount = int(re.search(r"-?\d+", example.prompt).group())
        small, large = sorted((amount, int(example.answer)), key=abs)
        is_temperature = re.search("Celsius|摄氏", example.prompt)
        assert is_temperature or large % small == 0


def test_poem_lines_belong_to_one_poem_only():
    lines = [line for poem in poems.POEMS for line in poem[2:]]
    assert len(lines) == len(set(lines)) == 4 * len(poems.POEMS)
    assert all(len(line) == len(poem[2]) for poem in poems.POEMS for line in poem[2:])


@pytest.mark.parametrize(("left", "right"), [(64, 12), (305, 47), (7, 8), (1200, 30), (99999, 7)])
def test_long_hand_ends_with_the_plain_equation(left, right):
    assert multiply_lines(left, right)[-1] == f"{left}*{right}={left * right}"
    assert divide_lines(left * right, right)[-1] == f"{left * right}/{right}={left}"


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("num_tokens", [256, 2048])
def test_needle_fits_its_length_and_holds_its_answer(language, num_tokens):
    tokenizer = load_tokenizer(builtin_model_directory("argosy-tiny"))
    rng = Random(1)
    for _ in range(5):
        example = needles.build_needle(rng, language, num_tokens, token_counter(tokenizer))
        length = len(tokenizer.encode(chat.render_prompt(example.prompt), add_special_tokens=False).ids)
        assert num_tokens * 0.75 < length <= num_tokens
        assert example.answer in example.prompt


def test_needles_do_not_need_the_training_extra():
    folder = Path(needles.__file__).parent
    source = "".join((folder / name).read_text() for name in ("needles.py", "needle_words.py", "example.py"))
    imported = set(re.findall(r"^(?:from|import) ([\w.]+)", source, flags=re.MULTILINE))
    assert not any(name.startswith(("reasoning_gym", "babel", "torch")) for name in imported)


def test_questions_hold_two_hundred_distinct_prompts():
    prompts = [line for line in builtin_questions_file().read_text(encoding="utf-8").splitlines() if line]
    assert len(set(prompts)) == len(prompts) == 200
