"""What the loop of ``fp8_hopper.py`` does with a tile's totals: silu of gate times up, 8-bit numbers, stores.

A quarter of a tile's columns at a time, in the registers of the group that summed it; the loop decides which of these
happens. Invariant: numbers and scales are those of ``quantize_groups.py``.

Shape letters: those of ``fp8_gemm.py``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from argosy.kernels.triton.hopper_tiles import GROUP_ROWS, lay_out_stores

HALF = gl.constexpr(128)  # of a tile: columns that share their scales
QUARTER = gl.constexpr(64)
LOG2_E = gl.constexpr(1.4426950408889634)
LARGEST = gl.constexpr(448.0)
SMALLEST_AMAX = gl.constexpr(1e-4)
EXPONENT_BITS = gl.constexpr(0x7F800000)
FRACTION_BITS = gl.constexpr(0x007FFFFF)
ONE_SQUARED_BITS = gl.constexpr(0x7F000000)  # without a power of two's bits: its reciprocal's


@gluon.jit
def silu_mul(gate, up, HIDDEN_DTYPE: gl.constexpr):  # noqa: N803
    gate = gate.to(HIDDEN_DTYPE).to(gl.float32)
    up = up.to(HIDDEN_DTYPE).to(gl.float32)
    return (gate / (1.0 + gl.exp2(gate * -LOG2_E)) * up).to(HIDDEN_DTYPE).to(gl.float32)


@gluon.jit
def find_group_scale(left, right, HAS_UE8M0_SCALES: gl.constexpr):  # noqa: N803
    """As ``quantize_groups.quantize_last_dim`` of both together: the scale, and its reciprocal."""
    amax = gl.maximum(gl.max(gl.abs(left), axis=1), gl.max(gl.abs(right), axis=1))
    scale = gl.div_rn(gl.maximum(amax, SMALLEST_AMAX), LARGEST)
    if HAS_UE8M0_SCALES:  # up to the next power of two, whose reciprocal is exact
        bits = (gl.cast(scale, gl.int32, bitcast=True) + FRACTION_BITS) & EXPONENT_BITS
        scale = gl.cast(bits, gl.float32, bitcast=True)
        factor = gl.cast(ONE_SQUARED_BITS - bits, gl.float32, bitcast=True)
    else:
        factor = gl.div_rn(1.0, scale)
    return scale, factor


@gluon.jit
def store_scale(scale, results, row, first_row, count, column, num_rows, SUMS: gl.constexpr):  # noqa: N803
    out, out_scale = results
    row_ids = row + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, SUMS))
    places = out_scale + (column // HALF).to(gl.int64) * num_rows + first_row + row_ids
    gl.store(places, scale, mask=row_ids < count)


@gluon.jit
def quantize(values, scale, factor, HAS_UE8M0_SCALES: gl.constexpr):  # noqa: N803
    """Numbers for a cast that rounds: values over scale, as division rounds them.

    NOTE(numerics): a product with the reciprocal, and what is then left over, once more (Markstein, 1990); a division
    of each would call a subroutine, around which the loop's sums are spilled.
    """
    factor = gl.expand_dims(factor, 1)
    quotient = values * factor
    if not HAS_UE8M0_SCALES:
        left_over = gl.fma(-quotient, gl.expand_dims(scale, 1), values)
        quotient = gl.fma(left_over, factor, quotient)
    return gl.where(quotient > LARGEST, LARGEST, gl.where(quotient < -LARGEST, -LARGEST, quotient))  # NaN stays


@gluon.jit
def store(value, results, row, first_row, count, column, num_columns):
    out, out_scale = results
    dtype: gl.constexpr = out.dtype.element_ty
    STORED: gl.constexpr = lay_out_stores(QUARTER, dtype)  # noqa: N806
    value = gl.convert_layout(value.to(dtype), STORED)
    row_ids = row + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, STORED))
    columns = column + gl.arange(0, QUARTER, layout=gl.SliceLayout(0, STORED))
    places = gl.expand_dims((first_row + row_ids).to(gl.int64) * num_columns, 1) + gl.expand_dims(columns, 0)
    is_stored = gl.expand_dims(row_ids < count, 1) & gl.expand_dims(columns < num_columns, 0)
    gl.store(out + places, value, mask=is_stored)
