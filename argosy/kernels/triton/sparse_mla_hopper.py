"""The loop of ``sparse_mla.py`` written out by hand for Hopper cards: 64 heads, 16-bit queries. Same arguments.

What the compiler's own pipelining does not do: both warp groups share the scores of a block of keys (it lets each
compute them all), and the next block's rows are on their way during the whole of this one's work, in the other of two
buffers; encoded rows wait in registers, and are decoded while the tensor cores add up this block.
Invariant: a buffer is written only behind the barrier that follows the last product which read it.

Shape letters: those of ``sparse_mla.py``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

LOWEST = gl.constexpr(-3.0e38)
# Of 8 warps: 32 rows at a time, 8 lanes a row, 16 bytes a lane.
ROWS_16_BITS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
GROUPS_8_BITS = gl.constexpr(gl.BlockedLayout([1, 1, 16], [4, 1, 8], [8, 1, 1], [2, 1, 0]))  # [rows, groups, numbers]
SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))
BARRIER = gl.barrier if "barrier" in vars(gl) else gl.thread_barrier  # Triton 3.7's name, 3.6's


@gluon.jit(do_not_specialize_on_alignment=["num_shares"])
def attend_on_hopper(
    query,
    numbers,
    scales,
    ropes,
    slots,
    out,
    log_sums,
    scale,
    heads,
    num_keys,
    slot_stride,
    token_stride,
    head_stride,
    share_keys,
    num_shares,
    R: gl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    P: gl.constexpr,  # noqa: N803
    WIDTH: gl.constexpr,  # noqa: N803
    GROUP_SIZE: gl.constexpr,  # noqa: N803
    BLOCK_HEADS: gl.constexpr,  # noqa: N803
    BLOCK_KEYS: gl.constexpr,  # noqa: N803
    SHARE_SIZE: gl.constexpr,  # noqa: N803
    IS_FULL: gl.constexpr,  # noqa: N803
    IS_SHARE: gl.constexpr,  # noqa: N803
):
    # Warp groups divide the keys of the scores, and the R of the sums.
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_KEYS // 2, 16])  # noqa: N806
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, R // 2, 16])  # noqa: N806
    dtype: gl.constexpr = query.dtype.element_ty
    num_head_blocks = (heads + BLOCK_HEADS - 1) // BLOCK_HEADS
    first_head = (gl.program_id(0) % num_head_blocks) * BLOCK_HEADS
    part = (gl.program_id(0) // num_head_blocks).to(gl.int64)  # of all tokens' shares
    token = part // num_shares
    start = (part % num_shares).to(gl.int32) * share_keys
    stop = gl.minimum(start + share_keys, num_keys)
    token_slots = slots + token * slot_stride

    q_latent = gl.allocate_shared_memory(dtype, [BLOCK_HEADS, R], SHARED)
    q_rope = gl.allocate_shared_memory(dtype, [BLOCK_HEADS, P], SHARED)
    latents = gl.allocate_shared_memory(dtype, [2, BLOCK_KEYS, R], SHARED)
    k_ropes = gl.allocate_shared_memory(dtype, [2, BLOCK_KEYS, P], SHARED)
    shared_weights = gl.allocate_shared_memory(dtype, [BLOCK_HEADS, BLOCK_KEYS], SHARED)

    head_ids = first_head + gl.arange(0, BLOCK_HEADS, layout=gl.SliceLayout(1, ROWS_16_BITS))
    is_head = gl.expand_dims(head_ids < heads, 1)
    queries = query + token * token_stride + gl.expand_dims(head_ids, 1) * head_stride
    async_copy.async_copy_global_to_shared(q_latent, queries + _columns(R, ROWS_16_BITS), mask=is_head)
    async_copy.async_copy_global_to_shared(q_rope, queries + (R + _columns(P, ROWS_16_BITS)), mask=is_head)
    async_copy.commit_group()
    if not IS_FULL:  # what is behind the last known slot is skipped
        places = start + gl.arange(0, SHARE_SIZE, layout=LINE)
        is_known = gl.load(token_slots + places, mask=places < stop, other=-1) >= 0
        stop = gl.max(gl.where(is_known, places + 1, start), axis=0)
    # One block at least: with a loop that may not run, the compiler lets the tensor cores wait for each product.
    num_blocks = gl.maximum((stop - start + BLOCK_KEYS - 1) // BLOCK_KEYS, 1)

    highest = gl.full([BLOCK_HEADS], LOWEST, gl.float32, layout=gl.SliceLayout(1, SCORES))
    no_scores = gl.full([BLOCK_HEADS, BLOCK_KEYS], 0.0, gl.float32, layout=SCORES)
    weight_sum = gl.full([BLOCK_HEADS], 0.0, gl.float32, layout=gl.SliceLayout(1, SCORES))
    total = warpgroup_mma_init(gl.full([BLOCK_HEADS, R], 0.0, gl.float32, layout=SUMS))
    keys = start + gl.arange(0, BLOCK_KEYS, layout=gl.SliceLayout(1, ROWS_16_BITS))
    score_keys = start + gl.arange(0, BLOCK_KEYS, layout=gl.SliceLayout(0, SCORES))
    if GROUP_SIZE == 0:
        _copy_rows(numbers, token_slots, keys, stop, latents.index(0), k_ropes.index(0), R, P, WIDTH)
    else:
        values, value_scales, rope = _load_rows(
            numbers, scales, ropes, token_slots, keys, stop, dtype, R, P, WIDTH, GROUP_SIZE
        )
        _store_rows(values, value_scales, rope, latents.index(0), k_ropes.index(0), R)
    for block in range(num_blocks):
        buffer = block % 2
        latent = latents.index(buffer)
        async_copy.wait_group(0)
        total_so_far = warpgroup_mma_wait(0, deps=[total])
        fence_async_shared()
        BARRIER()
        scores = warpgroup_mma(q_latent, latent.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        scores = warpgroup_mma(q_rope, k_ropes.index(buffer).permute((1, 0)), scores, is_async=True)
        keys += BLOCK_KEYS
        if GROUP_SIZE == 0:
            _copy_rows(
                numbers, token_slots, keys, stop, latents.index(1 - buffer), k_ropes.index(1 - buffer), R, P, WIDTH
            )
        else:
            values, value_scales, rope = _load_rows(
                numbers, scales, ropes, token_slots, keys, stop, dtype, R, P, WIDTH, GROUP_SIZE
            )
        is_key = gl.load(token_slots + score_keys, mask=score_keys < stop, other=-1) >= 0
        score_keys += BLOCK_KEYS
        scores = warpgroup_mma_wait(0, deps=[scores])
        scores = gl.where(gl.expand_dims(is_key, 0), scores * scale, float("-inf"))
        new_highest = gl.maximum(highest, gl.max(scores, axis=1))
        shrink = gl.exp2(highest - new_highest)
        weights = gl.exp2(scores - gl.expand_dims(new_highest, 1))
        shared_weights.store(weights.to(dtype))
        highest = new_highest
        total_so_far *= gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, SUMS)), 1)
        fence_async_shared()
        BARRIER()
        total = warpgroup_mma(shared_weights, latent, total_so_far, is_async=True)
        weight_sum = weight_sum * shrink + gl.sum(weights, axis=1)
        if GROUP_SIZE > 0:
            _store_rows(values, value_scales, rope, latents.index(1 - buffer), k_ropes.index(1 - buffer), R)
    total = warpgroup_mma_wait(0, deps=[total])
    async_copy.wait_group(0)

    is_empty = weight_sum == 0.0
    divisor = gl.convert_layout(gl.where(is_empty, 1.0, weight_sum), gl.SliceLayout(1, SUMS))
    total = total / gl.expand_dims(divisor, 1)
    sum_heads = first_head + gl.arange(0, BLOCK_HEADS, layout=gl.SliceLayout(1, SUMS))
    places = gl.expand_dims(part * heads + sum_heads, 1) * R + _columns(R, SUMS)
    gl.store(out + places, total.to(out.dtype.element_ty), mask=gl.expand_dims(sum_heads < heads, 1))
    if IS_SHARE:
        score_heads = first_head + gl.arange(0, BLOCK_HEADS, layout=gl.SliceLayout(1, SCORES))
        log_sum = gl.where(is_empty, LOWEST, highest + gl.log2(gl.where(is_empty, 1.0, weight_sum)))
        gl.store(log_sums + part * heads + score_heads, log_sum, mask=score_heads < heads)


@gluon.jit
def _columns(size: gl.constexpr, layout: gl.constexpr):
    return gl.expand_dims(gl.arange(0, size, layout=gl.SliceLayout(0, layout)), 0)


@gluon.jit
def _copy_rows(
    numbers,
    token_slots,
    keys,
    stop,
    latent,
    k_rope,
    R: gl.constexpr,  # noqa: N803
    P: gl.constexpr,  # noqa: N803
    WIDTH: gl.constexpr,  # noqa: N803
):
    # Rows of no key become zeros.
    slot = gl.load(token_slots + keys, mask=keys < stop, other=-1)
    is_key = gl.expand_dims(slot >= 0, 1)
    rows = numbers + gl.expand_dims(slot, 1) * WIDTH
    async_copy.async_copy_global_to_shared(latent, rows + _columns(R, ROWS_16_BITS), mask=is_key)
    async_copy.async_copy_global_to_shared(k_rope, rows + (R + _columns(P, ROWS_16_BITS)), mask=is_key)
    async_copy.commit_group()


@gluon.jit
def _load_rows(
    numbers,
    scales,
    ropes,
    token_slots,
    keys,
    stop,
    dtype: gl.constexpr,
    R: gl.constexpr,  # noqa: N803
    P: gl.constexpr,  # noqa: N803
    WIDTH: gl.constexpr,  # noqa: N803
    GROUP_SIZE: gl.constexpr,  # noqa: N803
):
    """Of encoded rows: numbers [rows, groups, GROUP_SIZE], their scales [rows, groups], and [rows, P]."""
    NUM_GROUPS: gl.constexpr = R // GROUP_SIZE  # noqa: N806
    ROPE_START: gl.constexpr = (R + 4 * NUM_GROUPS) // 2  # noqa: N806
    slot = gl.load(token_slots + keys, mask=keys < stop, other=-1)
    is_key = gl.expand_dims(slot >= 0, 1)
    rope_places = gl.expand_dims(slot, 1) * (WIDTH // 2) + (ROPE_START + _columns(P, ROWS_16_BITS))
    rope = gl.load(ropes + rope_places, mask=is_key, other=0.0).to(dtype)

    GROUPS: gl.constexpr = gl.SliceLayout(2, GROUPS_8_BITS)  # noqa: N806
    row = gl.expand_dims(gl.convert_layout(slot, gl.SliceLayout(1, GROUPS)), 1)
    is_row = row >= 0
    groups = gl.expand_dims(gl.arange(0, NUM_GROUPS, layout=gl.SliceLayout(0, GROUPS)), 0)
    value_scales = gl.load(scales + row * (WIDTH // 4) + (R // 4 + groups), mask=is_row, other=0.0)
    columns = gl.arange(0, GROUP_SIZE, layout=gl.SliceLayout(0, gl.SliceLayout(1, GROUPS_8_BITS)))
    columns = gl.expand_dims(gl.expand_dims(columns, 0), 1)
    places = gl.expand_dims(row * WIDTH + groups * GROUP_SIZE, 2) + columns
    values = gl.load(numbers + places, mask=gl.expand_dims(is_row, 2), other=0.0)
    return values, value_scales, rope


@gluon.jit
def _store_rows(values, value_scales, rope, latent, k_rope, R: gl.constexpr):  # noqa: N803
    decoded = values.to(gl.float32) * gl.expand_dims(value_scales, 2)
    latent.store(gl.reshape(decoded.to(latent.dtype), [values.shape[0], R]))
    k_rope.store(rope)
