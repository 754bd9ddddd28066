"""INT8 products on the tensor cores against their specification: bit by bit, but for silu's last bits.

On an NVIDIA card, or without one in Triton's interpreter, at small sizes (what is written for Hopper alone runs in an
interpreter of its own, ``tests/helpers/gluon_interpreter.py``):

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_w8a8_triton.py
"""

import dataclasses
import itertools
import os
import re
from types import ModuleType

import pytest
import torch

from argosy.kernels import reference_w8a8
from argosy.kernels.reference import silu_mul
from tests.helpers.gluon_interpreter import load_interpreted

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
# The interpreter cuts bfloat16 where a card rounds.
DTYPES = (torch.float32,) if IS_INTERPRETED else (torch.float32, torch.bfloat16)
# (in, out) of linears: DeepSeek's on a card; here such that tiles end inside a row, a column and a block of K.
SIZES = ((80, 48),) if IS_INTERPRETED else ((7168, 1536), (1536, 24576), (16384, 7168), (7168, 576), (2048, 7168))
SHARED_BYTES = 227 * 1024  # what a program may have on Hopper
NUMS_ROWS = (0, 1, 7, 40, 300) if IS_INTERPRETED else (0, 1, 7, 16, 17, 33, 128, 200, 4096)


@pytest.fixture
def device() -> None:
    if not IS_INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA card, or TRITON_INTERPRET=1")


@pytest.fixture
def fused(device: None) -> ModuleType:
    pytest.importorskip("triton")
    from argosy.kernels.triton import w8a8

    return w8a8


@pytest.fixture
def few_rows(device: None) -> ModuleType:
    pytest.importorskip("triton")
    from argosy.kernels.triton import w8a8_few_rows

    return w8a8_few_rows


@pytest.fixture
def gemm(device: None) -> ModuleType:
    pytest.importorskip("triton")
    from argosy.kernels.triton import w8a8_gemm

    return w8a8_gemm


def draw(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 matrices [..., N, K], scales [..., N, 1]."""
    weight = torch.randint(-127, 128, shape, dtype=torch.int8, device=DEVICE)
    return weight, torch.rand(*shape[:-1], 1, device=DEVICE) * 1e-3 + 1e-6


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The specification's product is exact; so is this one, and fast: sums stay below 2^53."""
    return x.double() @ weight.double().t()


@pytest.fixture(autouse=True)
def fast_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_w8a8, "multiply_int8", multiply)


@pytest.mark.parametrize("num_rows", NUMS_ROWS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(fused: ModuleType, dtype: torch.dtype, size: tuple[int, int], num_rows: int) -> None:
    torch.manual_seed(num_rows)
    x = (torch.randn(num_rows, size[0], device=DEVICE) * 3).to(dtype)
    weight, scale = draw(size[1], size[0])
    assert torch.equal(fused.linear_w8a8(x, weight, scale), reference_w8a8.linear_w8a8(x, weight, scale))


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("num_rows", (0, 3, 33, 257))
def test_linear_of_quantised_rows(fused: ModuleType, num_rows: int, out_dtype: torch.dtype) -> None:
    torch.manual_seed(num_rows)
    x, x_scale = draw(num_rows, 80)
    inputs = x, x_scale, *draw(48, 80), out_dtype
    out = fused.linear_w8a8_quantized(*inputs)
    expected = reference_w8a8.linear_w8a8_quantized(*inputs)
    assert out.dtype == out_dtype and torch.equal(out, expected)


# Of each tile of few rows: K and columns that end inside a block, a split and a slice.
FEW_ROWS_SIZE = (2160, 150) if IS_INTERPRETED else (7216, 1544)


@pytest.mark.parametrize(
    ("table", "number"),
    [
        *(("NARROW_TILES", number) for number in range(3)),
        *(("SPLIT_TILES", number) for number in range(4)),
        *(("WIDE_SPLIT_TILES", rows) for rows in (64, 128)),
    ],
)
def test_few_rows_in_every_tile(few_rows: ModuleType, table: str, number: int) -> None:
    torch.manual_seed(number)
    tile = getattr(few_rows, table)[number]
    size = FEW_ROWS_SIZE
    for num_rows in (1, tile.block_rows - 1):
        inputs = *draw(num_rows, size[0]), *draw(size[1], size[0]), torch.float32
        out = few_rows.w8a8_few_rows(*inputs, tile=tile)
        assert torch.equal(out, reference_w8a8.linear_w8a8_quantized(*inputs))


@pytest.mark.parametrize(("num_rows", "block_rows"), [(64, 64), (100, 128), (256, None)])
def test_wide_outputs_have_tiles_of_their_own(few_rows: ModuleType, num_rows: int, block_rows: int | None) -> None:
    wide = few_rows.WIDE_SPLIT_TILES.get(block_rows)
    chosen = {size: few_rows.choose_tile(num_rows, size, 132) for size in (7168, 24576, 36864)}
    assert {size for size, tile in chosen.items() if tile == wide} == ({24576, 36864} if wide else set())


@pytest.mark.parametrize(
    "size", ((7168, 128), (7168, 576), (7168, 1536), (7168, 4096), (7168, 36864), (1536, 24576), (18432, 7168))
)
def test_splits_fill_a_card_once(few_rows: ModuleType, size: tuple[int, int]) -> None:
    in_features, out_features = size
    for each, num_resident in itertools.product(few_rows.SPLIT_TILES, (1, 2)):
        tile = dataclasses.replace(each, num_resident=num_resident)
        num_programs = 132 * num_resident
        split = few_rows.choose_split(tile, *size, 132)
        num_columns, num_splits = -(-out_features // tile.block_n), -(-in_features // split)
        assert split % tile.block_k == 0 and (num_splits - 1) * split < in_features
        assert num_splits == 1 or num_columns * num_splits <= num_programs
        assert num_splits == 1 or split >= tile.min_split
        # One more block of K for each program would not leave a program less: no split is longer than it must be.
        longest = max(tile.min_split, in_features * num_columns / (num_programs / 2)) + tile.block_k
        assert num_columns >= num_programs / 2 or split <= longest


@pytest.mark.skipif(IS_INTERPRETED, reason="device graphs and streams need a card")
@pytest.mark.parametrize("num_rows", (1, 100))
def test_few_rows_in_graphs_and_on_two_streams(fused: ModuleType, num_rows: int) -> None:
    torch.manual_seed(3)
    weight, scale = draw(576, 7168)
    first, second = (torch.randn(num_rows, 7168, device=DEVICE) for _ in range(2))
    expected = [reference_w8a8.linear_w8a8(x, weight, scale) for x in (first, second)]
    fused.linear_w8a8(first, weight, scale)
    x = first.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = fused.linear_w8a8(x, weight, scale)
    side = torch.cuda.Stream()
    for number in (1, 0, 1):
        x.copy_((first, second)[number])
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            beside = [fused.linear_w8a8(first, weight, scale) for _ in range(5)]
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(replayed, expected[number])
        assert all(torch.equal(out, expected[0]) for out in beside)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_quantised_as_specified(fused: ModuleType, dtype: torch.dtype) -> None:
    """Zeros, the smallest numbers, numbers in the middle between two steps, and strided rows."""
    torch.manual_seed(0)
    wide = torch.randn(9, 200, device=DEVICE)
    wide[1] = 0.0
    wide[2] *= 1e-30
    wide[3] = torch.arange(200, device=DEVICE) + 0.5
    wide[3, 0] = 127.0 * 2
    x = wide.to(dtype)[:, :150]
    quantized, scale = fused.quantize_per_token(x)
    expected, expected_scale = reference_w8a8.quantize_per_token(x)
    assert torch.equal(quantized, expected) and torch.equal(scale, expected_scale)


def fill_with_sevens(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> None:
    """What ``module.name`` allocates is 7 wherever nobody writes."""
    allocate = getattr(module, name)

    def allocate_filled(num_rows: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        numbers, scale = allocate(num_rows, size, device)
        return numbers.fill_(7), scale.fill_(7.0)

    monkeypatch.setattr(module, name, allocate_filled)


@pytest.mark.parametrize("num_expected_rows", (0, 1, 5, 100))
@pytest.mark.parametrize("counts", ((0, 0, 0), (3, 0, 6), (5, 5, 5)))
def test_spare_rows_are_not_quantised(
    fused: ModuleType, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...], num_expected_rows: int
) -> None:
    """However many programs share the real ones."""
    from argosy.kernels.triton import quantize

    fill_with_sevens(monkeypatch, quantize, "allocate_int8")
    torch.manual_seed(5)
    real, x = sum(counts), torch.randn(15, 40, device=DEVICE)
    expected, expected_scale = reference_w8a8.quantize_per_token(x[:real])
    num_rows = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    quantized, scale = quantize.quantize_real_rows(x, num_rows, num_expected_rows)
    assert torch.equal(quantized[:real], expected) and torch.equal(scale[:real], expected_scale)
    assert (quantized[real:] == 7).all() and (scale[real:] == 7.0).all()


# Rows of each expert: none at all, one, few, a tile and one more; 8 rows behind the last are nobody's.
COUNTS = (
    ((3, 0, 1, 17, 0, 33), (0, 0, 0, 0, 0, 0)) if IS_INTERPRETED else ((3, 0, 1, 129, 300, 0), (700, 0, 650, 0, 0, 1))
)


@pytest.mark.parametrize("num_expected_rows", (None, 3))
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(fused: ModuleType, dtype: torch.dtype, counts: tuple[int, ...], num_expected_rows: int | None) -> None:
    """Of the real rows nothing depends on how many were expected."""
    torch.manual_seed(len(counts))
    hidden_size, width = (48, 32) if IS_INTERPRETED else (7168, 2048)
    gate_up, down = draw(len(counts), 2 * width, hidden_size), draw(len(counts), hidden_size, width)
    num_tokens = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    real = sum(counts)
    x = torch.randn(real + 8, hidden_size, device=DEVICE).to(dtype)
    x[real:] = float("nan")
    out = fused.grouped_mlp_w8a8(x, *gate_up, *down, num_tokens, num_expected_rows)[:real]
    expected = reference_w8a8.grouped_mlp_w8a8(x, *gate_up, *down, num_tokens)[:real]
    assert out.isfinite().all()
    # A last bit of silu now and then moves a number by one step of 127.
    assert (out.float() - expected.float()).norm() <= 2e-3 * expected.float().norm()


# How a tile is walked changes nothing: short tails of experts, loads ahead of stores, two programs side by side.
WALKS = ({"tail_rows": 16}, {"is_flat": True}, {"num_resident": 2})


@pytest.mark.parametrize("is_gated", (False, True))
@pytest.mark.parametrize("walk", WALKS if IS_INTERPRETED else ({"tail_rows": 64}, *WALKS[1:]), ids=str)
def test_experts_in_every_walk(gemm: ModuleType, walk: dict[str, int], is_gated: bool) -> None:
    """Rows that end in a short tail, at its end and behind it; columns and K that end inside a block."""
    torch.manual_seed(4)
    shape = (32, 16, 32, 3, 4) if IS_INTERPRETED else (128, 64, 128, 3, 4)
    tile = gemm.Tile(*shape, is_swapped=False, **walk)
    counts = torch.tensor((16, 0, 17, 31, 49, 1, 128, 65), dtype=torch.int32, device=DEVICE)
    x = draw(int(counts.sum()), 80)
    weight, scale = draw(len(counts), 48, 80)
    out = gemm.w8a8_grouped_gemm(*x, weight, scale, counts, torch.float32, is_gated=is_gated, tile=tile)
    rows = zip(*(part.split(counts.tolist()) for part in x), weight, scale, strict=True)
    expected = torch.cat([reference_w8a8.linear_w8a8_quantized(*expert, torch.float32) for expert in rows])
    if is_gated:
        assert torch.allclose(out, silu_mul(expected), rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(out, expected)


# Rows of each expert: none at all; few and none before, between and behind; many tiles of one; both of a tile's groups
# and one alone; and none anywhere. ``None``: one expert has all of 130 rows.
HOPPER_COUNTS = ((0,), (5,), (0, 1, 0, 64, 65, 0), (128, 0, 0, 300, 129), (0, 0, 0), None)
# (blocks of K, lead, buffers, rows of a box): fewer blocks than the lead and buffers, as many, and more.
HOPPER_RINGS = ((1, 2, 4, 64), (3, 3, 4, 16), (9, 1, 4, 32), (9, 0, 3, 64))


@pytest.fixture
def small_hopper_tile(gemm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How its boxes differ from the real one's; in the interpreter the kernel is put into place."""
    if not IS_INTERPRETED:
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs a Hopper card")
        return {}
    module = load_interpreted("argosy.kernels.triton.w8a8_hopper", "argosy.kernels.triton.hopper_tiles")
    monkeypatch.setattr(gemm, "multiply_on_hopper", module.multiply_on_hopper)
    return {"box_n": 16, "block_k": 16}


@pytest.mark.parametrize("has_queue", (False, True))
@pytest.mark.parametrize("is_gated", (False, True))
@pytest.mark.parametrize("ring", HOPPER_RINGS)
@pytest.mark.parametrize("counts", HOPPER_COUNTS, ids=str)
def test_loop_for_hopper(
    gemm: ModuleType,
    small_hopper_tile: dict[str, int],
    counts: tuple[int, ...] | None,
    ring: tuple[int, int, int, int],
    is_gated: bool,
    has_queue: bool,
) -> None:
    """Every program ends, and every row has its result; columns end inside a tile, and 3 rows are nobody's."""
    num_blocks, lead, num_stages, box_rows = ring
    torch.manual_seed(num_blocks)
    in_features = num_blocks * 16 if IS_INTERPRETED else num_blocks * 128 - 16
    num_columns = 72 if IS_INTERPRETED else 1048
    num_rows = 130 if counts is None else sum(counts) + 3
    x = draw(num_rows, in_features)
    weight, scale = draw(len(counts or (0,)), num_columns * (1 + is_gated), in_features)
    device_counts = None if counts is None else torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    places = {"walked_tiles": 2, "has_queue": has_queue, "box_rows": box_rows}
    tile = gemm.HopperTile(num_stages=num_stages, lead=lead, **places, **small_hopper_tile)
    inputs = *x, weight, scale, device_counts, torch.float32
    out = gemm.w8a8_grouped_gemm(*inputs, is_gated=is_gated, tile=tile)
    assert gemm.find_tile_queue(x[0].device).item() == 0, "the next product would begin where this one ended"
    row = 0
    for expert, count in enumerate(counts or (num_rows,)):
        rows = slice(row, row + count)
        expert_inputs = x[0][rows], x[1][rows], weight[expert], scale[expert]
        expected = reference_w8a8.linear_w8a8_quantized(*expert_inputs, torch.float32)
        if is_gated:
            assert torch.allclose(out[rows], silu_mul(expected), rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(out[rows], expected)
        row += count


def test_loop_for_hopper_writes_only_its_rows(gemm: ModuleType, small_hopper_tile: dict[str, int]) -> None:
    tile = gemm.HopperTile(**small_hopper_tile)
    x, (weight, scale) = draw(100, 64), draw(2, 48, 64)
    counts = torch.tensor((3, 70), dtype=torch.int32, device=DEVICE)
    out = torch.full((100, 48), 7.0, device=DEVICE)
    gemm._launch_on_hopper(*x, weight, scale, counts, out, False, tile)
    assert (out[73:] == 7.0).all() and (out[:73] != 7.0).all()


def test_loop_for_hopper_is_for_many_rows_on_such_a_card(gemm: ModuleType) -> None:
    for is_gated in (False, True):
        assert isinstance(gemm.choose_tile(32 * 256, 256, is_gated, is_hopper=True), gemm.HopperTile)
        assert isinstance(gemm.choose_tile(31 * 256, 256, is_gated, is_hopper=True), gemm.Tile)
        assert isinstance(gemm.choose_tile(33 * 256, 256, is_gated, is_hopper=False), gemm.Tile)


def test_one_tile_holds_the_rows_that_an_expert_usually_gets(gemm: ModuleType) -> None:
    """Drawn at random, 19 of 20 experts need no second tile, which would stream their weights again."""
    torch.manual_seed(0)
    for mean_rows in (2, 8, 16, 32, 45):
        counts = torch.bincount(torch.randint(256, (256 * mean_rows,)), minlength=256)
        for is_gated in (False, True):
            tile = gemm.choose_tile(256 * mean_rows, 256, is_gated)
            assert (counts <= tile.block_rows).float().mean() >= 0.95, (mean_rows, tile)
    assert gemm.choose_tile(64, 1, False).block_rows == 64


@pytest.mark.parametrize("num_expected_rows", (None, 32))
def test_tile_follows_the_expected_rows(
    gemm: ModuleType, monkeypatch: pytest.MonkeyPatch, num_expected_rows: int | None
) -> None:
    asked: list[int] = []

    def choose_tile(num_rows: int, *arguments: object) -> object:
        asked.append(num_rows)
        return gemm.PLAIN_TILES[0]

    monkeypatch.setattr(gemm, "choose_tile", choose_tile)
    counts = torch.tensor((20, 12), dtype=torch.int32, device=DEVICE)
    weights = draw(2, 48, 64)
    gemm.w8a8_grouped_gemm(*draw(100, 64), *weights, counts, torch.float32, num_expected_rows=num_expected_rows)
    assert asked == [num_expected_rows or 100]


@pytest.mark.parametrize("number", range(4))
def test_loop_for_hopper_compiles(number: int) -> None:
    """It fits into shared memory, waits for a block of products while the next runs, and stores 16 bytes at once, but
    for the queue's 0."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter compiles nothing")
    from tests.helpers.compiled import compile_gluon
    from tests.helpers.compiled.w8a8_gemm import HOPPER_KERNELS

    kernel = HOPPER_KERNELS[number]
    ptx, shared_bytes = compile_gluon(kernel)
    assert shared_bytes <= SHARED_BYTES, kernel.label
    for instruction in kernel.instructions:
        assert instruction in ptx, (kernel.label, instruction)
    waits = re.findall(r"wgmma.wait_group.sync.aligned (\d)", ptx)
    assert sorted(waits) == ["0", "0", "1", "1"], kernel.label
    stores = re.findall(r"st\.global[.\w]*", ptx)
    assert set(stores) - {"st.global.b32"} == {"st.global.v4.b32"}, kernel.label
    assert stores.count("st.global.b32") == kernel.constants["HAS_QUEUE"], kernel.label
    assert "griddepcontrol.wait" in ptx, kernel.label


def test_padded_experts(fused: ModuleType) -> None:
    torch.manual_seed(1)
    gate_up, down = draw(3, 64, 48), draw(3, 48, 32)
    num_tokens = torch.tensor([5, 0, 2], dtype=torch.int32, device=DEVICE)
    x = torch.randn(3, 5, 48, device=DEVICE)
    out = fused.grouped_mlp_w8a8_masked(x, *gate_up, *down, num_tokens)
    expected = reference_w8a8.grouped_mlp_w8a8_masked(x, *gate_up, *down, num_tokens)
    for expert, count in enumerate(num_tokens.tolist()):
        assert torch.allclose(out[expert, :count], expected[expert, :count], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("in_features", (16, 24))
def test_rows_that_tiles_cannot_load_go_another_way(fused: ModuleType, in_features: int) -> None:
    torch.manual_seed(2)
    weight, scale = draw(32, in_features)
    x = torch.randn(5, in_features, device=DEVICE)
    assert torch.equal(fused.linear_w8a8(x, weight, scale), reference_w8a8.linear_w8a8(x, weight, scale))
