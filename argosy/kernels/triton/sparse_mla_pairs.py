"""The loop of ``sparse_mla.py`` for Hopper cards with blocks of keys in pairs: 16-bit rows, tokens that are not split.

Two warp groups have 64 heads' sums, half of the columns each. A group computes the scores and weights of every other
block of 64 keys, publishes the weights, and multiplies both blocks' weights with its own half of the rows: its softmax
falls into the other group's products, and no score is computed twice. Four more warps gather rows: each fills one half
of one of the two blocks, and fills it again as soon as the group that sums that half up has done so.
Invariant: a half is filled again only when both of its readers are done: the group that sums it up says so, and it
could not have begun before the other one had the block's scores.

Why the groups agree on the scale: a block's highest score so far includes that of the block before, of the other group.
A block's weights take the place of its rows' rope parts, which only its scores need.

Shape letters: those of ``sparse_mla.py``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from argosy.kernels.triton.dependent_launch_gluon import let_next_start, wait_for_inputs

LOWEST = gl.constexpr(-3.0e38)
BLOCK = gl.constexpr(64)  # heads of a program, and keys of a block; P too, since weights take the ropes' place
NUM_GROUPS = gl.constexpr(2)
# Registers of a thread: what the card has is divided among three warp groups, of which the first gets what is left.
GROUP_REGISTERS, GATHER_REGISTERS = gl.constexpr(216), gl.constexpr(72)
SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
# 16 bytes a lane: of one warp 4 rows at a time, of four warps 16, and whole rows.
GATHERED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0]))
QUERIES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
STORED = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
BARRIER = gl.barrier if "barrier" in vars(gl) else gl.thread_barrier  # Triton 3.7's name, 3.6's


@gluon.jit
def attend_in_pairs(
    query,
    numbers,
    slots,
    out,
    scale,
    heads,
    num_keys,
    slot_stride,
    token_stride,
    head_stride,
    R: gl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    WIDTH: gl.constexpr,  # noqa: N803
    NUM_PLACES: gl.constexpr,  # noqa: N803
    IS_FULL: gl.constexpr,  # noqa: N803
):
    """``NUM_PLACES``: a power of two, no less than ``num_keys``."""
    let_next_start()
    dtype: gl.constexpr = query.dtype.element_ty
    num_head_blocks = (heads + BLOCK - 1) // BLOCK
    first_head = (gl.program_id(0) % num_head_blocks) * BLOCK
    token = (gl.program_id(0) // num_head_blocks).to(gl.int64)
    token_slots = slots + token * slot_stride

    q_latents = gl.allocate_shared_memory(dtype, [NUM_GROUPS, BLOCK, R // 2], SHARED)
    q_rope = gl.allocate_shared_memory(dtype, [BLOCK, BLOCK], SHARED)
    latents = gl.allocate_shared_memory(dtype, [2 * NUM_GROUPS, BLOCK, R // 2], SHARED)  # of a pair's block, a half
    ropes = gl.allocate_shared_memory(dtype, [NUM_GROUPS, BLOCK, BLOCK], SHARED)
    hidings = gl.allocate_shared_memory(gl.float32, [NUM_GROUPS, BLOCK], VECTOR)  # 0, or minus infinity for no key
    highests = gl.allocate_shared_memory(gl.float32, [NUM_GROUPS, BLOCK], VECTOR)
    weight_sums = gl.allocate_shared_memory(gl.float32, [NUM_GROUPS, BLOCK], VECTOR)
    queries_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    rows_ready = gl.allocate_shared_memory(gl.int64, [2 * NUM_GROUPS, 1], mbarrier.MBarrierLayout())
    rows_free = gl.allocate_shared_memory(gl.int64, [2 * NUM_GROUPS, 1], mbarrier.MBarrierLayout())
    weights_ready = gl.allocate_shared_memory(gl.int64, [NUM_GROUPS, 1], mbarrier.MBarrierLayout())
    sums_ready = gl.allocate_shared_memory(gl.int64, [NUM_GROUPS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(queries_ready, count=1)
    for place in gl.static_range(4):
        mbarrier.init(rows_ready.index(place), count=1)
        mbarrier.init(rows_free.index(place), count=1)
    for group in gl.static_range(2):
        mbarrier.init(weights_ready.index(group), count=1)
        mbarrier.init(sums_ready.index(group), count=1)
    wait_for_inputs()
    stop = num_keys
    if not IS_FULL:
        stop = _find_stop(token_slots, num_keys, NUM_PLACES)
    # One turn at least, so that the compiler sees a loop that runs.
    num_turns = gl.maximum((stop + 2 * BLOCK - 1) // (2 * BLOCK), 1)
    fence_async_shared()
    BARRIER()

    buffers = (q_latents, q_rope, latents, ropes, hidings, highests, weight_sums)
    barriers = (queries_ready, rows_ready, rows_free, weights_ready, sums_ready)
    queries = (query + token * token_stride, head_stride)
    keys = (token_slots, stop, num_turns)
    results = (out + token * heads * R, first_head, heads)
    gl.warp_specialize(
        [
            (_attend, (0, queries, keys, buffers, barriers, results, scale)),
            (_attend, (1, queries, keys, buffers, barriers, results, scale)),
            (_gather, (0, numbers, keys, buffers, barriers, WIDTH)),
            (_gather, (1, numbers, keys, buffers, barriers, WIDTH)),
            (_gather, (2, numbers, keys, buffers, barriers, WIDTH)),
            (_gather, (3, numbers, keys, buffers, barriers, WIDTH)),
        ],
        [4, 1, 1, 1, 1],
        [GROUP_REGISTERS, GATHER_REGISTERS, GATHER_REGISTERS, GATHER_REGISTERS, GATHER_REGISTERS],
    )


@gluon.jit
def _find_stop(token_slots, num_keys, NUM_PLACES: gl.constexpr):  # noqa: N803
    """Behind the last known slot, which mostly is the last one."""
    stop = num_keys
    if gl.load(token_slots + (num_keys - 1)) < 0:
        places = gl.arange(0, NUM_PLACES, layout=LINE)
        is_known = gl.load(token_slots + places, mask=places < num_keys, other=-1) >= 0
        stop = gl.max(gl.where(is_known, places + 1, 0), axis=0)
    return stop


@gluon.jit
def _columns(size: gl.constexpr, layout: gl.constexpr):
    return gl.expand_dims(gl.arange(0, size, layout=gl.SliceLayout(0, layout)), 0)


@gluon.jit
def _gather(place: gl.constexpr, numbers, keys, buffers, barriers, WIDTH: gl.constexpr):  # noqa: N803
    """Half ``place % 2`` of the columns, of every second block. Rows of no key become zeros."""
    q_latents, q_rope, latents, ropes, hidings, highests, weight_sums = buffers
    queries_ready, rows_ready, rows_free, weights_ready, sums_ready = barriers
    token_slots, stop, num_turns = keys
    HALF_WIDTH: gl.constexpr = latents.shape[2]  # noqa: N806
    PARITY: gl.constexpr = place // 2  # noqa: N806
    HALF: gl.constexpr = place % 2  # noqa: N806
    key_ids = PARITY * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, GATHERED))
    for turn in range(num_turns):
        slot = gl.load(token_slots + key_ids, mask=key_ids < stop, other=-1).to(gl.int32)
        key_ids += 2 * BLOCK
        is_key = gl.expand_dims(slot >= 0, 1)
        rows = numbers + gl.expand_dims(slot, 1).to(gl.int64) * WIDTH
        mbarrier.wait(rows_free.index(place), (turn & 1) ^ 1)  # the first turn passes at once
        columns = HALF * HALF_WIDTH + _columns(HALF_WIDTH, GATHERED)
        async_copy.async_copy_global_to_shared(latents.index(place), rows + columns, mask=is_key)
        if PARITY != HALF:  # whoever frees this half has read the weights that lie there meanwhile
            columns = 2 * HALF_WIDTH + _columns(BLOCK, GATHERED)
            async_copy.async_copy_global_to_shared(ropes.index(PARITY), rows + columns, mask=is_key)
            hidings.index(PARITY).store(gl.where(slot >= 0, 0.0, float("-inf")))
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
        BARRIER()
        mbarrier.arrive(rows_ready.index(place), count=1)


@gluon.jit
def _attend(
    group: gl.constexpr,
    queries,
    keys,
    buffers,
    barriers,
    results,
    scale,
):
    q_latents, q_rope, latents, ropes, hidings, highests, weight_sums = buffers
    queries_ready, rows_ready, rows_free, weights_ready, sums_ready = barriers
    token_slots, stop, num_turns = keys
    dtype: gl.constexpr = latents.dtype
    HALF_WIDTH: gl.constexpr = latents.shape[2]  # noqa: N806
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF_WIDTH, 16])  # noqa: N806
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)  # noqa: N806
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)  # noqa: N806
    other: gl.constexpr = 1 - group
    own_half: gl.constexpr = 3 * group  # the own block's, to which the own sums belong
    rest_half: gl.constexpr = 2 * group + other  # the own block's, with its ropes
    other_half: gl.constexpr = 2 * other + group  # the other group's block's, to which the own sums belong
    if group == 0:
        _copy_queries(queries, results, buffers)
        mbarrier.arrive(queries_ready, count=1)
    else:
        mbarrier.wait(queries_ready, 0)
    no_scores = gl.full([BLOCK, BLOCK], 0.0, gl.float32, layout=SCORES)
    highest = gl.full([BLOCK], LOWEST, gl.float32, layout=ROWS)
    weight_sum = gl.full([BLOCK], 0.0, gl.float32, layout=ROWS)
    total = gl.full([BLOCK, HALF_WIDTH], 0.0, gl.float32, layout=SUMS)
    for turn in range(num_turns):
        parity = turn & 1
        # What the compiler does not see to be 0: it would keep the addresses of all products in registers otherwise.
        zero = turn & (stop >> 31)
        mbarrier.wait(rows_ready.index(own_half), parity)
        scores = warpgroup_mma(
            q_latents.index(group + zero),
            latents.index(own_half + zero).permute((1, 0)),
            no_scores,
            use_acc=False,
            is_async=True,
        )
        mbarrier.wait(rows_ready.index(rest_half), parity)
        scores = warpgroup_mma(
            q_latents.index(other + zero), latents.index(rest_half + zero).permute((1, 0)), scores, is_async=True
        )
        scores = warpgroup_mma(q_rope, ropes.index(group).permute((1, 0)), scores, is_async=True)
        if group == 1:  # the other's block comes before the own one
            mbarrier.wait(weights_ready.index(other), parity)
            other_highest = highests.index(other).load(ROWS)
            shrink = gl.exp2(highest - other_highest)
            highest = other_highest
            weight_sum *= shrink
            # NOTE(order): ptxas lets registers of sums be touched only while no product is under way.
            scores = warpgroup_mma_wait(0, deps=[scores])
            total *= gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, SUMS)), 1)
            total = warpgroup_mma(ropes.index(other), latents.index(other_half + zero), total, is_async=True)
        else:
            scores = warpgroup_mma_wait(0, deps=[scores])
        scores += gl.expand_dims(hidings.index(group).load(gl.SliceLayout(0, SCORES)), 0)
        new_highest = gl.maximum(highest, gl.max(scores, axis=1) * scale)
        shares = gl.exp2(scores * scale - gl.expand_dims(new_highest, 1))
        weights = shares.to(dtype)
        ropes.index(group).store(weights)
        highests.index(group).store(new_highest)
        fence_async_shared()
        BARRIER()
        mbarrier.arrive(weights_ready.index(group), count=1)
        shrink = gl.exp2(highest - new_highest)
        highest = new_highest
        weight_sum = weight_sum * shrink + gl.sum(shares, axis=1)
        weights = gl.convert_layout(weights, WEIGHTS)
        if group == 1:
            total = warpgroup_mma_wait(0, deps=[total])
            mbarrier.arrive(rows_free.index(other_half), count=1)
        total *= gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, SUMS)), 1)
        total = warpgroup_mma(weights, latents.index(own_half + zero), total, is_async=True)
        total, weights = warpgroup_mma_wait(0, deps=[total, weights])
        mbarrier.arrive(rows_free.index(own_half), count=1)
        if group == 0:
            mbarrier.wait(weights_ready.index(other), parity)
            other_highest = highests.index(other).load(ROWS)
            shrink = gl.exp2(highest - other_highest)
            highest = other_highest
            weight_sum *= shrink
            total *= gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, SUMS)), 1)
            total = warpgroup_mma(ropes.index(other), latents.index(other_half + zero), total, is_async=True)
            total = warpgroup_mma_wait(0, deps=[total])
            mbarrier.arrive(rows_free.index(other_half), count=1)

    weight_sums.index(group).store(weight_sum)
    BARRIER()
    mbarrier.arrive(sums_ready.index(group), count=1)
    mbarrier.wait(sums_ready.index(other), 0)
    weight_sum += weight_sums.index(other).load(ROWS)
    share = gl.convert_layout(1.0 / gl.where(weight_sum == 0.0, 1.0, weight_sum), gl.SliceLayout(1, SUMS))
    # Nobody else reads or fills this half any more: whole rows are stored from there.
    latents.index(own_half).store((total * gl.expand_dims(share, 1)).to(dtype))
    BARRIER()
    out, first_head, heads = results
    head_ids = first_head + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, STORED))
    places = gl.expand_dims(head_ids, 1) * (2 * HALF_WIDTH) + (group * HALF_WIDTH + _columns(HALF_WIDTH, STORED))
    gl.store(out + places, latents.index(own_half).load(STORED), mask=gl.expand_dims(head_ids < heads, 1))


@gluon.jit
def _copy_queries(queries, results, buffers):
    q_latents, q_rope, latents, ropes, hidings, highests, weight_sums = buffers
    query, head_stride = queries
    out, first_head, heads = results
    HALF_WIDTH: gl.constexpr = latents.shape[2]  # noqa: N806
    head_ids = first_head + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, QUERIES))
    is_head = gl.expand_dims(head_ids < heads, 1)
    rows = query + gl.expand_dims(head_ids, 1) * head_stride
    for half in gl.static_range(2):
        columns = half * HALF_WIDTH + _columns(HALF_WIDTH, QUERIES)
        async_copy.async_copy_global_to_shared(q_latents.index(half), rows + columns, mask=is_head)
    columns = 2 * HALF_WIDTH + _columns(BLOCK, QUERIES)
    async_copy.async_copy_global_to_shared(q_rope, rows + columns, mask=is_head)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
    BARRIER()
