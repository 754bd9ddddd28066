"""Attention with materialised heads and a mask of bits, in Triton, against its specification in float32.

On an NVIDIA card, or without one in Triton's interpreter, at small sizes:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_masked_mla_triton.py

The loop that is written for Hopper alone runs in an interpreter of its own (``tests/helpers/gluon_interpreter.py``),
and is compiled.
"""

import os
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch

from argosy.kernels import reference
from tests.helpers.gluon_interpreter import load_interpreted

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
# The interpreter cuts bfloat16 where a card rounds.
DTYPES = (torch.float32,) if IS_INTERPRETED else (torch.float32, torch.bfloat16)
# Relative to the specification's norm. bfloat16: the result is rounded, and so are the weights before the second
# product.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
# N = V, P, R: argosy-tiny's and DeepSeek's.
DIMS = ((32, 16, 64),) if IS_INTERPRETED else ((32, 16, 128), (128, 64, 512))
HEADS = 2 if IS_INTERPRETED else 16
# Tokens, and earlier ones: one, a block and one more, several blocks; with the diagonal inside blocks, and at an edge.
LENGTHS = (
    ((1, 0), (129, 0), (70, 186), (131, 127))
    if IS_INTERPRETED
    else ((1, 0), (7, 0), (128, 0), (129, 0), (1000, 0), (1, 999), (70, 186), (300, 1748), (512, 4000))
)
SCALE = 0.14
SHARED_BYTES = 232448  # what a program can have on a Hopper card

needs_device = pytest.mark.skipif(
    not IS_INTERPRETED and not torch.cuda.is_available(), reason="needs an NVIDIA card, or TRITON_INTERPRET=1"
)

Attend = Callable[..., torch.Tensor]


@pytest.fixture
def fused() -> ModuleType:
    pytest.importorskip("triton")
    from argosy.kernels.triton import masked_mla

    return masked_mla


@pytest.fixture(params=("hopper", "portable") if IS_INTERPRETED else ("chosen", "portable"))
def attend(request: pytest.FixtureRequest, fused: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Attend:
    """On a card the loop that belongs there, and the portable one; in the interpreter either."""
    if request.param == "chosen":
        return fused.attend_expanded_masked
    if request.param == "portable":
        tile = fused.Tile(64, 64, 1, 4) if IS_INTERPRETED else None

        def attend_portably(*tensors: object) -> torch.Tensor:
            chosen = fused.FLOAT32_TILE if tensors[0].dtype == torch.float32 else fused.PORTABLE_TILE
            return fused.attend_expanded_masked(*tensors, tile=tile or chosen)

        return attend_portably
    module = load_interpreted("argosy.kernels.triton.masked_mla_hopper")
    monkeypatch.setattr(fused, "attend_masked_on_hopper", module.attend_masked_on_hopper)
    # Descriptors check that a layout fits their numbers; here they are small and float32.
    from triton.experimental.gluon.language import NVMMASharedLayout

    layout = SimpleNamespace(value=NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=32, rank=2))
    monkeypatch.setattr(fused.masked_mla_hopper, "SHARED", layout)

    def attend_on_hopper(*tensors: object) -> torch.Tensor:
        q_nope, value = tensors[0], tensors[4]
        out = q_nope.new_full((*q_nope.shape[:2], value.shape[2]), float("nan"))
        fused.launch_on_hopper(*tensors, out)
        return out

    return attend_on_hopper


def draw(num_tokens: int, num_computed: int, dims: tuple[int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """q_nope, q_rope, k_nope, k_rope, value, strided as a model has them; scores are well spread."""
    nope_dim, rope_dim, rank = dims
    torch.manual_seed(num_tokens + num_computed)
    num_keys = num_computed + num_tokens
    width = nope_dim + rope_dim
    query = torch.randn(num_tokens, HEADS, width, device=DEVICE).mul_(2.0 / SCALE / width**0.5).to(dtype)
    absorbed = torch.randn(num_tokens, HEADS, rank + rope_dim, device=DEVICE).to(dtype)
    absorbed[..., rank:] = query[..., nope_dim:]
    expanded = torch.randn(num_keys, HEADS, 2 * nope_dim, device=DEVICE).to(dtype)
    latent = torch.randn(num_keys, rank + rope_dim, device=DEVICE).to(dtype)
    k_nope, value = expanded.split(nope_dim, dim=-1)
    return [query[..., :nope_dim], absorbed[..., rank:], k_nope, latent[:, rank:], value]


def choose(num_tokens: int, num_computed: int) -> torch.Tensor:
    """[T, S] bool: about a third of what is visible, or one key, or none; whole blocks without any."""
    num_keys = num_computed + num_tokens
    is_chosen = torch.rand(num_tokens, num_keys, device=DEVICE) < 0.3
    is_chosen[1::5] &= torch.arange(num_keys, device=DEVICE) // 128 % 2 == 1
    is_chosen[2::5] = torch.arange(num_keys, device=DEVICE) == 0
    is_chosen[3::5] = False
    return is_chosen.tril(num_computed)


def pad(mask: torch.Tensor) -> torch.Tensor:
    """Rows that begin at 16 bytes, and ones between them."""
    wide = mask.new_full((mask.shape[0], -(-mask.shape[1] // 4) * 4 + 4), -1)
    wide[:, : mask.shape[1]] = mask
    return wide[:, : mask.shape[1]]


def specify(tensors: list[torch.Tensor], mask: torch.Tensor | None, num_computed: int) -> torch.Tensor:
    return reference.attend_expanded_masked(*(tensor.float() for tensor in tensors), mask, num_computed, SCALE)


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert out.shape == expected.shape and out.isfinite().all()
    assert (out.float() - expected).norm() <= TOLERANCE[out.dtype] * expected.norm()


@needs_device
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked(attend: Attend, dtype: torch.dtype, dims: tuple[int, int, int], lengths: tuple[int, int]) -> None:
    tensors, mask = draw(*lengths, dims, dtype), reference.pack_mask(choose(*lengths))
    expected = specify(tensors, mask, lengths[1])
    for given in (mask, pad(mask)):
        out = attend(*tensors, given, lengths[1], SCALE)
        assert out.dtype == dtype
        assert_close(out, expected)
    without_keys = mask.eq(0).all(dim=1)
    assert not out[without_keys].any()


@needs_device
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal(attend: Attend, dtype: torch.dtype, dims: tuple[int, int, int], lengths: tuple[int, int]) -> None:
    tensors = draw(*lengths, dims, dtype)
    assert_close(attend(*tensors, None, lengths[1], SCALE), specify(tensors, None, lengths[1]))


@needs_device
def test_one_head_and_large_scores(attend: Attend) -> None:
    """The largest score comes late, or early, and is far above the others."""
    dims, dtype = DIMS[-1], DTYPES[-1]
    tensors = [tensor[:, :1] if tensor.dim() == 3 else tensor for tensor in draw(131, 200, dims, dtype)]
    tensors[0] = tensors[0] * 30
    mask = reference.pack_mask(choose(131, 200))
    assert_close(attend(*tensors, mask, 200, SCALE), specify(tensors, mask, 200))


@needs_device
def test_keys_that_are_not_chosen_do_not_matter(attend: Attend) -> None:
    """However far above the chosen ones their scores are."""
    tensors = draw(130, 0, DIMS[-1], DTYPES[-1])
    is_chosen = choose(130, 0)
    is_chosen[:, 64] = False
    mask = reference.pack_mask(is_chosen)
    expected = attend(*tensors, mask, 0, SCALE)
    tensors[2][64] *= 1e4
    tensors[4][64] = 1e4
    assert torch.equal(attend(*tensors, mask, 0, SCALE), expected)


@needs_device
def test_no_tokens(fused: ModuleType) -> None:
    tensors = draw(0, 5, DIMS[-1], DTYPES[-1])
    out = fused.attend_expanded_masked(*tensors, None, 5, SCALE)
    assert out.shape == (0, HEADS, DIMS[-1][0])


@needs_device
def test_shapes_without_tiles_go_another_way(fused: ModuleType) -> None:
    tensors = draw(9, 30, (24, 8, 40), torch.float32)
    mask = reference.pack_mask(choose(9, 30))
    assert_close(fused.attend_expanded_masked(*tensors, mask, 30, SCALE), specify(tensors, mask, 30))


@needs_device
@pytest.mark.skipif(IS_INTERPRETED, reason="needs an NVIDIA card")
@pytest.mark.parametrize("is_masked", (True, False))
def test_launches_can_be_captured_and_repeat_their_bits(fused: ModuleType, is_masked: bool) -> None:
    tensors = draw(512, 4000, DIMS[-1], torch.bfloat16)
    mask = pad(reference.pack_mask(choose(512, 4000))) if is_masked else None
    expected = fused.attend_expanded_masked(*tensors, mask, 4000, SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused.attend_expanded_masked(*tensors, mask, 4000, SCALE)
    for _ in range(20):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


def test_heads_together_divide_the_heads_and_fit_the_cache(fused: ModuleType) -> None:
    assert fused._count_heads_together(128, 2 * 2**20) == 8
    assert fused._count_heads_together(128, 8 * 2**20) == 2
    assert fused._count_heads_together(128, 64 * 2**20) == 1
    assert fused._count_heads_together(12, 2**18) == 4
    assert fused._count_heads_together(1, 2**10) == 1


def test_loop_for_hopper_compiles() -> None:
    """It fits into shared memory; the tensor instruction takes weights from registers; a row's words come at once."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter compiles nothing")
    from tests.helpers.compiled.masked_mla import HOPPER_KERNELS, compile_for_hopper

    for kernel in HOPPER_KERNELS:
        ptx, shared_bytes = compile_for_hopper(kernel)
        assert shared_bytes <= SHARED_BYTES, kernel.label
        for instruction in kernel.instructions:
            assert instruction in ptx, (kernel.label, instruction)
        # Of two groups, twice (the first block is apart) 12 for scores and 8 for sums.
        assert ptx.count("wgmma.mma_async.sync.aligned.m64n128k16") == 80, kernel.label
        has_vectors = kernel.constants["HAS_VECTORS"]
        assert ("ld.global.v4" in ptx) == has_vectors, kernel.label
