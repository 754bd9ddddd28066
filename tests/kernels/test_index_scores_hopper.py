"""The index scores' loop for Hopper cards against the specification, and what it compiles to.

On such a card, or without one in an interpreter (``tests/helpers/gluon_interpreter.py``), at small sizes:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_index_scores_hopper.py
"""

from types import ModuleType

import pytest
import torch

from argosy.kernels import reference, reference_cache_rows
from argosy.kernels.reference_cache_rows import FP8, INT8, NumberFormat
from tests.helpers.gluon_interpreter import load_interpreted
from tests.kernels.test_indexer_triton import DEVICE, IS_INTERPRETED, assert_same, draw

# Requests whose tokens see part of a tile of keys, all of one and part of the next, or nothing; a last tile of tokens
# that is short, and numbers of tokens that are no multiple of a turn's.
VISIBLE = (
    (tuple(range(247, 270)), tuple(range(1, 24))),
    (tuple(range(505, 514)),),
    ((0, 600, 0, 0, 300, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0),),
)
DIM = 128  # of encoded keys: rows of 128 bytes
SHARED_BYTES = 232448  # what a program can have on a Hopper card
needs_device = pytest.mark.skipif(
    not IS_INTERPRETED and not torch.cuda.is_available(), reason="needs an NVIDIA card, or TRITON_INTERPRET=1"
)


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("triton")
    from argosy.kernels.triton import index_scores

    if IS_INTERPRETED:
        module = load_interpreted("argosy.kernels.triton.index_scores_hopper")
        monkeypatch.setattr(index_scores, "score_tokens_on_hopper", module.score_tokens_on_hopper)
    elif torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper card")
    return index_scores


@needs_device
@pytest.mark.parametrize("visible", VISIBLE, ids=lambda visible: f"{len(visible)}x{len(visible[0])}")
def test_scores(scorer: ModuleType, visible: tuple[tuple[int, ...], ...]) -> None:
    index_q, cache, weights, table, num_visible = draw(visible, torch.float32 if IS_INTERPRETED else torch.bfloat16)
    longest = max(map(max, visible))
    expected = reference.index_scores(index_q, reference.gather_cache(cache, table, longest), weights)
    tile = scorer.Tile(256, 16, 3, 4, is_hopper=True)
    scores = scorer.index_scores_paged(index_q, cache, weights, table, num_visible, longest, tile=tile)
    assert_same(scores, expected, num_visible, 3e-5)


@needs_device
@pytest.mark.parametrize("numbers", (INT8, FP8), ids=lambda numbers: str(numbers.dtype))
def test_scores_of_encoded_keys(scorer: ModuleType, numbers: NumberFormat) -> None:
    visible = VISIBLE[0]
    index_q, keys, weights, table, num_visible = draw(visible, torch.float32 if IS_INTERPRETED else torch.bfloat16, DIM)
    longest = max(map(max, visible))
    hadamard = reference_cache_rows.hadamard_matrix(DIM, torch.device(DEVICE))
    cache = reference_cache_rows.encode_index_k(keys.nan_to_num().view(-1, DIM), hadamard, numbers)
    cache = cache.view(*keys.shape[:2], DIM + 4)
    key_rows = reference.gather_cache(cache, table, longest)
    expected = reference_cache_rows.index_scores_encoded(index_q, key_rows, weights, hadamard, numbers)
    tile = scorer.Tile(256, 16, 3, 4, is_hopper=True)
    arguments = (index_q, cache, weights, table, num_visible, longest, hadamard, numbers)
    # Rotated in another order, a query's number now and then moves by one step.
    assert_same(
        scorer.index_scores_paged_encoded(*arguments, tile=tile),
        expected,
        num_visible,
        3e-3 if numbers is INT8 else 1e-2,
    )


def test_loop_for_hopper_compiles() -> None:
    """Products of two tokens follow one another without a wait between them, and nothing is spilled."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter compiles nothing")
    from tests.helpers.compiled.index_scores import HOPPER_KERNELS, compile_for_hopper

    for kernel in HOPPER_KERNELS:
        ptx, shared_bytes = compile_for_hopper(kernel)
        assert shared_bytes <= SHARED_BYTES, kernel.label
        for instruction in kernel.instructions:
            assert instruction in ptx, (kernel.label, instruction)
        # Of each group's tokens a turn, the last one's alone are waited for with nothing behind them.
        waits = {count: ptx.count(f"wgmma.wait_group.sync.aligned {count};") for count in (0, 1)}
        others = 2 * (int(kernel.constants["TURN_TOKENS"]) - 1)
        assert waits == {0: 2, 1: others}, (kernel.label, waits)
