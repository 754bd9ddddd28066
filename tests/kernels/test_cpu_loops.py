"""Every compiled loop against the specification of the same name."""

import fcntl
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from argosy.distributed.ep_local import spread_weights_on_host
from argosy.kernels import choice, choice_attention, cpu, reference, reference_experts, reference_paged
from argosy.kernels.cpu_choice import loops_for
from argosy.kernels.reference import RotaryRows, RotaryTable
from tests.helpers.tolerance import FP32_OP_ATOL

cpu_loops = pytest.importorskip("argosy.kernels.cpu_loops", reason="numba is not installed", exc_type=ImportError)

compiled = pytest.importorskip("argosy.kernels.loops.compiled", reason="numba is not installed", exc_type=ImportError)

MANY_TOKENS = [0, 1, 7, 128]
ROPE_DIM = 16


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _rotary(num_tokens: int) -> RotaryRows:
    return RotaryTable(_random(50, ROPE_DIM // 2, seed=7), _random(50, ROPE_DIM // 2, seed=8)).at(
        torch.arange(num_tokens) % 50
    )


def _slots(num_tokens: int) -> torch.Tensor:
    """Distinct, in no order; every third token has none."""
    slots = torch.randperm(max(num_tokens, 1) * 3, generator=torch.Generator().manual_seed(5))[:num_tokens]
    slots[::3] = -1
    return slots


def _assert_close(fast: torch.Tensor, slow: torch.Tensor) -> None:
    assert fast.dtype == slow.dtype
    assert fast.shape == slow.shape
    assert torch.allclose(fast, slow, rtol=1e-5, atol=FP32_OP_ATOL)


@pytest.mark.parametrize("num_tokens", MANY_TOKENS)
@pytest.mark.parametrize("size", [17, 1536])
def test_rms_norm(num_tokens: int, size: int) -> None:
    x, weight = _random(num_tokens, size + 3)[:, 1 : size + 1], _random(size, seed=1)  # rows of a wider tensor
    x[:1] *= 1e-4  # so small that eps counts
    _assert_close(cpu_loops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("num_tokens", MANY_TOKENS)
def test_add_rms_norm(num_tokens: int) -> None:
    x, delta, weight = _random(num_tokens, 40), _random(num_tokens, 50, seed=1)[:, 5:45], _random(40, seed=2)
    kept = x.clone()
    for fast, slow in zip(
        cpu_loops.add_rms_norm(x, delta, weight, 1e-6), reference.add_rms_norm(x, delta, weight, 1e-6), strict=True
    ):
        _assert_close(fast, slow)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("num_tokens", MANY_TOKENS)
def test_silu_mul(num_tokens: int) -> None:
    gate_up = _random(num_tokens, 60)[:, :48] * 20
    _assert_close(cpu_loops.silu_mul(gate_up), reference.silu_mul(gate_up))


def test_silu_at_its_ends() -> None:
    gate = torch.tensor([0.0, -0.0, 1e-30, 88.0, -88.0, 1e4, -1e4, 3e38, math.inf, -100.0, math.nan])
    fast = cpu_loops.silu_mul(torch.cat((gate, torch.ones_like(gate))).unsqueeze(0))[0]
    slow = torch.nn.functional.silu(gate)
    assert torch.allclose(fast, slow, rtol=1e-6, atol=1e-33, equal_nan=True)


@pytest.mark.parametrize("num_tokens", MANY_TOKENS)
def test_rotary_rows(num_tokens: int) -> None:
    table = RotaryTable(_random(50, 8), _random(50, 8, seed=1))
    positions = torch.arange(num_tokens) * 7 % 50
    fast, slow = cpu_loops.rotary_rows(table, positions), table.at(positions)
    assert torch.equal(fast.turns, slow.turns)
    assert torch.equal(fast.half_cos, slow.half_cos)
    assert torch.equal(fast.half_sin, slow.half_sin)


@pytest.mark.parametrize("num_tokens", MANY_TOKENS)
@pytest.mark.parametrize("name", ["rope_interleaved_", "rope_half_split_"])
def test_rotations_in_place(num_tokens: int, name: str) -> None:
    wide = _random(num_tokens, 3, 48)
    fast, slow = wide.clone(), wide.clone()
    getattr(cpu_loops, name)(fast[..., 32:], _rotary(num_tokens))
    getattr(reference, name)(slow[..., 32:], _rotary(num_tokens))
    _assert_close(fast, slow)


@pytest.mark.parametrize("num_tokens", MANY_TOKENS)
def test_rope_interleaved_into(num_tokens: int) -> None:
    wide, fast, slow = _random(num_tokens, 3, 48), torch.zeros(num_tokens, 3, 70), torch.zeros(num_tokens, 3, 70)
    cpu_loops.rope_interleaved_into(wide[..., 32:], _rotary(num_tokens), fast[..., -ROPE_DIM:])
    reference.rope_interleaved_into(wide[..., 32:].clone(), _rotary(num_tokens), slow[..., -ROPE_DIM:])
    _assert_close(fast, slow)


@pytest.mark.parametrize("num_tokens", MANY_TOKENS)
def test_write_latent(num_tokens: int) -> None:
    latent, weight = _random(num_tokens, 70)[:, 10 : 42 + ROPE_DIM], _random(32, seed=1)
    fast, slow = torch.zeros(200, 2, 48), torch.zeros(200, 2, 48)
    cpu_loops.write_latent(latent, weight, 1e-6, _rotary(num_tokens), fast, _slots(num_tokens))
    reference_paged.write_latent(latent.clone(), weight, 1e-6, _rotary(num_tokens), slow, _slots(num_tokens))
    _assert_close(fast[1:], slow[1:])  # block 0 is where the reference writes what has no slot
    assert not fast[0, 0].any() or (_slots(num_tokens) == 0).any()


@pytest.mark.parametrize("num_tokens", MANY_TOKENS)
def test_write_index_k(num_tokens: int) -> None:
    key, weight, bias = _random(num_tokens, 70)[:, 10:42] + 3, _random(32, seed=1), _random(32, seed=2)
    fast, slow = torch.zeros(200, 2, 32), torch.zeros(200, 2, 32)
    settings = weight, bias, 1e-6, _rotary(num_tokens), ROPE_DIM
    cpu_loops.write_index_k(key, *settings, fast, _slots(num_tokens))
    reference_paged.write_index_k(key, *settings, slow, _slots(num_tokens))
    _assert_close(fast[1:], slow[1:])
    assert not fast[0, 0].any() or (_slots(num_tokens) == 0).any()


@pytest.mark.parametrize("has_one_row_of_blocks", [True, False])
@pytest.mark.parametrize("num_keys", [1, 3, 40, 200, 5000])
@pytest.mark.parametrize("num_rows", [0, 1, 50])
def test_select_topk_slots(num_rows: int, num_keys: int, has_one_row_of_blocks: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = (_random(num_rows, num_keys + 5) * 3).round()[:, :num_keys] / 2  # many ties, both signs, -0.0
    num_visible = torch.randint(0, num_keys + 1, (num_rows,), generator=generator, dtype=torch.int32)
    num_blocks = -(-num_keys // 16)
    shape = (1 if has_one_row_of_blocks else num_rows, num_blocks)
    block_table = torch.randint(0, 2**31 // 16, shape, generator=generator, dtype=torch.int32)
    for topk in (1, 16, 64):
        fast = cpu_loops.select_topk_slots(scores, num_visible, topk, block_table, 16)
        slow = reference.select_topk_slots(scores, num_visible, topk, block_table, 16)
        assert fast.dtype == slow.dtype
        assert torch.equal(fast.sort(dim=1).values, slow.sort(dim=1).values)
        assert (fast.cummin(dim=1).values[fast == -1] == -1).all(), "something stands behind a -1"


def test_zeros_of_both_signs_tie() -> None:
    scores, blocks = torch.tensor([[-0.0, 0.0, -0.0, 0.0]]), torch.zeros(1, 1, dtype=torch.int32)
    chosen = cpu_loops.select_topk_slots(scores, torch.tensor([4], dtype=torch.int32), 2, blocks, 16)
    assert chosen.tolist() == [[0, 1]]


@pytest.mark.parametrize("num_tokens", MANY_TOKENS)
@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (8, 4), (8, 1), (4, 4)])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_route_grouped_topk(num_tokens: int, n_group: int, topk_group: int, norm_topk_prob: bool) -> None:
    logits, bias = _random(num_tokens, 32), _random(32, seed=1) * 0.1
    logits[1::2] = logits[1::2].round()  # ties, for which the twin in numpy has the same rule
    settings = {
        "n_group": n_group,
        "topk_group": topk_group,
        "num_experts_per_tok": 4,
        "norm_topk_prob": norm_topk_prob,
        "routed_scaling_factor": 2.5,
    }
    fast_ids, fast_weights = cpu_loops.route_grouped_topk(logits, bias * 0, **settings)
    slow_ids, slow_weights = cpu.route_grouped_topk(logits, bias * 0, **settings)
    assert torch.equal(fast_ids, slow_ids)
    _assert_close(fast_weights, slow_weights)
    fast_ids, fast_weights = cpu_loops.route_grouped_topk(logits[::2].contiguous(), bias, **settings)
    slow_ids, slow_weights = reference.route_grouped_topk(logits[::2], bias, **settings)
    assert torch.equal(fast_ids.sort(dim=1).values, slow_ids.sort(dim=1).values)
    _assert_close(fast_weights.sort(dim=1).values, slow_weights.sort(dim=1).values)


@pytest.mark.parametrize("num_tokens", MANY_TOKENS)
def test_spread_weights(num_tokens: int) -> None:
    ids = torch.rand(num_tokens, 6, generator=torch.Generator().manual_seed(1)).argsort(dim=1)[:, :3].int().contiguous()
    ids[::2, 1] = -1
    weights = _random(num_tokens, 3).abs()
    for fast, slow in zip(
        cpu_loops.spread_weights(ids, weights, 6), spread_weights_on_host(ids, weights, 6), strict=True
    ):
        assert torch.equal(fast, slow)
        assert fast.dtype == slow.dtype


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 15, 16, 40])
def test_weighted_mlp(num_tokens: int) -> None:
    x, weights = _random(num_tokens, 32), _random(num_tokens, 7, seed=3)[:, :6]
    weights[:, 2] = 0.0
    gate_up, down = _random(6, 48, 32, seed=1), _random(32, 6, 24, seed=2).transpose(0, 1)
    slow = reference_experts.weighted_mlp(x, gate_up, down, weights)
    fast = cpu_loops.weighted_mlp(x, gate_up, down, weights)
    assert fast.shape == slow.shape
    assert torch.allclose(fast, slow, rtol=1e-5, atol=1e-3)  # sums of 144 numbers around 100


def test_only_float32_is_looped_over() -> None:
    assert loops_for(torch.zeros(1)) is cpu_loops
    assert loops_for(torch.zeros(1, dtype=torch.bfloat16)) is None
    assert loops_for(torch.zeros(2**18 + 1)) is None
    x, weight = _random(3, 32).bfloat16(), _random(32, seed=1)
    assert torch.equal(choice.rms_norm(x, weight, 1e-6), cpu.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("has_numba", [True, False])
def test_without_numba_there_is_one_warning_and_the_plain_form(tmp_path: Path, has_numba: bool) -> None:
    """Or with one that does not fit numpy."""
    (tmp_path / "numba.py").write_text('raise ImportError("Numba needs NumPy 0.1 or less")')
    hide = f"sys.path.insert(0, {str(tmp_path)!r})" if has_numba else "sys.modules['numba'] = None"
    program = (
        f"import sys, warnings; {hide}\n"
        "import torch; from argosy.kernels import rms_norm\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    out = rms_norm(torch.ones(2, 4), torch.ones(4), 0.0), rms_norm(torch.ones(2, 4), torch.ones(4), 0.0)\n"
        "assert all((x == 1).all() for x in out)\n"
        "print([str(warning.message) for warning in caught])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.count("steps on a CPU take longer without numba") == 1
    assert ("0.1 or less" in done.stdout) == has_numba


def test_terms_of_two_dtypes_are_left_to_torch() -> None:
    x, delta, weight = _random(3, 32), _random(3, 32, seed=1).bfloat16(), _random(32, seed=2)
    for fast, slow in zip(
        choice.add_rms_norm(x, delta, weight, 1e-6), reference.add_rms_norm(x, delta, weight, 1e-6), strict=True
    ):
        _assert_close(fast, slow)


def test_a_cache_of_another_dtype_is_left_to_torch() -> None:
    slots, rotary = torch.tensor([3, 1]), _rotary(2)
    for dtype in (torch.bfloat16, torch.float32):
        fast, slow = torch.zeros(2, 2, 48, dtype=dtype), torch.zeros(2, 2, 48, dtype=dtype)
        latent, weight = _random(2, 48), _random(32, seed=1)
        choice_attention.write_latent(latent.clone(), weight, 1e-6, rotary, fast, slots)
        reference_paged.write_latent(latent.clone(), weight, 1e-6, rotary, slow, slots)
        assert torch.allclose(fast.float(), slow.float(), rtol=2**-7)


def test_while_one_process_compiles_the_others_wait() -> None:
    directory = os.open(Path(compiled.__file__).parent, os.O_RDONLY)
    try:
        with compiled.one_process_at_a_time(), pytest.raises(BlockingIOError):
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(directory)


def test_where_nothing_may_be_written_loops_are_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(signature: str, cache: bool = False, **options: object) -> Callable[[object], str]:
        if cache:
            raise RuntimeError("cannot cache function 'loop': no locator available for file 'loop.py'")
        return lambda loop: f"{loop} for {signature}"

    monkeypatch.setattr(compiled, "njit", njit)
    assert compiled.compiled("void(i8)")("a loop") == "a loop for void(i8)"
