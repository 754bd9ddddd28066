"""e^x without branches and without calls, so that a loop over it becomes vector instructions."""

import numpy as np

from argosy.kernels.loops.compiled import inlined

_LOG2_E = np.float32(1.44269504088896341)
# ln 2 in two parts, of which the first has few bits, and the polynomial of expf in Moshier's Cephes library.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_LOWEST = np.float32(-87.3)  # below, float32 has no normal numbers


@inlined
def exp_of_negative(x):
    """e^x for x <= 0, within 3e-7 of it; e^-87.3 for all below. NaN stays."""
    power = _LOWEST if x < _LOWEST else x
    whole = np.floor(power * _LOG2_E + np.float32(0.5))
    rest = power - whole * _LN2_HIGH - whole * _LN2_LOW
    series = ((((_P0 * rest + _P1) * rest + _P2) * rest + _P3) * rest + _P4) * rest + _P5
    two_to_whole = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (series * rest * rest + rest + np.float32(1)) * two_to_whole
