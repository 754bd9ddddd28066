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
LOG2_E: tl.constexpr = tl.constexpr(1.4426950216293335)  # as float32 holds it
LOG2_E_REST: tl.constexpr = tl.constexpr(1.9259629911266175e-08)
ROUNDER: tl.constexpr = tl.constexpr(12582912.0)  # added to numbers below 2^22, it leaves no fraction
DROPPED: tl.constexpr = tl.constexpr(-0x7F800001)  # the place of -inf among the keys that ``_order`` makes
REMOVED: tl.constexpr = tl.constexpr(-(2**31))  # below every number's


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
    block = FEW_TOKENS_BLOCK if num_tokens <= FEW_TOKENS else MANY_TOKENS_BLOCK
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
):
    """Experts stand as [groups, group's size], each padded to a power of two; an id counts real experts only.

    The numbers of rounds are no constants, so that rounds are loops: unrolled, each of their instructions would be
    fetched from memory to be run once.
    """
    let_next_start()
    wait_for_inputs()
    NUM_PLACES: tl.constexpr = PADDED_GROUPS * PADDED_SIZE  # noqa: N806
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_token = tokens < num_tokens
    places = tl.arange(0, NUM_PLACES)
    is_expert = (places // PADDED_SIZE < NUM_GROUPS) & (places % PADDED_SIZE < GROUP_SIZE)
    experts = (places // PADDED_SIZE) * GROUP_SIZE + places % PADDED_SIZE
    is_inside = is_token[:, None] & is_expert[None, :]
    sources = parts + tokens[:, None].to(tl.int64) * row_stride + experts[None, :]
    logits = tl.load(sources, mask=is_inside, other=0.0)
    for _ in tl.static_range(NUM_PARTS - 1):
        sources += part_stride
        logits += tl.load(sources, mask=is_inside, other=0.0)
    scores = _sigmoid(logits)
    biased = scores + tl.load(correction_bias + experts, mask=is_expert, other=0.0)[None, :]
    keys = tl.where(is_expert[None, :], _order(biased), REMOVED)
    if NUM_GROUPS > 1:
        grouped = tl.reshape(biased, (BLOCK_TOKENS, PADDED_GROUPS, PADDED_SIZE))
        is_chosen = _choose_groups(grouped, topk_group, NUM_GROUPS, GROUP_SIZE)
        is_chosen = tl.reshape(is_chosen, (BLOCK_TOKENS, NUM_PLACES))
        keys = tl.where((is_chosen > 0) | (keys == REMOVED), keys, DROPPED)

    slots = tl.arange(0, PADDED_IDS)
    chosen_ids = tl.zeros((BLOCK_TOKENS, PADDED_IDS), dtype=tl.int32)
    weights = tl.zeros((BLOCK_TOKENS, PADDED_IDS), dtype=tl.float32)
    bits = scores.to(tl.int32, bitcast=True)
    for slot in tl.range(0, num_ids):
        highest = tl.max(keys, axis=1)
        place = tl.min(tl.where(keys == highest[:, None], places[None, :], NUM_PLACES), axis=1)
        is_mine = places[None, :] == place[:, None]
        keys = tl.where(is_mine, REMOVED, keys)
        score = tl.max(tl.where(is_mine, bits, 0), axis=1).to(tl.float32, bitcast=True)
        expert = (place // PADDED_SIZE) * GROUP_SIZE + place % PADDED_SIZE
        chosen_ids = tl.where(slots[None, :] == slot, expert[:, None], chosen_ids)
        weights = tl.where(slots[None, :] == slot, score[:, None], weights)
    if IS_NORMED:
        weights = tl.div_rn(weights, tl.broadcast_to(tl.sum(weights, axis=1)[:, None], (BLOCK_TOKENS, PADDED_IDS)))
    entries = tokens[:, None].to(tl.int64) * num_ids + slots[None, :]
    is_entry = is_token[:, None] & (slots < num_ids)[None, :]
    tl.store(topk_ids + entries, chosen_ids, mask=is_entry)
    tl.store(topk_weights + entries, weights * scaling_factor, mask=is_entry)


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
    first = tl.min(tl.where(grouped == best[:, :, None], members[None, None, :], grouped.shape[2]), axis=2)
    second = tl.max(tl.where(members[None, None, :] == first[:, :, None], float("-inf"), grouped), axis=2)
    keys = tl.where((groups < NUM_GROUPS)[None, :], _order(best + second), REMOVED)
    is_chosen = tl.zeros_like(keys)
    for _ in tl.range(0, topk_group):
        highest = tl.max(keys, axis=1)
        group = tl.min(tl.where(keys == highest[:, None], groups[None, :], grouped.shape[1]), axis=1)
        is_mine = groups[None, :] == group[:, None]
        keys = tl.where(is_mine, REMOVED, keys)
        is_chosen = tl.where(is_mine, 1, is_chosen)
    return tl.broadcast_to(is_chosen[:, :, None], grouped.shape)


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
    return tl.div_rn(1.0, 1.0 + tl.exp2(fraction) * tl.exp2(whole))
