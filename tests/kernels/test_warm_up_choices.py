"""What kernels choose at DeepSeek-V3.2's sizes, for every number that a step can have, is chosen by a trial too.

Needs Triton, whose modules hold the choices, and no card.
"""

from collections.abc import Callable, Hashable

import pytest
import torch

from argosy.runner.warm_up import LONGEST_MASKED, WarmUpSizes, ladder, plan_warm_up

pytest.importorskip("triton")

from argosy.kernels.triton import (  # noqa: E402 - after the check that there is a Triton
    arrange_chunks,
    arrange_rows,
    fp8_gemm,
    linear_fp32,
    masked_mla,
    quantize_groups,
    route,
    sparse_mla,
    topk,
    w8a8_few_rows,
    w8a8_gemm,
)

NUM_MULTIPROCESSORS = 132
# (in, out)
LINEARS = (
    *((7168, 2240), (7168, 4096), (7168, 36864), (1536, 8192), (1536, 24576)),
    *((2048, 7168), (16384, 7168), (18432, 7168)),
)
TOP_K, HEADS, HEAD_BLOCK, KEY_BLOCK, INDEX_TOPK = 8, 128, 64, 64, 2048
NUMS_EXPERTS = (256, 16)  # of one rank, and of one of sixteen, which gets as many rows
DIMS = masked_mla.Dims(512, 128, 64, 128)
LIMITS = (256, 2048, 8192, 16384)


def choose_int8_linears(num_tokens: int) -> Hashable:
    if num_tokens > w8a8_few_rows.MAX_ROWS:
        return w8a8_gemm.choose_tile(num_tokens, 1, False, is_hopper=True)
    tiles = [w8a8_few_rows.choose_tile(num_tokens, size, NUM_MULTIPROCESSORS) for _, size in LINEARS]
    splits = [
        w8a8_few_rows.choose_split(tile, *sizes, NUM_MULTIPROCESSORS)
        for tile, sizes in zip(tiles, LINEARS, strict=True)
        if isinstance(tile, w8a8_few_rows.SplitTile)
    ]
    return tuple(tiles), tuple(splits)


def choose_int8_experts(num_tokens: int) -> Hashable:
    return tuple(
        w8a8_gemm.choose_tile(TOP_K * num_tokens, num_experts, is_gated, is_hopper)
        for num_experts in NUMS_EXPERTS
        for is_gated in (False, True)
        for is_hopper in (False, True)
    )


def choose_fp8_linear(sizes: tuple[int, int]) -> Callable[[int], Hashable]:
    def choose(num_tokens: int) -> Hashable:
        tile = fp8_gemm.choose_tile(num_tokens, 1, False)
        shape, num_programs = torch.Size((num_tokens, sizes[0])), NUM_MULTIPROCESSORS * tile.num_programs
        return tile, fp8_gemm.choose_num_splits(tile, shape, sizes[1], num_programs) > 1

    return choose


def choose_fp8_experts(num_tokens: int) -> Hashable:
    return tuple(
        fp8_gemm.choose_tile(TOP_K * num_tokens, num_experts, is_gated)
        for num_experts in NUMS_EXPERTS
        for is_gated in (False, True)
    )


def choose_around_linears(num_tokens: int) -> Hashable:
    """Router, index weights, what arranges and quantises rows."""
    router, narrow = (linear_fp32.choose_tile(num_tokens, size, torch.float32) for size in (256, 64))
    return router, narrow, num_tokens <= route.FEW_TOKENS


CHOICES: dict[str, Callable[[int], Hashable]] = {
    "int8 linears": choose_int8_linears,
    "int8 experts": choose_int8_experts,
    **{f"fp8 {sizes}": choose_fp8_linear(sizes) for sizes in LINEARS},
    "fp8 experts": choose_fp8_experts,
    "around": choose_around_linears,
    "head": lambda num_tokens: linear_fp32.choose_tile(num_tokens, 129280, torch.bfloat16),
    "arrange": lambda num_tokens: TOP_K * num_tokens <= arrange_rows.MAX_ENTRIES,
    "arrange a share": lambda num_tokens: arrange_chunks.choose_table(TOP_K * 16 * num_tokens, 16, 256),
    "groups": lambda num_tokens: quantize_groups.choose_block_rows(num_tokens),
    "expert groups": lambda num_tokens: quantize_groups.choose_block_rows(TOP_K * num_tokens),
}


def sizes_of(limit: int, max_num_seqs: int = 256, max_model_len: int = 163840) -> WarmUpSizes:
    return WarmUpSizes(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=limit,
        max_model_len=max_model_len,
        index_topk=INDEX_TOPK,
    )


@pytest.mark.parametrize("name", CHOICES)
def test_every_number_of_tokens_chooses_as_a_trial_does(name: str) -> None:
    choose = CHOICES[name]
    for limit in LIMITS:
        visited = {
            choose(number)
            for number in {sum(scheduled for _, scheduled in trial) for trial in plan_warm_up(sizes_of(limit))}
        }
        missed = [number for number in range(1, limit + 1) if choose(number) not in visited]
        assert not missed, (limit, missed[:5])


def test_every_share_of_keys_is_chosen_by_a_trial() -> None:
    def choose(num_tokens: int, num_keys: int) -> int:
        blocks = -(-num_keys // KEY_BLOCK)
        return sparse_mla.choose_num_shares(num_tokens, HEADS // HEAD_BLOCK, blocks, NUM_MULTIPROCESSORS)

    visited = {
        choose(len(trial), INDEX_TOPK)
        for trial in plan_warm_up(sizes_of(8192))
        if all(scheduled == 1 for _, scheduled in trial)
        and max(computed + scheduled for computed, scheduled in trial) > INDEX_TOPK
    }
    for num_tokens in range(1, 257):
        for num_keys in range(16, INDEX_TOPK + 1, 16):
            assert choose(num_tokens, num_keys) in visited, (num_tokens, num_keys)


def chosen_positions(num_tokens: int, num_computed: int) -> set[Hashable]:
    """Of a prompt's chunk that needs a choice, every launch: as bits or as slots, thinned before or not, in a block of
    how many scores, for few programs?"""
    width = num_computed + num_tokens
    if masked_mla.is_faster_than_sparse(num_tokens, num_computed, INDEX_TOPK, DIMS):
        return {("mask", topk._block_of(width), num_tokens < 2 * NUM_MULTIPROCESSORS)}
    launches: set[Hashable] = set()
    is_thinned = False
    while width > topk.MAX_BLOCK:
        num_chunks = -(-width // topk.CHUNK)
        launches.add(("thin", is_thinned, num_tokens * num_chunks < 2 * NUM_MULTIPROCESSORS))
        is_thinned, width = True, num_chunks * INDEX_TOPK
    return launches | {("slots", is_thinned, topk._block_of(width), num_tokens < 2 * NUM_MULTIPROCESSORS)}


def test_masks_are_for_contexts_behind_which_the_largest_chunk_is_tried() -> None:
    assert masked_mla.MAX_KEYS <= LONGEST_MASKED


@pytest.mark.parametrize("limit", LIMITS)
def test_every_choice_of_positions_is_made_by_a_trial(limit: int) -> None:
    visited = {
        launch
        for trial in plan_warm_up(sizes_of(limit))
        for computed, scheduled in trial
        if scheduled > 1 and computed + scheduled > INDEX_TOPK
        for launch in chosen_positions(scheduled, computed)
    }
    for num_tokens in (*range(2, min(limit, 400)), *range(400, limit, 37), limit):
        for width in (*range(INDEX_TOPK + 1, 20000, 61), *(1 << power for power in range(12, 18)), 70001, 163840):
            if num_tokens <= width:
                missed = chosen_positions(num_tokens, width - num_tokens) - visited
                assert not missed, (num_tokens, width, missed)


@pytest.mark.parametrize(
    "sizes",
    [
        sizes_of(1, 1, 2),
        sizes_of(16, 300, 100),
        sizes_of(8192),
        sizes_of(100, 4, 40),
        sizes_of(300, 1, 163840),
        sizes_of(2000, 512, 2048),
    ],
    ids=str,
)
def test_trials_are_steps_that_the_engine_could_make(sizes: WarmUpSizes) -> None:
    trials = plan_warm_up(sizes)
    assert len(trials) == len(set(trials)) and trials
    for trial in trials:
        assert 1 <= len(trial) <= sizes.max_num_seqs, trial
        assert sum(scheduled for _, scheduled in trial) <= sizes.max_num_batched_tokens, trial
        assert all(scheduled >= 1 and computed >= 0 for computed, scheduled in trial), trial
        assert all(computed + scheduled <= sizes.max_model_len for computed, scheduled in trial), trial
        is_decode = [scheduled == 1 for _, scheduled in trial]
        assert is_decode == sorted(is_decode, reverse=True), trial


def test_the_ladder_ends_at_its_limit() -> None:
    assert ladder(1) == (1,)
    assert ladder(20) == (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 20)
    assert ladder(5000)[-3:] == (3072, 4096, 5000)
