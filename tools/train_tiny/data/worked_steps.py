"""Worked long multiplication and division, shared by every domain that needs them.

Does not parse text. Invariant: every equation written here is true.
"""

from collections.abc import Sequence


def significant_digits(value: int) -> int:
    """Digits left after trailing zeros are dropped: 1200 -> 2."""
    return len(str(abs(value)).rstrip("0")) or 1


def place_parts(value: int) -> list[int]:
    """The non-zero decimal places of a positive integer: 305 -> [300, 5]."""
    digits = str(value)
    return [int(d) * 10 ** (len(digits) - 1 - i) for i, d in enumerate(digits) if d != "0"]


def needs_multiply_steps(left: int, right: int) -> bool:
    """True when a product is too hard to write down at once."""
    small, large = sorted((significant_digits(left), significant_digits(right)))
    return small >= 2 or (small == 1 and large >= 4)


def multiply_steps(left: int, right: int) -> list[str]:
    """Partial products and their running sum; [] when the product is easy."""
    if not needs_multiply_steps(left, right):
        return []
    if significant_digits(left) < significant_digits(right):
        left, right = right, left
    parts = place_parts(right)
    if len(parts) == 1:
        left, parts = right, place_parts(left)
    lines = [f"{left}*{part}={left * part}" for part in parts]
    total = left * parts[0]
    for part in parts[1:]:
        lines.append(f"{total}+{left * part}={total + left * part}")
        total += left * part
    return lines


def needs_divide_steps(dividend: int, divisor: int) -> bool:
    """True when a quotient is too hard to write down at once."""
    quotient = dividend // divisor
    digits = significant_digits(quotient)
    return (digits >= 2 and significant_digits(divisor) >= 2) or (digits >= 3 and divisor > 2)


def divide_steps(dividend: int, divisor: int) -> list[str]:
    """Long division by decimal places, down to the remainder; [] when the quotient is easy."""
    if not needs_divide_steps(dividend, divisor):
        return []
    lines, rest = [], dividend
    for part in place_parts(dividend // divisor):
        lines.append(f"{divisor}*{part}={divisor * part}")
        lines.append(f"{rest}-{divisor * part}={rest - divisor * part}")
        rest -= divisor * part
    return lines


def multiply_lines(left: int, right: int) -> list[str]:
    """All lines of a product, the plain equation last."""
    return [*multiply_steps(left, right), f"{left}*{right}={left * right}"]


def divide_lines(dividend: int, divisor: int) -> list[str]:
    """All lines of an exact division, the plain equation last."""
    assert dividend % divisor == 0, (dividend, divisor)
    return [*divide_steps(dividend, divisor), f"{dividend}/{divisor}={dividend // divisor}"]


def sum_lines(values: Sequence[int]) -> list[str]:
    """A running sum, one addition per line."""
    lines, total = [], values[0]
    for value in values[1:]:
        lines.append(f"{total}+{value}={total + value}")
        total += value
    return lines
