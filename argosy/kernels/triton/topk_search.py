"""What a program does with a row's scores in registers: find the lowest of the best, count the chosen before each.

The search narrows down, by counting, the interval where the lowest chosen score lies. Every turn costs a wait of all
warps, so a turn counts at two thresholds: on both sides of where the row's mean and spread say, then of where the
counts say, and by thirds of the float32 numbers where that does not help. Invariant: as many as are wanted are chosen,
the first among equals; NaN counts as infinity.

A program's scores: [32 lanes, lines, 4].
"""

import triton
import triton.language as tl

LANES: tl.constexpr = tl.constexpr(32)
VECTOR: tl.constexpr = tl.constexpr(4)
LINE: tl.constexpr = tl.constexpr(128)
INFINITY: tl.constexpr = tl.constexpr(float("inf"))
LOGISTIC: tl.constexpr = tl.constexpr(0.4073)  # ln(2) / 1.702
# Of the first two thresholds, in standard deviations, and of all others, in those of a count (simulated).
FIRST_MARGIN: tl.constexpr = tl.constexpr(0.15)
MARGIN: tl.constexpr = tl.constexpr(0.7)


@triton.jit
def find_lowest(values, places, num_scores, TOPK: tl.constexpr, WARPS: tl.constexpr):  # noqa: N803
    """Of more than TOPK scores the lowest one chosen, and ``values`` without those that equal it and are not.

    At every turn: at least TOPK scores (``above_low``) are >= low, fewer (``above_high``) are >= high, as keys.
    """
    low, high, mean, deviation = _describe(values, places, num_scores, WARPS)
    above_low, above_high = num_scores, num_scores * 0
    share = TOPK / num_scores.to(tl.float32)
    # Where a logistic distribution, much like a normal one, has this share above.
    distance = tl.log2((1.0 - share) / share) * LOGISTIC
    lower = _order(mean + (distance - FIRST_MARGIN) * deviation)
    upper = _order(mean + (distance + FIRST_MARGIN) * deviation)
    num_poor = num_scores * 0
    while (above_low > TOPK) & (low + 1 < high):
        num_inside = above_low - above_high
        lower = tl.minimum(tl.maximum(lower, low + 1), high - 1)
        upper = tl.minimum(tl.maximum(upper, lower), high - 1)
        above_lower, above_upper = _count(values, _value(lower), _value(upper), WARPS)
        if above_upper >= TOPK:
            low, above_low = upper, above_upper
        else:
            high, above_high = upper, above_upper
            if above_lower >= TOPK:
                low, above_low = lower, above_lower
            else:
                high, above_high = lower, above_lower
        num_left = above_low - above_high
        if num_left == num_inside:  # ties, often: shrink the interval to the scores in it
            is_inside = (values >= _value(low)) & ~(values >= _value(high))
            low = _order(tl.min(tl.where(is_inside, values, INFINITY)))
            high = _order(tl.max(tl.where(is_inside, values, -INFINITY))) + 1
        num_poor = tl.where(num_left * 2 > num_inside, num_poor + 1, 0)
        if num_poor < 2:
            inverse = 1.0 / num_left.to(tl.float32)
            share = (TOPK - above_high) * inverse
            margin = MARGIN * tl.sqrt(share * (1.0 - share) * inverse)
            low_value, high_value = _value(low), _value(high)
            # An infinity makes it NaN, which is clamped like any other.
            lower = _order(high_value - (high_value - low_value) * tl.minimum(share + margin, 1.0))
            upper = _order(high_value - (high_value - low_value) * tl.maximum(share - margin, 0.0))
        else:  # by thirds of the float32 numbers in it
            third = tl.maximum(high // 3 - low // 3, 1)
            lower, upper = low + third, high - third

    if above_low > TOPK:  # equal ones are too many: the first of them go
        lowest = _value(low)
        num_fewer, num_enough = num_scores * 0, num_scores
        while num_fewer + 1 < num_enough:
            middle = (num_fewer + num_enough) // 2
            if tl.sum(((values == lowest) & (places < middle)).to(tl.int32)) >= TOPK - above_high:
                num_enough = middle
            else:
                num_fewer = middle
        values = tl.where((values == lowest) & (places >= num_enough), float("nan"), values)
    return values, _value(low)


@triton.jit
def _describe(values, places, num_scores, WARPS: tl.constexpr):  # noqa: N803
    """The lowest score's key, one more than the highest one's, the mean and the standard deviation."""
    is_score = places < num_scores
    lowest = tl.min(_split(tl.min(tl.where(is_score, values, INFINITY), 2), WARPS), 1)
    highest = tl.max(_split(tl.max(values, 2), WARPS), 1)
    known = tl.where(is_score, values, 0.0)
    total, squares = _sum_own(known, WARPS), _sum_own(known * known, WARPS)
    own = (tl.ravel(lowest), tl.ravel(highest), tl.ravel(total), tl.ravel(squares))
    lowest, highest, total, squares = tl.reduce(own, 0, _join)
    mean = total / num_scores
    variance = tl.maximum(squares / num_scores - mean * mean, 0.0)
    return _order(lowest), _order(highest) + 1, mean, tl.sqrt(variance)


@triton.jit
def _join(lowest, highest, total, squares, other_lowest, other_highest, other_total, other_squares):
    lowest, highest = tl.minimum(lowest, other_lowest), tl.maximum(highest, other_highest)
    return lowest, highest, total + other_total, squares + other_squares


@triton.jit
def _count(values, lower, upper, WARPS: tl.constexpr):  # noqa: N803
    """Scores >= lower, and >= upper."""
    above_lower = _sum_own(tl.where(values >= lower, 1.0, 0.0), WARPS)  # floats are compared and added the fastest
    above_upper = _sum_own(tl.where(values >= upper, 1.0, 0.0), WARPS)
    both = tl.sum((above_lower + above_upper * 65536.0).to(tl.int32))
    return both & 0xFFFF, (both >> 16) & 0xFFFF


@triton.jit
def _sum_own(x, WARPS: tl.constexpr):  # noqa: N803
    """Each thread's: [LANES, WARPS]."""
    return tl.sum(_split(tl.sum(x, 2), WARPS), 1)


@triton.jit
def _split(x, WARPS: tl.constexpr):  # noqa: N803
    """[LANES, lines] -> [LANES, lines of a thread, WARPS]."""
    return tl.reshape(x, (LANES, x.shape[1] // WARPS, WARPS))


@triton.jit
def count_before(is_chosen):
    """How many are chosen before each: a vector's in the bytes of an integer, a line's by a warp."""
    bytes_ = tl.arange(0, VECTOR) * 8
    vector = tl.sum(is_chosen.to(tl.int32) << bytes_, 2)  # [LANES, lines]
    own = (vector * 0x01010101) >> 24
    lanes = tl.trans(own)
    in_line = tl.trans(tl.cumsum(lanes, 1) - lanes)
    of_line = tl.sum(own, 0)
    before = in_line + tl.expand_dims(tl.cumsum(of_line, 0) - of_line, 0)
    return tl.expand_dims(before, 2) + ((tl.expand_dims(vector * 0x01010100, 2) >> bytes_) & 0xFF)


@triton.jit
def place_vectors(BLOCK: tl.constexpr):  # noqa: N803
    """Where each thread's vectors begin: [LANES, lines, 1]. In this order of dimensions a warp holds whole lines."""
    line = tl.arange(0, BLOCK // LINE)[None, :, None]
    return (line * LANES + tl.arange(0, LANES)[:, None, None]) * VECTOR


@triton.jit
def load_scores(first, places, num_scores, READ: tl.constexpr):  # noqa: N803
    """Read READ at a time, where that stays inside the row's own memory; -inf behind the last."""
    values = tl.load(first + places, mask=places < (num_scores + READ - 1) // READ * READ, other=0.0)
    return tl.where(places < num_scores, tl.where(values == values, values, INFINITY), -INFINITY)


@triton.jit
def _order(value):
    """An int32 key that is ordered as the float32 numbers are."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # + 0.0 turns -0.0 into 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
