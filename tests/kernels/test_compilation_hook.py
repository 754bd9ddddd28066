"""Triton's hook counts what is compiled, and leaves other hooks as they are. Needs Triton, and no card."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from argosy.kernels.compilations import LateCompilations

triton = pytest.importorskip("triton")

from argosy.kernels.triton.compilation_hook import watch_compilations  # noqa: E402 - after the check for Triton


@pytest.fixture(autouse=True)
def no_hook() -> Iterator[None]:
    previous = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = None
    yield
    triton.knobs.runtime.jit_cache_hook = previous


def compile_kernel(name: str, key: str) -> object:
    """What Triton does before it compiles, with the arguments of its versions 3.6 and 3.7."""
    hook = triton.knobs.runtime.jit_cache_hook
    return hook(
        key=key,
        repr=f"{name}[...]",
        fn=SimpleNamespace(module="kernels", name=name, jit_function=None),
        compile={"key": key},
        is_manual_warmup=False,
        already_compiled=False,
    )


def watch() -> tuple[LateCompilations, list[str]]:
    lines: list[str] = []
    counter = LateCompilations(lines.append)
    watch_compilations(counter)
    counter.start_counting()
    return counter, lines


def test_a_compilation_is_counted_and_takes_place() -> None:
    counter, lines = watch()
    assert not compile_kernel("norm", "[('i32', 'D')]")
    assert counter.num_compilations == 1
    assert "norm" in lines[0] and "('i32', 'D')" in lines[0]


def test_the_engine_that_was_built_last_counts() -> None:
    first, _ = watch()
    second, _ = watch()
    compile_kernel("norm", "i32")
    assert (first.num_compilations, second.num_compilations) == (0, 1)


def test_another_hook_still_decides() -> None:
    calls: list[str] = []

    def decide(*, key: str, **details: object) -> bool:
        calls.append(key)
        return True

    triton.knobs.runtime.jit_cache_hook = decide
    watch()
    counter, _ = watch()
    assert compile_kernel("norm", "i32") is True
    assert (calls, counter.num_compilations) == (["i32"], 1)


def test_triton_calls_the_hook_for_each_new_kind_of_arguments() -> None:
    """With Triton's own launch: on a card that is pretended, where nothing is compiled."""
    import torch

    if triton.knobs.runtime.interpret or torch.cuda.is_available():
        pytest.skip("needs a Triton that compiles, and no card")
    from argosy.kernels.triton.norms import silu_mul
    from tests.helpers.pretended_card import pretend_card

    with pretend_card() as launches:
        counter, _ = watch()
        silu_mul(torch.zeros(3, 64, dtype=torch.bfloat16))
        silu_mul(torch.zeros(3, 128, dtype=torch.bfloat16))
        silu_mul(torch.zeros(3, 30, dtype=torch.bfloat16))
    assert counter.num_compilations == 3
    assert len(launches.keys) == 2  # widths that 16 divides are of one kind
