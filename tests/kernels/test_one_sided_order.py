"""What other cards may see of a put, and when: the order of the compiled instructions, read without a card."""

import re

import pytest

triton = pytest.importorskip("triton")

from tests.helpers.compiled import Kernel, compile_to_ptx  # noqa: E402 - after the check that there is a Triton
from tests.helpers.compiled.one_sided import KERNELS  # noqa: E402

ROW_STORE = r"st\.global\.v4"
BARRIER = r"bar\.sync"
COUNT = r"atom\.global\.sys\.acq_rel\.add"
SET_FLAG = r"atom\.global\.sys\.release\.exch"
LOOK = r"ld\.volatile\.global"
TAKE_FLAG = r"(?:atom|ld)\.global\.sys\.acquire"


def read_order(kernel: Kernel, patterns: dict[str, str]) -> list[str]:
    """Names of the instructions, as they stand; neighbours of one name once."""
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter compiles nothing")
    names: list[str] = []
    for line in compile_to_ptx(kernel).splitlines():
        for name, pattern in patterns.items():
            if re.search(pattern, line) and names[-1:] != [name]:
                names.append(name)
    return names


@pytest.mark.parametrize("name", ["_put_tokens_kernel", "_put_sums_kernel"])
def test_flags_are_set_behind_all_rows_of_all_programs(name: str) -> None:
    kernel = next(each for each in KERNELS if each.name.endswith(name))
    order = read_order(kernel, {"rows": ROW_STORE, "barrier": BARRIER, "count": COUNT, "flag": SET_FLAG})
    assert order == ["rows", "barrier", "count", "barrier", "flag"]


def test_a_wait_ends_behind_all_flags() -> None:
    """Looks exchange nothing between threads, which may see different flags; who reads rows is launched later."""
    kernel = next(each for each in KERNELS if each.name.endswith("_wait_kernel"))
    order = read_order(kernel, {"look": LOOK, "take": TAKE_FLAG, "barrier": BARRIER})
    assert order == ["look", "take", "barrier"]
