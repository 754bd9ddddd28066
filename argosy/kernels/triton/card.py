"""What launches ask of the card. Invariant: an answer never changes in a process, so it is asked for once."""

import functools

import triton


@functools.cache
def count_multiprocessors(device_index: int) -> int:
    count: int = triton.runtime.driver.active.utils.get_device_properties(device_index)["multiprocessor_count"]
    return count


@functools.cache
def capability() -> int:
    """Of the current card, times ten: 90 is Hopper."""
    arch: int = triton.runtime.driver.active.get_current_target().arch
    return arch
