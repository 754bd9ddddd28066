"""The indexer's choice: the keys with the highest scores, as cache slots."""

import numpy as np

from argosy.kernels.loops.compiled import compiled
from argosy.kernels.loops.memory import ints, longs

_MINUS_ZERO = np.iinfo(np.int32).min  # the float -0's bits


@compiled("i8(i8[::1], i8)")
def _find_ordered(keys, place):
    """The key at ``place`` if ``keys`` were sorted; they are moved about (Hoare, CACM algorithm 65)."""
    low, high = 0, keys.shape[0] - 1
    while low < high:
        pivot = keys[(low + high) >> 1]
        i, j = low, high
        while i <= j:
            while keys[i] < pivot:
                i += 1
            while keys[j] > pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        if place <= j:
            high = j
        elif place >= i:
            low = i
        else:
            break
    return keys[place]


@compiled("void(i8, i8, i8, i8, i8, i8, i8, i8, i8, i8)")
def select_topk_slots(
    num_rows, num_keys, topk, scores, scores_stride, num_visible, block_table, table_stride, block_size, slots
):
    """``scores: [N, S]``, ``num_visible: [N]`` int32, ``block_table: [N, blocks]`` int32 -> ``slots: [N, topk]`` int64,
    ascending in position, -1 behind them. With ``table_stride`` 0 one row of blocks serves all.

    Score and position make one integer, as in ``reference.select_topk_positions``: ties go to the lowest position.
    """
    keys, moved = np.empty(num_keys, np.int64), np.empty(num_keys, np.int64)
    visible = ints(num_visible, num_rows)
    for n in range(num_rows):
        count, bits_of = min(visible[n], num_keys), ints(scores, num_keys, n * scores_stride)
        for s in range(count):
            bits = np.int64(bits_of[s])  # of a float32
            bits = 0 if bits == _MINUS_ZERO else bits
            keys[s] = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) << 32) | (0x7FFFFFFF - s)
        lowest = np.int64(-(2**63))
        if count > topk:
            moved[:count] = keys[:count]
            lowest = _find_ordered(moved[:count], count - topk)
        blocks = ints(block_table, (num_keys + block_size - 1) // block_size, n * table_stride)
        chosen, num_chosen = longs(slots, topk, n * topk), 0
        for s in range(count):
            if keys[s] >= lowest:
                chosen[num_chosen] = np.int64(blocks[s // block_size]) * block_size + s % block_size
                num_chosen += 1
        chosen[num_chosen:] = -1
