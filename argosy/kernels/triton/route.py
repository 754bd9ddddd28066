"""The noaux_tc router in one launch: choice and weights never leave registers.

The launch before it multiplies (``linear_fp32.py``); this one adds its parts of K on the way. Torch on CUDA promises no
order among equal scores; here they go to the lowest id, groups and experts alike. Invariant: a token's choice depends
on its own logits alone, and experts of groups that were not chosen come after all others.

Shape letters: T tokens, E experts, K experts per token, G groups, D hidden, S parts of D.
"""

import torch
import triton
import triton.language as tl

from argosy.kernels.triton.dependent_launch import IS_ON, let_next_start, wait_for_inputs

# Tokens of a program: one of a decode step; more, whose work overlaps, in prefill (not measured yet).
FEW_TOKENS = 128
FEW_TOKENS_BLOCK, MANY_TOKENS_BLOCK = 1, 4
NUM_WARPS = 1  # holds all experts of a token, so that no reduction crosses warps
# Parts on their way at once, and registers that few tokens' threads may have: else ptxas asks for a part only when
# another has come. 64 tokens on an H200 3.0 us; before 4.6. In a variant 7 parts took 0.5 us more, 28 0.2 less.
FEW_TOKENS_PARTS, MANY_TOKENS_PARTS = 14, 4
MAX_REGISTERS = 240
LOG2_E: tl.constexpr = tl.constexpr(1.4426950216293335)  # as float32 holds it
LOG2_E_REST: tl.constexpr = tl.constexpr(1.9259629911266175e-08)
ROUNDER: tl.constexpr = tl.constexpr(12582912.0)  # added to numbers below 2^22, it leaves no fraction
DROPPED: tl.constexpr = tl.constexpr(-0x7F800001)  # the place of -inf among the keys that ``_order`` makes
REMOVED: tl.constexpr = tl.constexpr(-(2**31))  # below every number's
MAX_DIVISOR: tl.constexpr = tl.constexpr(2.0**126)
IS_COMPILED: tl.constexpr = tl.constexpr(not triton.knobs.runtime.interpret)


def route_grouped_topk(
    router_logits: torch.Tensor,
    correction_bias: torch.Tensor,
    *,
    n_group: int,
    topk_group: int,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.route_grouped_topk``. ``router_logits: [T, E]`` float32, rows contiguous."""
    return route_parts(
        router_logits.unsqueeze(0),
        correction_bias,
        n_group=n_group,
        topk_group=topk_group,
        num_experts_per_tok=num_experts_per_tok,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=routed_scaling_factor,
    )


def route_parts(
    parts: torch.Tensor,
    correction_bias: torch.Tensor,
    *,
    n_group: int,
    topk_group: int,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``parts: [S, T, E]`` float32, contiguous: the logits are their sum, in the order of S. Bit for bit what
    ``route_grouped_topk`` makes of ``device_linear.linear_fp32``'s logits."""
    num_parts, num_tokens, num_experts = parts.shape
    topk_ids = torch.empty(num_tokens, num_experts_per_tok, dtype=torch.int32, device=parts.device)
    topk_weights = torch.empty(num_tokens, num_experts_per_tok, dtype=torch.float32, device=parts.device)
    if num_tokens == 0:
        return topk_ids, topk_weights
    is_few = num_tokens <= FEW_TOKENS
    block = FEW_TOKENS_BLOCK if is_few else MANY_TOKENS_BLOCK
    _route_kernel[(triton.cdiv(num_tokens, block),)](
        parts,
        correction_bias,
        topk_ids,
        topk_weights,
        num_tokens,
        parts.stride(0),
        parts.stride(1),
        routed_scaling_factor,
        topk_group,
        num_experts_per_tok,
        NUM_PARTS=num_parts,
        NUM_GROUPS=n_group,
        GROUP_SIZE=num_experts // n_group,
        PADDED_GROUPS=triton.next_power_of_2(n_group),
        PADDED_SIZE=triton.next_power_of_2(num_experts // n_group),
        PADDED_IDS=triton.next_power_of_2(num_experts_per_tok),
        IS_NORMED=norm_topk_prob,
        BLOCK_TOKENS=block,
        PARTS_AT_ONCE=min(num_parts, FEW_TOKENS_PARTS if is_few else MANY_TOKENS_PARTS),
        maxnreg=MAX_REGISTERS if is_few else None,
        num_warps=NUM_WARPS,
        launch_pdl=IS_ON,
    )
    return topk_ids, topk_weights


@triton.jit(do_not_specialize=["num_tokens", "topk_group", "num_ids"])
def _route_kernel(
    parts,
    correction_bias,
    topk_ids,
    topk_weights,
    num_tokens,
    part_stride,
    row_stride,
    scaling_factor,
    topk_group,
    num_ids,
    NUM_PARTS: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    NUM_GROUPS: tl.constexpr,  # noqa: N803
    GROUP_SIZE: tl.constexpr,  # noqa: N803
    PADDED_GROUPS: tl.constexpr,  # noqa: N803
    PADDED_SIZE: tl.constexpr,  # noqa: N803
    PADDED_IDS: tl.constexpr,  # noqa: N803
    IS_NORMED: tl.constexpr,  # noqa: N803
    BLOCK_TOKENS: tl.constexpr,  # noqa: N803
    PARTS_AT_ONCE: tl.constexpr,  # noqa: N803
):
    """Experts stand as [groups, group's size], each padded to a power of two; an id counts real experts only.

    The numbers of rounds are no constants, so that rounds are loops: unrolled, each of their instructions would be
    fetched from memory to be run once.
    """
    let_next_start()
    NUM_PLACES: tl.constexpr = PADDED_GROUPS * PADDED_SIZE  # noqa: N806
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    rows = tl.minimum(tokens, num_tokens - 1).to(tl.int64)
    places = tl.arange(0, NUM_PLACES)
    is_expert = (places // PADDED_SIZE < NUM_GROUPS) & (places % PADDED_SIZE < GROUP_SIZE)
    experts = (places // PADDED_SIZE) * GROUP_SIZE + places % PADDED_SIZE
    if NUM_GROUPS * GROUP_SIZE < NUM_PLACES:
        experts = tl.where(is_expert, experts, 0)
    slots = tl.arange(0, PADDED_IDS)
    bias = tl.load(correction_bias + experts)
    wait_for_inputs()
    sources = parts + (rows * row_stride)[:, None] + experts[None, :]
    scores = _sigmoid(_add_parts(sources, part_stride, NUM_PARTS, PARTS_AT_ONCE))
    biased = scores + bias[None, :]
    keys = tl.where(is_expert[None, :], _order(biased), REMOVED)
    if NUM_GROUPS > 1:
        grouped = tl.reshape(biased, (BLOCK_TOKENS, PADDED_GROUPS, PADDED_SIZE))
        is_chosen = _choose_groups(grouped, topk_group, NUM_GROUPS, GROUP_SIZE)
        is_chosen = tl.reshape(is_chosen, (BLOCK_TOKENS, NUM_PLACES))
        keys = tl.where((is_chosen > 0) | (keys == REMOVED), keys, DROPPED)
    chosen_ids, weights = _choose_experts(keys, scores, num_ids, GROUP_SIZE, PADDED_SIZE, PADDED_IDS)
    if IS_NORMED:
        weights = _divide(weights, tl.broadcast_to(tl.sum(weights, axis=1)[:, None], (BLOCK_TOKENS, PADDED_IDS)))
    entries = tokens[:, None].to(tl.int64) * num_ids + slots[None, :]
    is_entry = (tokens < num_tokens)[:, None] & (slots < num_ids)[None, :]
    tl.store(topk_ids + entries, chosen_ids, mask=is_entry)
    tl.store(topk_weights + entries, weights * scaling_factor, mask=is_entry)


@triton.jit
def _add_parts(
    sources,
    part_stride,
    NUM_PARTS: tl.constexpr,  # noqa: N803
    PARTS_AT_ONCE: tl.constexpr,  # noqa: N803
):
    """In their order. A loop, whose turns ask for several parts before they add the first of them."""
    logits = tl.zeros(sources.shape, dtype=tl.float32)
    for _ in tl.range(0, NUM_PARTS // PARTS_AT_ONCE):
        for _ in tl.static_range(PARTS_AT_ONCE):
            logits += tl.load(sources)
            sources += part_stride
    for _ in tl.static_range(NUM_PARTS % PARTS_AT_ONCE):
        logits += tl.load(sources)
        sources += part_stride
    return logits


@triton.jit
def _choose_groups(
    grouped,
    topk_group,
    NUM_GROUPS: tl.constexpr,  # noqa: N803
    GROUP_SIZE: tl.constexpr,  # noqa: N803
):
    """``grouped: [tokens, groups, size]`` -> 1 for experts of the chosen groups, else 0, in the same shape."""
    groups = tl.arange(0, grouped.shape[1])
    members = tl.arange(0, grouped.shape[2])
    is_expert = (groups < NUM_GROUPS)[:, None] & (members < GROUP_SIZE)[None, :]
    grouped = tl.where(is_expert[None, :, :], grouped, float("-inf"))
    best = tl.max(grouped, axis=2)
    is_best = grouped == best[:, :, None]
    others = tl.max(tl.where(is_best, float("-inf"), grouped), axis=2)
    second = tl.where(tl.sum(is_best.to(tl.int32), axis=2) > 1, best, others)
    keys = tl.where((groups < NUM_GROUPS)[None, :], _order(best + second), REMOVED)
    is_lower = (groups[:, None] < groups[None, :])[None, :, :]
    is_before = (keys[:, :, None] > keys[:, None, :]) | ((keys[:, :, None] == keys[:, None, :]) & is_lower)
    is_chosen = (tl.sum(is_before.to(tl.int32), axis=1) < topk_group).to(tl.int32)
    return tl.broadcast_to(is_chosen[:, :, None], grouped.shape)


@triton.jit
def _choose_experts(
    keys,
    scores,
    num_rounds,
    GROUP_SIZE: tl.constexpr,  # noqa: N803
    PADDED_SIZE: tl.constexpr,  # noqa: N803
    PADDED_IDS: tl.constexpr,  # noqa: N803
):
    """``keys``, ``scores``: [tokens, places] -> ids and scores of those with the highest keys: [tokens, ids]."""
    places = tl.arange(0, keys.shape[1])
    slots = tl.arange(0, PADDED_IDS)
    chosen_ids = tl.zeros((keys.shape[0], PADDED_IDS), dtype=tl.int32)
    weights = tl.zeros((keys.shape[0], PADDED_IDS), dtype=tl.float32)
    bits = scores.to(tl.int32, bitcast=True)
    for slot in tl.range(0, num_rounds):
        highest = tl.max(keys, axis=1)
        place = tl.min(tl.where(keys == highest[:, None], places[None, :], keys.shape[1]), axis=1)
        is_mine = places[None, :] == place[:, None]
        keys = tl.where(is_mine, REMOVED, keys)
        score = tl.max(tl.where(is_mine, bits, 0), axis=1).to(tl.float32, bitcast=True)
        expert = (place // PADDED_SIZE) * GROUP_SIZE + place % PADDED_SIZE
        chosen_ids = tl.where(slots[None, :] == slot, expert[:, None], chosen_ids)
        weights = tl.where(slots[None, :] == slot, score[:, None], weights)
    return chosen_ids, weights


@triton.jit
def _order(values):
    """float32 -> int32 that compare alike, so that a warp finds the highest in one instruction; -0.0 as 0.0."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _sigmoid(values):
    # NOTE(numerics): the card's power of two is exact to 2^-22 near 0 only, and a product far from 0 has lost as much.
    # With both mended near ties are decided as torch decides them.
    turns = values * -LOG2_E
    whole = (turns + ROUNDER) - ROUNDER
    fraction = (turns - whole) + (tl.fma(values, -LOG2_E, -turns) - values * LOG2_E_REST)
    # Scores below 2^-126 stand as 2^-126.
    divisors = 1.0 + tl.exp2(fraction) * tl.exp2(whole)
    divisors = tl.minimum(divisors, MAX_DIVISOR, propagate_nan=tl.PropagateNan.ALL)
    return _divide(tl.full(values.shape, 1.0, tl.float32), divisors)


@triton.jit
def _divide(values, divisors):
    """As ``tl.div_rn``, which is a branch a number and a subroutine; ``divisors`` lie between 2^-126 and 2^126."""
    # NOTE(numerics): the card's reciprocal is off by its last bits; each fma mends one error, exactly computed.
    if IS_COMPILED:
        inverses = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [divisors], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverses = 1.0 / divisors
    inverses = tl.fma(inverses, tl.fma(-divisors, inverses, 1.0), inverses)
    quotients = values * inverses
    return tl.fma(inverses, tl.fma(-divisors, quotients, values), quotients)
