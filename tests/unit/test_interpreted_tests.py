"""Tests of kernels that need a card, or Triton's interpreter in its place: ``make test`` interprets all of them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_interpreter_can_run_is_run_in_it() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (patterns,) = re.findall(r"TRITON_INTERPRET=1 .*?pytest .*?((?: tests/\S+)+)$", makefile, re.MULTILINE)
    interpreted = {path for pattern in patterns.split() for path in ROOT.glob(pattern)}
    able = {
        path
        for path in (ROOT / "tests" / "kernels").glob("test_*.py")
        if "IS_INTERPRETED" in path.read_text(encoding="utf-8")
    }
    assert able and able <= interpreted
