"""The loop of ``masked_mla.py`` written out by hand for Hopper cards: 16-bit tensors, 128 queries and 128 keys a block.

One warp copies blocks of keys and values into two buffers each, through the card's copy engine. Two warp groups have 64
queries each, and keep their scores, weights and sums in registers. Neither waits for the other, so that one's softmax
falls into the other's products; and within a group the next block's softmax into this block's second product.
Invariant: a buffer is filled again only when both groups have said that their products which read it are done.

Shape letters: those of ``masked_mla.py``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

NUM_GROUPS = gl.constexpr(2)
GROUP_QUERIES = gl.constexpr(64)
BLOCK_QUERIES = gl.constexpr(128)
BLOCK_KEYS = gl.constexpr(128)
BLOCK_WORDS = gl.constexpr(4)  # of a row of a block's mask
# Registers of a thread: what the card has is divided among three warp groups, of which the first gets what is left.
GROUP_REGISTERS, COPY_REGISTERS = gl.constexpr(240), gl.constexpr(24)
LOWEST = gl.constexpr(-1.0e30)  # below every score, and finite, also times the scale: two of them can be subtracted
MINUS_INFINITY = gl.constexpr(-0x800000)  # float32's bits, as an int32
SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
# The same places as [queries, words, bits]: a thread has all words of its two queries.
BITS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [8, 0, 0], [0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0]],
        lane_bases=[[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[64, 4, 32],
    )
)
# The same words as a thread reads them: all of a row at once.
WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0]],
        lane_bases=[[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
)
# Of a bit's place in its word: what differs between threads, and what is the same for all of them.
LANE_BITS = gl.constexpr(6)
REGISTER_BITS = gl.constexpr(25)
BARRIER = gl.barrier if "barrier" in vars(gl) else gl.thread_barrier  # Triton 3.7's name, 3.6's


@gluon.jit(
    do_not_specialize=["num_tokens", "num_keys", "num_computed", "mask_vectors", "mask_stride", "heads_together"]
)
def attend_masked_on_hopper(
    q_nope,
    q_rope,
    k_nope,
    k_rope,
    value,
    out,
    mask,
    scale,
    num_tokens,
    num_keys,
    num_computed,
    mask_vectors,
    mask_stride,
    heads_together,
    q_nope_stride,
    q_rope_stride,
    k_nope_stride,
    value_stride,
    N: gl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    P: gl.constexpr,  # noqa: N803
    HAS_MASK: gl.constexpr,  # noqa: N803
    HAS_VECTORS: gl.constexpr,  # noqa: N803
):
    """Tensors are 2-D, [T or S, the columns of all heads], of which a head's begin a stride behind the one's before.

    V is N. ``mask_vectors``: of 4 words in a row of the mask, with HAS_VECTORS; otherwise ``mask_stride`` words.
    """
    dtype: gl.constexpr = q_nope.dtype
    # A few heads at a time, whose keys and values stay in the card's cache; among them the longest rows come first.
    num_query_blocks = (num_tokens + BLOCK_QUERIES - 1) // BLOCK_QUERIES
    together_programs = num_query_blocks * heads_together
    place = gl.program_id(0) % together_programs
    head = gl.program_id(0) // together_programs * heads_together + place % heads_together
    first_query = (num_query_blocks - 1 - place // heads_together) * BLOCK_QUERIES
    num_visible = gl.minimum(num_computed + first_query + BLOCK_QUERIES, num_keys)
    num_blocks = (num_visible + BLOCK_KEYS - 1) // BLOCK_KEYS

    q_nopes = gl.allocate_shared_memory(dtype, [NUM_GROUPS, GROUP_QUERIES, N], SHARED)
    q_ropes = gl.allocate_shared_memory(dtype, [NUM_GROUPS, GROUP_QUERIES, P], SHARED)
    k_nopes = gl.allocate_shared_memory(dtype, [2, BLOCK_KEYS, N], SHARED)
    k_ropes = gl.allocate_shared_memory(dtype, [2, BLOCK_KEYS, P], SHARED)
    values = gl.allocate_shared_memory(dtype, [2, BLOCK_KEYS, N], SHARED)
    queries_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    keys_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    keys_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    values_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    values_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(queries_ready, count=1)
    for buffer in gl.static_range(2):
        mbarrier.init(keys_ready.index(buffer), count=1)
        mbarrier.init(keys_free.index(buffer), count=NUM_GROUPS)
        mbarrier.init(values_ready.index(buffer), count=1)
        mbarrier.init(values_free.index(buffer), count=NUM_GROUPS)
    fence_async_shared()
    BARRIER()

    buffers = (q_nopes, q_ropes, k_nopes, k_ropes, values)
    barriers = (queries_ready, keys_ready, keys_free, values_ready, values_free)
    columns = (head * q_nope_stride, head * q_rope_stride, head * k_nope_stride, head * value_stride)
    masking = (mask, num_tokens, (num_keys + 31) // 32, num_computed, mask_vectors, mask_stride)
    results = (out, head * N)
    gl.warp_specialize(
        [
            (_attend, (0, masking, buffers, barriers, results, first_query, num_blocks, scale, HAS_MASK, HAS_VECTORS)),
            (_attend, (1, masking, buffers, barriers, results, first_query, num_blocks, scale, HAS_MASK, HAS_VECTORS)),
            (_copy, (q_nope, q_rope, k_nope, k_rope, value, buffers, barriers, columns, first_query, num_blocks)),
        ],
        [4, 1],
        [GROUP_REGISTERS, COPY_REGISTERS],
    )


@gluon.jit
def _copy(q_nope, q_rope, k_nope, k_rope, value, buffers, barriers, columns, first_query, num_blocks):
    """In the order in which it is needed: the keys of a block before the values of the one before."""
    q_nopes, q_ropes, k_nopes, k_ropes, values = buffers
    queries_ready, keys_ready, keys_free, values_ready, values_free = barriers
    q_nope_column, q_rope_column, k_column, v_column = columns
    mbarrier.expect(queries_ready, NUM_GROUPS * (q_nope.block_type.nbytes + q_rope.block_type.nbytes))
    for group in gl.static_range(NUM_GROUPS):
        row = first_query + group * GROUP_QUERIES
        tma.async_copy_global_to_shared(q_nope, [row, q_nope_column], queries_ready, q_nopes.index(group))
        tma.async_copy_global_to_shared(q_rope, [row, q_rope_column], queries_ready, q_ropes.index(group))
    for block in range(num_blocks + 1):
        buffer = block % 2
        if block < num_blocks:
            row = block * BLOCK_KEYS
            mbarrier.wait(keys_free.index(buffer), block // 2 % 2 ^ 1)  # the first turns pass at once
            ready = keys_ready.index(buffer)
            mbarrier.expect(ready, k_nope.block_type.nbytes + k_rope.block_type.nbytes)
            tma.async_copy_global_to_shared(k_nope, [row, k_column], ready, k_nopes.index(buffer))
            tma.async_copy_global_to_shared(k_rope, [row, 0], ready, k_ropes.index(buffer))
        if block > 0:
            before = block - 1
            mbarrier.wait(values_free.index(1 - buffer), before // 2 % 2 ^ 1)
            ready = values_ready.index(1 - buffer)
            mbarrier.expect(ready, value.block_type.nbytes)
            tma.async_copy_global_to_shared(value, [before * BLOCK_KEYS, v_column], ready, values.index(1 - buffer))


@gluon.jit
def _attend(
    group: gl.constexpr,
    masking,
    buffers,
    barriers,
    results,
    first_query,
    num_blocks,
    scale,
    HAS_MASK: gl.constexpr,  # noqa: N803
    HAS_VECTORS: gl.constexpr,  # noqa: N803
):
    """NOTE(order): waiting for a barrier is a loop, which ends a block of instructions: without the waits where they
    are, ptxas moves the wait for the second product before the softmax, and tests of mask bits before their scores."""
    q_nopes, q_ropes, k_nopes, k_ropes, values = buffers
    queries_ready, keys_ready, keys_free, values_ready, values_free = barriers
    dtype: gl.constexpr = values.dtype
    V: gl.constexpr = values.shape[2]  # noqa: N806
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])  # noqa: N806
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)  # noqa: N806
    q_nope = q_nopes.index(group)
    q_rope = q_ropes.index(group)
    group_query = first_query + group * GROUP_QUERIES
    no_scores = gl.full([GROUP_QUERIES, BLOCK_KEYS], 0.0, gl.float32, layout=SCORES)
    lowest = gl.full([GROUP_QUERIES], LOWEST, gl.float32, layout=gl.SliceLayout(1, SCORES))

    words = _load_words(masking, 0, group_query, HAS_MASK, HAS_VECTORS)
    mbarrier.wait(queries_ready, 0)
    mbarrier.wait(keys_ready.index(0), 0)
    scores = warpgroup_mma(q_nope, k_nopes.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma(q_rope, k_ropes.index(0).permute((1, 0)), scores, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(keys_free.index(0), count=1)
    mbarrier.wait(values_ready.index(0), 0)
    scores = _hide(scores, words)
    highest = gl.maximum(lowest, gl.max(scores, axis=1))
    shares = gl.exp2(scores * scale - gl.expand_dims(highest * scale, 1))
    share_sum = gl.sum(shares, axis=1)
    weights = gl.convert_layout(shares.to(dtype), WEIGHTS)
    total = gl.full([GROUP_QUERIES, V], 0.0, gl.float32, layout=SUMS)
    mbarrier.wait(keys_ready.index(1), 0, pred=num_blocks > 1)

    for block in range(1, num_blocks):
        buffer = block % 2
        words = _load_words(masking, block, group_query, HAS_MASK, HAS_VECTORS)
        scores = warpgroup_mma(q_nope, k_nopes.index(buffer).permute((1, 0)), no_scores, use_acc=False, is_async=True)
        scores = warpgroup_mma(q_rope, k_ropes.index(buffer).permute((1, 0)), scores, is_async=True)
        total = warpgroup_mma(weights, values.index(1 - buffer), total, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(keys_free.index(buffer), count=1)
        mbarrier.wait(values_ready.index(buffer), block // 2 % 2)
        scores = _hide(scores, words)
        new_highest = gl.maximum(highest, gl.max(scores, axis=1))
        shrink = gl.exp2((highest - new_highest) * scale)
        shares = gl.exp2(scores * scale - gl.expand_dims(new_highest * scale, 1))
        highest = new_highest
        share_sum = share_sum * shrink + gl.sum(shares, axis=1)
        mbarrier.wait(keys_ready.index(1 - buffer), (block + 1) // 2 % 2, pred=block + 1 < num_blocks)
        total, weights = warpgroup_mma_wait(0, deps=[total, weights])
        mbarrier.arrive(values_free.index(1 - buffer), count=1)
        weights = gl.convert_layout(shares.to(dtype), WEIGHTS)
        total *= gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, SUMS)), 1)

    total = warpgroup_mma(weights, values.index((num_blocks - 1) % 2), total, is_async=True)
    total, weights = warpgroup_mma_wait(0, deps=[total, weights])

    divisor = gl.convert_layout(gl.where(share_sum == 0.0, 1.0, share_sum), gl.SliceLayout(1, SUMS))
    q_nope.store((total / gl.expand_dims(divisor, 1)).to(dtype))  # the queries are not needed any more
    fence_async_shared()
    BARRIER()
    out, column = results
    tma.async_copy_shared_to_global(out, [group_query, column], q_nope)
    tma.store_wait(0)


@gluon.jit
def _load_words(
    masking,
    block,
    first_query,
    HAS_MASK: gl.constexpr,  # noqa: N803
    HAS_VECTORS: gl.constexpr,  # noqa: N803
):
    """Which of the block's keys each row attends to: [rows, BLOCK_WORDS] int32."""
    mask, num_tokens, num_words, num_computed, mask_vectors, mask_stride = masking
    row = first_query + gl.arange(0, GROUP_QUERIES, layout=gl.SliceLayout(1, WORDS))
    word = gl.arange(0, BLOCK_WORDS, layout=gl.SliceLayout(0, WORDS))
    if HAS_MASK:
        is_row = gl.expand_dims(row < num_tokens, 1)
        is_word = gl.expand_dims(block * BLOCK_WORDS + word < num_words, 0)
        columns = gl.expand_dims(block * BLOCK_WORDS + word, 0)
        if HAS_VECTORS:
            row_starts = gl.expand_dims(row * mask_vectors, 1) * BLOCK_WORDS
            words = gl.where(is_word, gl.load(mask + row_starts + columns, mask=is_row, other=0), 0)
        else:
            row_starts = gl.expand_dims(row * mask_stride, 1)
            words = gl.load(mask + row_starts + columns, mask=is_row & is_word, other=0)
    else:
        words = gl.full([GROUP_QUERIES, BLOCK_WORDS], -1, gl.int32, layout=WORDS)
        if (block + 1) * BLOCK_KEYS > num_computed + first_query + 1:
            # Bits below the number of visible keys; all of them where that is 32 or more.
            num_bits = gl.expand_dims(row + (num_computed + 1 - block * BLOCK_KEYS), 1) - gl.expand_dims(word * 32, 0)
            num_bits = gl.maximum(num_bits, 0)
            words = gl.where(num_bits < 32, (1 << (num_bits & 31)) - 1, -1)
    return words


@gluon.jit
def _hide(scores, words):
    """Minus infinity in the place of scores whose bit is 0.

    In integers: of comparisons the compiler makes a number with 16 truth values, which takes twice the instructions.
    """
    words = gl.convert_layout(words, gl.SliceLayout(2, BITS))
    spread = gl.expand_dims(words, 2) + gl.full([1, 1, 32], 0, gl.int32, layout=BITS)
    spread = gl.convert_layout(gl.reshape(spread, [GROUP_QUERIES, BLOCK_KEYS]), SCORES)
    places = gl.expand_dims(gl.arange(0, BLOCK_KEYS, layout=gl.SliceLayout(0, SCORES)), 0)
    # Its bit moved to the sign, then everywhere: -1 or 0.
    is_chosen = (spread << (LANE_BITS - (places & LANE_BITS))) << (REGISTER_BITS - (places & REGISTER_BITS)) >> 31
    hidden = gl.cast(scores, gl.int32, bitcast=True) & is_chosen | (MINUS_INFINITY & ~is_chosen)
    return gl.cast(hidden, gl.float32, bitcast=True)
