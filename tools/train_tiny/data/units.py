"""Unit conversion in English and Chinese: metric, time, money, weights, temperature.

Integer factors only. Invariant: the answer is a bare number in the unit asked for.
"""

from random import Random

from tools.train_tiny.data.example import Example, pick_language
from tools.train_tiny.data.worked_steps import divide_lines, multiply_lines

# big unit, small unit, factor
_UNITS = {
    "en": (
        ("kilometers", "meters", 1000),
        ("meters", "centimeters", 100),
        ("centimeters", "millimeters", 10),
        ("kilograms", "grams", 1000),
        ("tons", "kilograms", 1000),
        ("liters", "milliliters", 1000),
        ("hours", "minutes", 60),
        ("minutes", "seconds", 60),
        ("days", "hours", 24),
        ("weeks", "days", 7),
        ("years", "months", 12),
        ("dozens", "items", 12),
        ("feet", "inches", 12),
        ("yards", "feet", 3),
        ("pounds", "ounces", 16),
        ("dollars", "cents", 100),
        ("centuries", "years", 100),
        ("square meters", "square decimeters", 100),
        ("gigabytes", "megabytes", 1024),
    ),
    "zh": (
        ("千米", "米", 1000),
        ("米", "厘米", 100),
        ("厘米", "毫米", 10),
        ("千克", "克", 1000),
        ("吨", "千克", 1000),
        ("升", "毫升", 1000),
        ("小时", "分钟", 60),
        ("分钟", "秒", 60),
        ("天", "小时", 24),
        ("星期", "天", 7),
        ("年", "个月", 12),
        ("斤", "克", 500),
        ("公斤", "斤", 2),
        ("斤", "两", 10),
        ("元", "角", 10),
        ("元", "分", 100),
        ("公里", "里", 2),
        ("世纪", "年", 100),
        ("公顷", "平方米", 10000),
        ("打", "个", 12),
    ),
}
_ASK = {
    "en": ("How many {1} are in {0}?", "Convert {0} to {1}.", "{0} equals how many {1}?"),
    "zh": ("{0}等于多少{1}？", "把{0}换算成{1}。", "{0}是多少{1}？"),
}


def sample(rng: Random) -> Example:
    """One conversion."""
    language = pick_language(rng)
    return _temperature(rng, language) if rng.random() < 0.12 else _convert(rng, language)


def _convert(rng: Random, language: str) -> Example:
    big, small, factor = rng.choice(_UNITS[language])
    count = rng.randint(2, rng.choice((20, 100, 400)))
    total = count * factor
    space = " " if language == "en" else ""
    if rng.random() < 0.6:
        quantity, target, lines, answer = f"{count}{space}{big}", small, multiply_lines(count, factor), total
    else:
        quantity, target, lines, answer = f"{total}{space}{small}", big, divide_lines(total, factor), count
    return _build(rng.choice(_ASK[language]).format(quantity, target), lines, answer, language)


def _temperature(rng: Random, language: str) -> Example:
    celsius = 5 * rng.randint(-8, 40)
    fahrenheit = celsius * 9 // 5 + 32
    if rng.random() < 0.5:
        lines = [
            f"{celsius}/5={celsius // 5}",
            f"{celsius // 5}*9={celsius // 5 * 9}",
            f"{celsius // 5 * 9}+32={fahrenheit}",
        ]
        prompt = (
            f"Convert {celsius} degrees Celsius to Fahrenheit."
            if language == "en"
            else f"{celsius}摄氏度等于多少华氏度？"
        )
        return _build(prompt, lines, fahrenheit, language)
    lines = [f"{fahrenheit}-32={fahrenheit - 32}", f"{fahrenheit - 32}/9={celsius // 5}", f"{celsius // 5}*5={celsius}"]
    prompt = (
        f"Convert {fahrenheit} degrees Fahrenheit to Celsius."
        if language == "en"
        else f"{fahrenheit}华氏度等于多少摄氏度？"
    )
    return _build(prompt, lines, celsius, language)


def _build(prompt: str, lines: list[str], answer: int, language: str) -> Example:
    return Example(prompt=prompt, steps="\n".join(lines), answer=str(answer), category="units", language=language)
