"""Arrays that are sent in one copy come out as they went in."""

import numpy as np
import torch

from argosy.runner.transfer import ALIGNMENT_BYTES, join_bytes, split_bytes


def test_arrays_that_share_a_copy_keep_dtypes_shapes_and_values() -> None:
    table = np.arange(40, dtype=np.int32).reshape(5, 8)
    arrays = (np.arange(3), table[:, :3], np.zeros(0, dtype=np.int64), np.arange(5, dtype=np.int32), np.arange(1) - 1)
    joined, starts = join_bytes(arrays)
    assert all(start % ALIGNMENT_BYTES == 0 for start in starts)
    for tensor, array in zip(split_bytes(torch.from_numpy(joined), arrays, starts), arrays, strict=True):
        assert torch.equal(tensor, torch.from_numpy(np.ascontiguousarray(array)))
