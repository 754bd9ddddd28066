"""The index scores' loop for Hopper cards against the specification, and what it compiles to.

On such a card, or without one in an interpreter (``tests/helpers/gluon_interpreter.py``), at small sizes:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_index_scores_hopper_triton.py
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
# Of few tokens: tiles' ends, rows of nothing first, last and between others, rows that one program shares with others
# and rows that all share, more rows than a warp has threads.
FEW_VISIBLE = (
    ((0,), (1,), (64,), (65,), (0,), (0,), (1500,), (129,), (0,)),
    ((148, 149), (3, 4), (0, 600)),
    ((700,), (1,), (130,), *((61,),) * 40, (0,), (128,)),
    ((0,), (0,)),
    ((64,),),
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
        module = load_interpreted("argosy.kernels.triton.index_scores_few_hopper")
        monkeypatch.setattr(index_scores, "launch_few_on_hopper", module.launch_few_on_hopper)
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


@needs_device
@pytest.mark.parametrize(("num_stages", "block_size"), ((2, 64), (3, 128), (5, 64)))
@pytest.mark.parametrize("visible", FEW_VISIBLE, ids=lambda visible: f"{len(visible)}x{len(visible[0])}")
def test_scores_of_few_tokens(
    scorer: ModuleType, visible: tuple[tuple[int, ...], ...], num_stages: int, block_size: int
) -> None:
    """On a card the bits of the other loop; also rows that are cut off before their last visible key."""
    longest = max(1, max(map(max, visible)))
    dtype = torch.float32 if IS_INTERPRETED else torch.bfloat16
    index_q, cache, weights, table, num_visible = draw((*visible, (longest,) * len(visible[0])), dtype, DIM, block_size)
    expected = reference.index_scores(index_q, reference.gather_cache(cache, table, longest), weights)
    tile = scorer.Tile(64, 1, num_stages, 4, 2, is_hopper=True)
    for max_seq_len in (longest, longest + 200, max(1, longest - 70)):
        arguments = (index_q, cache, weights, table, num_visible, max_seq_len)
        scores = scorer.index_scores_paged(*arguments, tile=tile)
        width = min(longest, max_seq_len)
        assert_same(scores[..., :width], expected[..., :width], num_visible, 3e-5)
        if not IS_INTERPRETED:
            other = scorer.index_scores_paged(*arguments, tile=scorer.FEW_TILES[2])
            is_visible = torch.arange(max_seq_len, device=DEVICE) < num_visible.unsqueeze(2)
            assert torch.equal(scores[is_visible], other[is_visible])


@needs_device
@pytest.mark.parametrize("visible", FEW_VISIBLE[:2], ids=lambda visible: f"{len(visible)}x{len(visible[0])}")
@pytest.mark.parametrize("is_whole", (False, True))
@pytest.mark.parametrize("numbers", (INT8, FP8), ids=lambda numbers: str(numbers.dtype))
def test_scores_of_few_tokens_and_encoded_keys(
    scorer: ModuleType, numbers: NumberFormat, is_whole: bool, visible: tuple[tuple[int, ...], ...]
) -> None:
    dtype = torch.float32 if IS_INTERPRETED else torch.bfloat16
    index_q, keys, weights, table, num_visible = draw(visible, dtype, DIM, 64)
    longest = max(map(max, visible))
    hadamard = reference_cache_rows.hadamard_matrix(DIM, torch.device(DEVICE))
    cache = reference_cache_rows.encode_index_k(keys.nan_to_num().view(-1, DIM), hadamard, numbers)
    cache = cache.view(*keys.shape[:2], DIM + 4)
    key_rows = reference.gather_cache(cache, table, longest)
    expected = reference_cache_rows.index_scores_encoded(index_q, key_rows, weights, hadamard, numbers)
    tile = scorer.Tile(64, 1, 4, 4, 3, is_hopper=True, is_whole=is_whole)
    arguments = (index_q, cache, weights, table, num_visible, longest, hadamard, numbers)
    scores = scorer.index_scores_paged_encoded(*arguments, tile=tile)
    assert_same(scores, expected, num_visible, 3e-3 if numbers is INT8 else 1e-2)
    if not IS_INTERPRETED:
        other = scorer.index_scores_paged_encoded(*arguments, tile=scorer.FEW_TILES[1])
        is_visible = torch.arange(longest, device=DEVICE) < num_visible.unsqueeze(2)
        assert torch.equal(scores[is_visible], other[is_visible])


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


def test_loop_for_few_tokens_compiles() -> None:
    """As many programs as a tile says have room on a multiprocessor; keys are copied as wide as they are aligned."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter compiles nothing")
    from argosy.kernels.triton.index_scores import FEW_HOPPER_TILES
    from tests.helpers.compiled import compile_gluon
    from tests.helpers.compiled.index_scores import FEW_HOPPER_KERNELS

    for kernel in FEW_HOPPER_KERNELS:
        ptx, shared_bytes = compile_gluon(kernel)
        tile = FEW_HOPPER_TILES[int(kernel.constants["NUMBER_BYTES"])]
        assert tile.programs * (shared_bytes + 1024) <= SHARED_BYTES + 1024, (kernel.label, shared_bytes)
        for instruction in kernel.instructions:
            assert instruction in ptx, (kernel.label, instruction)
