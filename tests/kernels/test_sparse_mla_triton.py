"""Attention over chosen cache rows, in Triton, against its specification in float32.

On an NVIDIA card, or without one in Triton's interpreter, at small sizes:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_sparse_mla_triton.py

The loops that are written for Hopper alone run in an interpreter of their own (``tests/helpers/gluon_interpreter.py``),
and are compiled.
"""

import os
from types import ModuleType

import pytest
import torch

from argosy.kernels import reference
from argosy.kernels.reference_cache_rows import FP8, INT8, LatentRowLayout, NumberFormat, decode_latent, encode_latent
from tests.helpers.gluon_interpreter import load_interpreted

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
# The interpreter cuts bfloat16 where a card rounds.
DTYPES = (torch.float32,) if IS_INTERPRETED else (torch.float32, torch.bfloat16)
# Relative to the specification's norm. bfloat16: the result is rounded, and so are the weights before the second
# product.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
# R, P, K: argosy-tiny's and DeepSeek's; in the interpreter such that the last block of keys is short.
DIMS = ((32, 16, 40),) if IS_INTERPRETED else ((128, 16, 64), (512, 64, 2048))
HEADS = (20,) if IS_INTERPRETED else (8, 128)
NUMS_TOKENS = (0, 2) if IS_INTERPRETED else (0, 1, 7, 128, 200)
BLOCK_SIZE = 16
SCALE = 0.14
SHARED_BYTES = 232448  # what a program can have on a Hopper card

needs_device = pytest.mark.skipif(
    not IS_INTERPRETED and not torch.cuda.is_available(), reason="needs an NVIDIA card, or TRITON_INTERPRET=1"
)


@pytest.fixture
def fused() -> ModuleType:
    pytest.importorskip("triton")
    from argosy.kernels.triton import sparse_mla

    return sparse_mla


@pytest.fixture(params=("hopper", "portable") if IS_INTERPRETED else ("chosen",))
def tiles(request: pytest.FixtureRequest, fused: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Which loop runs: on a card the one that belongs there, in the interpreter either, with small tiles."""
    if not IS_INTERPRETED:
        return {}
    is_hopper = request.param == "hopper"
    if is_hopper:
        module = load_interpreted("argosy.kernels.triton.sparse_mla_hopper")
        monkeypatch.setattr(fused, "attend_on_hopper", module.attend_on_hopper)
    return {"tile": fused.Tile(16, 16, 1, 8, is_hopper)}


def draw(num_tokens: int, heads: int, dims: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Queries whose scores are well spread, a cache, and distinct slots of it."""
    rank, rope_dim, num_keys = dims
    torch.manual_seed(num_tokens + heads)
    query = torch.randn(num_tokens, heads, rank + rope_dim, device=DEVICE).mul_(2.0 / SCALE / (rank + rope_dim) ** 0.5)
    num_blocks = 2 * num_keys // BLOCK_SIZE + 1
    cache = torch.randn(num_blocks, BLOCK_SIZE, rank + rope_dim, device=DEVICE)
    slots = torch.rand(num_tokens, num_blocks * BLOCK_SIZE, device=DEVICE).argsort(dim=1)[:, :num_keys]
    return query.to(dtype), cache.to(dtype), slots.contiguous()


def hide(slots: torch.Tensor) -> torch.Tensor:
    """-1 in the first place, in places anywhere, and behind: nothing, half, all but one, or everything but one."""
    hidden = slots.clone()
    hidden[torch.rand(slots.shape, device=slots.device) < 0.2] = -1
    for token, slot in enumerate(slots[:, 1].tolist()):
        stop = (slots.shape[1], slots.shape[1] // 2, 2, 2)[token % 4]
        hidden[token, stop:] = -1
        hidden[token, :2] = torch.tensor([-1, slot])
    return hidden


def specify(query: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, rank: int) -> torch.Tensor:
    return reference.attend_sparse(query.float(), cache.float(), slots, rank, SCALE)


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert out.shape == expected.shape and out.isfinite().all()
    assert (out.float() - expected).norm() <= TOLERANCE[out.dtype] * expected.norm()


@needs_device
@pytest.mark.parametrize("num_tokens", NUMS_TOKENS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_rows(
    fused: ModuleType,
    tiles: dict[str, object],
    dtype: torch.dtype,
    dims: tuple[int, int, int],
    heads: int,
    num_tokens: int,
) -> None:
    query, cache, slots = draw(num_tokens, heads, dims, dtype)
    out = fused.attend_sparse(query, cache, slots, dims[0], SCALE, is_full=True, **tiles)
    assert out.dtype == dtype
    assert_close(out, specify(query, cache, slots, dims[0]))
    hidden = hide(slots)
    out = fused.attend_sparse(query, cache, hidden, dims[0], SCALE, **tiles)
    assert_close(out, specify(query, cache, hidden, dims[0]))


@needs_device
@pytest.mark.parametrize("numbers", (INT8, FP8), ids=("int8", "fp8"))
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dims", ((256, 16, 20),) if IS_INTERPRETED else DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_encoded_rows(
    fused: ModuleType,
    tiles: dict[str, object],
    dtype: torch.dtype,
    dims: tuple[int, int, int],
    heads: int,
    numbers: NumberFormat,
) -> None:
    query, cache, slots = draw(2 if IS_INTERPRETED else 40, heads, dims, dtype)
    layout = LatentRowLayout(dims[0], dims[1], numbers)
    rows = encode_latent(cache.view(-1, cache.shape[-1]), layout).view(*cache.shape[:2], layout.num_bytes)
    decoded = decode_latent(rows, layout, dtype)
    for is_full, chosen in ((True, slots), (False, hide(slots))):
        out = fused.attend_sparse_encoded(query, rows, chosen, layout, SCALE, is_full=is_full, **tiles)
        assert_close(out, specify(query, decoded, chosen, dims[0]))


@needs_device
@pytest.mark.parametrize("num_tokens", (2,) if IS_INTERPRETED else (1, 128, 300))
def test_token_without_keys_gets_zeros(fused: ModuleType, tiles: dict[str, object], num_tokens: int) -> None:
    """And what a row holds does not matter to tokens that have -1 in its stead."""
    dims = DIMS[-1]
    query, cache, slots = draw(num_tokens, HEADS[-1], dims, DTYPES[-1])
    cache[0] = float("nan")
    slots[slots < BLOCK_SIZE] = -1
    slots[0] = -1
    out = fused.attend_sparse(query, cache, slots, dims[0], SCALE, **tiles)
    assert out.isfinite().all() and not out[0].any()


@needs_device
@pytest.mark.parametrize("is_full", (True, False))
@pytest.mark.parametrize("num_keys", (1, 64, 100, 128, 300))
def test_pairs_of_blocks(fused: ModuleType, monkeypatch: pytest.MonkeyPatch, num_keys: int, is_full: bool) -> None:
    """Half a pair, a pair and a part of the next; a block of heads that is not full; and a token without keys."""
    rank, heads = (128, 70) if IS_INTERPRETED else (512, 100)
    if IS_INTERPRETED:
        module = load_interpreted("argosy.kernels.triton.sparse_mla_pairs")
        monkeypatch.setattr(fused, "attend_in_pairs", module.attend_in_pairs)
    monkeypatch.setattr(fused, "choose_num_shares", lambda *_: 1)
    query, cache, slots = draw(3, heads, (rank, 64, num_keys), DTYPES[-1])
    if not is_full:
        slots[1, num_keys // 3 :: 2], slots[2] = -1, -1
    cache.view(-1, rank + 64)[~torch.isin(torch.arange(cache.numel() // (rank + 64), device=DEVICE), slots)] = float(
        "nan"
    )
    out = fused.attend_sparse(query, cache, slots, rank, SCALE, is_full=is_full, tile=fused.PAIRED_TILE)
    expected = specify(query, cache.nan_to_num(), slots, rank)
    expected[(slots < 0).all(dim=1)] = 0.0
    assert_close(out, expected)


@needs_device
def test_pairs_of_blocks_follow_rising_scores(fused: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block's scores are far above those before, or far below."""
    rank = 128 if IS_INTERPRETED else 512
    if IS_INTERPRETED:
        module = load_interpreted("argosy.kernels.triton.sparse_mla_pairs")
        monkeypatch.setattr(fused, "attend_in_pairs", module.attend_in_pairs)
    monkeypatch.setattr(fused, "choose_num_shares", lambda *_: 1)
    query, cache, _ = draw(2, 64, (rank, 64, 320), torch.float32)
    slots = torch.arange(320, device=DEVICE).repeat(2, 1)
    slots[1] = slots[1].flip(0)
    query[:, :, -1] = 16.0
    cache.view(-1, rank + 64)[:320, -1] = (torch.arange(320, device=DEVICE) // 64 - 2) * 4.0  # e^9 from block to block
    query, cache = query.to(DTYPES[-1]), cache.to(DTYPES[-1])
    out = fused.attend_sparse(query, cache, slots, rank, SCALE, is_full=True, tile=fused.PAIRED_TILE)
    assert_close(out, specify(query, cache, slots, rank))


@needs_device
@pytest.mark.parametrize("num_shares", (1, 2, 4))
def test_shares_of_keys_join_to_the_same(
    fused: ModuleType, tiles: dict[str, object], num_shares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "choose_num_shares", lambda *_: num_shares)
    dims, heads = DIMS[-1], HEADS[-1]
    query, cache, slots = draw(2, heads, dims, DTYPES[-1])
    slots[1, 3:] = -1  # most shares hold no key
    out = fused.attend_sparse(query, cache, slots, dims[0], SCALE, **tiles)
    assert_close(out, specify(query, cache, slots, dims[0]))


@needs_device
@pytest.mark.skipif(IS_INTERPRETED, reason="needs an NVIDIA card")
@pytest.mark.parametrize("num_tokens", (4, 200))
def test_launches_can_be_captured(fused: ModuleType, num_tokens: int) -> None:
    dims = DIMS[-1]
    query, cache, slots = draw(num_tokens, HEADS[-1], dims, torch.bfloat16)
    expected = fused.attend_sparse(query, cache, slots, dims[0], SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused.attend_sparse(query, cache, slots, dims[0], SCALE)
    graph.replay()
    assert torch.equal(out, expected)


@needs_device
def test_strided_queries_give_the_same_bits(fused: ModuleType) -> None:
    dims = DIMS[-1]
    query, cache, slots = draw(2, HEADS[0], dims, DTYPES[-1])
    expected = fused.attend_sparse(query, cache, slots, dims[0], SCALE)
    heads_first = query.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(fused.attend_sparse(heads_first, cache, slots, dims[0], SCALE), expected)
    assert torch.equal(fused.attend_sparse(query, cache, slots, dims[0], SCALE), expected)


@needs_device
def test_shapes_without_tiles_go_another_way(fused: ModuleType) -> None:
    query, cache, slots = draw(2, 3, (24, 8, 40), torch.float32)
    assert_close(fused.attend_sparse(query, cache, slots, 24, SCALE), specify(query, cache, slots, 24))


@needs_device
def test_other_loop_and_tile_give_the_same(fused: ModuleType) -> None:
    dims, heads = DIMS[-1], HEADS[-1]
    query, cache, slots = draw(1 if IS_INTERPRETED else 64, heads, dims, DTYPES[-1])
    for tile in (fused.PORTABLE_TILE,) if IS_INTERPRETED else (fused.PORTABLE_TILE, fused.HOPPER_TILE):
        out = fused.attend_sparse(query, cache, slots, dims[0], SCALE, tile=tile)
        assert_close(out, specify(query, cache, slots, dims[0]))


def test_shares_fill_the_card_while_tokens_are_few(fused: ModuleType) -> None:
    chosen = {tokens: fused.choose_num_shares(tokens, 2, 32, 132) for tokens in (1, 16, 32, 64, 128, 2048)}
    assert chosen[1] >= 16 and chosen[16] == 4 and chosen[32] == 2
    assert chosen[64] == chosen[128] == chosen[2048] == 1
    assert fused.choose_num_shares(1, 1, 1, 132) == 1


def test_loop_in_pairs_compiles() -> None:
    """It fits into shared memory, no group computes the other's scores, and copies are of 16 bytes."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter compiles nothing")
    from tests.helpers.compiled.sparse_mla import PAIRED_KERNELS, compile_for_hopper

    for kernel in PAIRED_KERNELS:
        ptx, shared_bytes = compile_for_hopper(kernel)
        assert shared_bytes <= SHARED_BYTES, kernel.label
        for instruction in kernel.instructions:
            assert instruction in ptx, (kernel.label, instruction)
        assert ptx.count("wgmma.mma_async.sync.aligned.m64n64k16") == 2 * 36, kernel.label
        assert ptx.count("wgmma.mma_async.sync.aligned.m64n256k16") == 4 * 4, kernel.label
        assert "cp.async.ca" not in ptx, kernel.label


def test_loop_for_hopper_compiles() -> None:
    """It fits into shared memory, shares scores among warps (36 products of 32 keys each), and copies 16 bytes."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter compiles nothing")
    from tests.helpers.compiled.sparse_mla import HOPPER_KERNELS, compile_for_hopper

    for kernel in HOPPER_KERNELS:
        ptx, shared_bytes = compile_for_hopper(kernel)
        assert shared_bytes <= SHARED_BYTES, kernel.label
        for instruction in kernel.instructions:
            assert instruction in ptx, (kernel.label, instruction)
        assert ptx.count("wgmma.mma_async.sync.aligned.m64n32k16") == 36, kernel.label
        assert ptx.count("wgmma.mma_async.sync.aligned.m64n256k16") == 4, kernel.label
        is_encoded = kernel.constants["GROUP_SIZE"] > 0
        assert ("ld.global.v4" in ptx) or not is_encoded, kernel.label
