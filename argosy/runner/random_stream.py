"""Random numbers by counter: number i of a stream is a pure function of (the stream's key, i).

There is no generator state, so a request draws the same numbers wherever it sits in the batch, on every device, after a
preemption and on every rank. The hash is SplitMix64 (Steele, Lea, Flood 2014), which is a counter by design. Not for
secrets. Invariant: nothing here depends on anything but its arguments; numbers lie strictly inside (0, 1).
"""

import hashlib

import numpy as np

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def key_from_seed(seed: int) -> int:
    """The key of a user's seed. Hashed, because neighbouring seeds must not give overlapping streams."""
    return int(_mix(np.array([(seed + _GAMMA) & _MASK], dtype=np.uint64))[0])


def key_from_request(engine_seed: int, request_id: str) -> int:
    """The key of a request without a seed: the same for the same engine seed and request id, in every run."""
    digest = hashlib.blake2b(f"{engine_seed}:{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniforms(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Number ``counters[i]`` of stream ``keys[i]``: [N] uint64, [N] integers >= 0 -> [N] float64 in (0, 1)."""
    hashed = _mix(keys + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(_GAMMA))
    # 52 bits and a half: exact in float64, never 0 and never 1.
    numbers: np.ndarray = ((hashed >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return numbers


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's output function on uint64 arrays, which wrap silently (numpy scalars would warn)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
    return np.bitwise_xor(z, z >> np.uint64(31))
