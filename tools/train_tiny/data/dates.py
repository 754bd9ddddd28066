"""Calendar questions: weekdays, days later, leap years, month lengths and clock times.

Weekdays are only asked relative to a given one. Invariant: every answer agrees with `datetime`.
"""

from datetime import date, timedelta
from random import Random

from tools.train_tiny.data.example import Example, pick_language

WEEKDAYS = {
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "zh": ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"),
}
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December")  # fmt: skip


def sample(rng: Random) -> Example:
    """One calendar question."""
    kinds = (_weekday_after, _leap_year, _date_after, _days_between, _month_length, _clock_after)
    return rng.choices(kinds, weights=(3, 2, 3, 2, 1, 2))[0](rng, pick_language(rng))


def _weekday_after(rng: Random, language: str) -> Example:
    start, days = rng.randrange(7), rng.randint(1, rng.choice((10, 60, 400)))
    forward = rng.random() < 0.7
    names = WEEKDAYS[language]
    rest = days % 7
    answer = names[(start + (days if forward else -days)) % 7]
    if language == "en":
        verb = f"will it be in {days} days" if forward else f"was it {days} days ago"
        prompt = f"Today is {names[start]}. What day of the week {verb}?"
        last = f"{rest} days {'after' if forward else 'before'} {names[start]} is {answer}."
    else:
        prompt = f"今天是{names[start]}，{days}天{'后' if forward else '前'}是星期几？"
        last = f"{names[start]}的{rest}天{'后' if forward else '前'}是{answer}。"
    lines = [f"7*{days // 7}={days - rest}", f"{days}-{days - rest}={rest}", last]
    return _build(prompt, lines, answer, language)


def _leap_year(rng: Random, language: str) -> Example:
    year = rng.choice((rng.randint(1600, 2400), 100 * rng.randint(16, 24)))
    divisor = 400 if year % 400 == 0 else 100 if year % 100 == 0 else 4
    is_leap = (year % 4 == 0 and year % 100 != 0) or year % 400 == 0
    rest = year % 100 % 4
    if language == "en":
        prompt = rng.choice(("Is {} a leap year?", "Was the year {} a leap year or not?")).format(year)
        rule = f"{year} is divisible by {divisor}." if divisor != 4 or rest == 0 else f"{year % 100}/4 leaves {rest}."
        return _build(prompt, [rule], "Yes" if is_leap else "No", language)
    prompt = rng.choice(("{}年是闰年吗？", "请问{}年是不是闰年？")).format(year)
    rule = f"{year}能被{divisor}整除。" if divisor != 4 or rest == 0 else f"{year % 100}除以4余{rest}。"
    return _build(prompt, [rule], "是" if is_leap else "不是", language)


def _date_after(rng: Random, language: str) -> Example:
    """A date plus up to 60 days, month by month."""
    start = date(rng.randint(1990, 2035), 1, 1) + timedelta(days=rng.randrange(365))
    days = rng.randint(1, 60)
    end = start + timedelta(days=days)
    day, year, month = start.day + days, start.year, start.month
    lines = [f"{start.day}+{days}={day}"]
    while day > _month_days(year, month):
        length = _month_days(year, month)
        lines.append(f"{day}-{length}={day - length}")
        day, year, month = day - length, year + month // 12, month % 12 + 1
    if language == "en":
        prompt = f"What date is {days} days after {MONTHS[start.month - 1]} {start.day}, {start.year}?"
        return _build(prompt, lines, f"{MONTHS[end.month - 1]} {end.day}, {end.year}", language)
    prompt = f"{start.year}年{start.month}月{start.day}日之后{days}天是哪一天？"
    return _build(prompt, lines, f"{end.year}年{end.month}月{end.day}日", language)


def _days_between(rng: Random, language: str) -> Example:
    """Two dates of one month or of neighbouring months."""
    start = date(rng.randint(1990, 2035), rng.randint(1, 11), rng.randint(1, 28))
    end = start + timedelta(days=rng.randint(1, 28))
    answer = (end - start).days
    if start.month == end.month:
        lines = [f"{end.day}-{start.day}={answer}"]
    else:
        length = _month_days(start.year, start.month)
        lines = [f"{length}-{start.day}={length - start.day}", f"{length - start.day}+{end.day}={answer}"]
    if language == "en":
        first, second = (f"{MONTHS[d.month - 1]} {d.day}" for d in (start, end))
        return _build(f"In {start.year}, how many days are there from {first} to {second}?", lines, str(answer), "en")
    prompt = f"{start.year}年{start.month}月{start.day}日到{end.month}月{end.day}日相隔多少天？"
    return _build(prompt, lines, str(answer), "zh")


def _month_length(rng: Random, language: str) -> Example:
    year, month = rng.randint(1990, 2040), rng.randint(1, 12)
    prompt = (
        f"How many days does {MONTHS[month - 1]} {year} have?" if language == "en" else f"{year}年{month}月有多少天？"
    )
    return _build(prompt, [], str(_month_days(year, month)), language)


def _clock_after(rng: Random, language: str) -> Example:
    hour, minute, added = rng.randrange(24), rng.randrange(60), rng.randint(5, 240)
    hours, minutes = divmod(minute + added, 60)
    answer = f"{(hour + hours) % 24:02d}:{minutes:02d}"
    lines = [
        f"{minute}+{added}={minute + added}",
        f"{minute + added}-60*{hours}={minutes}",
        f"{hour}+{hours}={hour + hours}",
    ]
    prompt = (
        f"It is {hour:02d}:{minute:02d} now. What time will it be in {added} minutes?"
        if language == "en"
        else f"现在是{hour:02d}:{minute:02d}，{added}分钟后是几点？"
    )
    return _build(prompt, lines, answer, language)


def _month_days(year: int, month: int) -> int:
    first = date(year, month, 1)
    return (date(year + month // 12, month % 12 + 1, 1) - first).days


def _build(prompt: str, lines: list[str], answer: str, language: str) -> Example:
    steps = "\n".join(lines)
    return Example(prompt=prompt, steps=steps, answer=answer, category="dates", language=language)
