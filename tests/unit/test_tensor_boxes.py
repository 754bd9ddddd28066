"""Byte runs against numpy's own idea of where elements lie."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argosy.quantization.stored_tensors import ScaleBlocks
from argosy.quantization.tensor_boxes import Box, find_byte_runs, find_first_gap, volume


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = draw(st.lists(st.integers(0, 5), max_size=4).map(tuple))
    box = [tuple(sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))) for size in shape]
    return shape, tuple(draw(st.sampled_from([(0, size), span])) for size, span in zip(shape, box, strict=True))


@given(boxes(), st.sampled_from([1, 2, 4]))
def test_runs_hold_the_boxes_bytes_in_order_and_no_other(case: tuple[tuple[int, ...], Box], item_bytes: int) -> None:
    shape, box = case
    place_of = np.arange(math.prod(shape)).reshape(shape)
    wanted = place_of[tuple(slice(*span) for span in box)].ravel()
    runs = find_byte_runs(shape, box, item_bytes)
    found = [byte for start in runs.starts for byte in range(start, start + runs.run_bytes)]
    assert found == [item * item_bytes + byte for item in wanted for byte in range(item_bytes)]
    assert volume(box) == len(wanted)


@pytest.mark.parametrize(
    ("shape", "box", "num_runs"),
    [((8, 4), ((2, 6), (0, 4)), 1), ((8, 4), ((2, 6), (0, 2)), 4), ((3, 8, 4), ((1, 2), (0, 8), (0, 4)), 1)],
)
def test_neighbours_are_one_run(shape: tuple[int, ...], box: Box, num_runs: int) -> None:
    assert len(find_byte_runs(shape, box, 2).starts) == num_runs


def test_a_gap_is_found_where_it_begins() -> None:
    assert find_first_gap((4, 2), [((0, 2), (0, 2)), ((2, 4), (0, 1)), ((3, 4), (1, 2))]) == 2


def test_scales_cover_every_block_that_a_part_touches() -> None:
    assert ScaleBlocks(128, 128).covering(((100, 200), (128, 256))) == ((0, 2), (1, 2))
    assert ScaleBlocks(1, None).covering(((100, 200), (128, 256))) == ((100, 200), (0, 1))
    assert ScaleBlocks(128, 128).scale_shape((576, 7168)) == (5, 56)
