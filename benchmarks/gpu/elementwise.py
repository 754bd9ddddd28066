"""Norms, the gated activation, rotary embeddings and cache writes, at DeepSeek-V3.2's widths: all bound by bandwidth.

``torch`` among the others is what ran before: the specification in plain torch, every launch of it.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F

from argosy.kernels import reference, reference_cache_rows, reference_w8a8
from argosy.kernels.reference import RotaryRows, RotaryTable
from argosy.kernels.reference_cache_rows import FP8, INT8, LatentRowLayout, NumberFormat
from argosy.kernels.triton import cache_write, norms, rotary
from argosy.kernels.triton.quantize import quantize_per_token
from benchmarks.gpu.measure import Case

NUMS_TOKENS = (1, 64, 128, 4096)
HIDDEN, Q_RANK, RANK, ROPE, INDEX_DIM = 7168, 1536, 512, 64, 128
NUM_HEADS, HEAD_DIM, INDEX_HEADS = 128, 192, 64
EXPERT_WIDTH, DENSE_WIDTH = 2048, 18432
BLOCK_SIZE, EPS = 64, 1e-6
NUMBERS: dict[str, NumberFormat | None] = {"bf16": None, "int8": INT8, "fp8": FP8}
# One step of bfloat16, and a few last bits of float32 for what nearly cancels.
STEP, ATOL = 2.0**-7, 1e-5
# A rounding that turns moves an 8-bit number by one step; of all numbers' norm that is little.
ENCODED_ERROR = 5e-3


def cases() -> Iterator[Case]:
    for num_tokens in NUMS_TOKENS:
        yield from _norm_cases(num_tokens)
    for num_tokens in NUMS_TOKENS:
        yield from _silu_cases(num_tokens)
    for num_tokens in NUMS_TOKENS:
        yield from _rope_cases(num_tokens)
    for num_tokens in NUMS_TOKENS:
        for label, numbers in NUMBERS.items():
            yield _latent_case(num_tokens, label, numbers)
            yield _index_k_case(num_tokens, label, numbers)


def _norm_cases(num_tokens: int) -> Iterator[Case]:
    for width in (HIDDEN, Q_RANK):
        x, weight = _draw(num_tokens, width), _draw_weight(width)
        narrow_weight = weight.bfloat16()

        yield _case(
            f"rms_norm {width}",
            num_tokens,
            lambda: norms.rms_norm(x, weight, EPS),  # noqa: B023 - measured before the loop goes on
            lambda: reference.rms_norm(x, weight, EPS),  # noqa: B023
            4 * num_tokens * width + 4 * width,
            {"F.rms_norm": lambda: F.rms_norm(x, narrow_weight.shape, narrow_weight, EPS)},  # noqa: B023
        )
        yield _case(
            f"rms_norm_quantize {width}",
            num_tokens,
            lambda: norms.rms_norm_quantize(x, weight, EPS),  # noqa: B023
            lambda: _quantize_too(reference.rms_norm(x, weight, EPS)),  # noqa: B023
            5 * num_tokens * width + 4 * width,
            {"two launches": lambda: quantize_per_token(norms.rms_norm(x, weight, EPS))},  # noqa: B023
        )
    yield from _add_norm_cases(num_tokens)


def _add_norm_cases(num_tokens: int) -> Iterator[Case]:
    x, weight = _draw(num_tokens, HIDDEN), _draw_weight(HIDDEN)
    for dtype in (torch.bfloat16, torch.float32):
        delta = _draw(num_tokens, HIDDEN).to(dtype)
        num_bytes = num_tokens * HIDDEN * (6 + dtype.itemsize) + 4 * HIDDEN

        def add_norm() -> tuple[torch.Tensor, torch.Tensor]:
            total = (x + delta).to(x.dtype)  # noqa: B023
            return reference.rms_norm(total, weight, EPS), total

        def add_norm_quantize() -> tuple[torch.Tensor, ...]:
            normed, total = add_norm()  # noqa: B023
            return normed, total, *reference_w8a8.quantize_per_token(normed)

        yield _case(
            f"add_rms_norm {HIDDEN} + {str(dtype)[6:]}",
            num_tokens,
            lambda: norms.add_rms_norm(x, delta, weight, EPS),  # noqa: B023
            add_norm,
            num_bytes,
        )
        yield _case(
            f"add_rms_norm_quantize {HIDDEN} + {str(dtype)[6:]}",
            num_tokens,
            lambda: norms.add_rms_norm_quantize(x, delta, weight, EPS),  # noqa: B023
            add_norm_quantize,
            num_bytes + num_tokens * HIDDEN,
            {"two launches": lambda: quantize_per_token(norms.add_rms_norm(x, delta, weight, EPS)[0])},  # noqa: B023
        )


def _silu_cases(num_tokens: int) -> Iterator[Case]:
    for width in (EXPERT_WIDTH, DENSE_WIDTH):
        gate_up = _draw(num_tokens, 2 * width)
        yield _case(
            f"silu_mul {width}",
            num_tokens,
            lambda: norms.silu_mul(gate_up),  # noqa: B023
            lambda: reference.silu_mul(gate_up),  # noqa: B023
            6 * num_tokens * width,
        )
        yield _case(
            f"silu_mul_quantize {width}",
            num_tokens,
            lambda: norms.silu_mul_quantize(gate_up),  # noqa: B023
            lambda: reference_w8a8.quantize_per_token(reference.silu_mul(gate_up)),  # noqa: B023
            5 * num_tokens * width,
            {"two launches": lambda: quantize_per_token(norms.silu_mul(gate_up))},  # noqa: B023
        )


def _rope_cases(num_tokens: int) -> Iterator[Case]:
    rows = _draw_rotary(num_tokens)
    query = _draw(num_tokens, NUM_HEADS * HEAD_DIM).view(num_tokens, NUM_HEADS, HEAD_DIM)
    index_q = _draw(num_tokens, INDEX_HEADS * INDEX_DIM).view(num_tokens, INDEX_HEADS, INDEX_DIM)
    yield _rope_case("interleaved", query[..., HEAD_DIM - ROPE :], rows)
    yield _rope_case("half_split", index_q[..., :ROPE], rows)


def _rope_case(layout: str, x: torch.Tensor, rows: RotaryRows) -> Case:
    fused, specified = getattr(rotary, f"rope_{layout}_"), getattr(reference, f"rope_{layout}_")

    def check() -> None:
        out, expected = x.clone(), x.clone()
        fused(out, rows)
        specified(expected, rows)
        _check_close(out, expected)

    return Case(
        name=f"rope_{layout} {x.shape[1]} heads",
        rows=x.shape[0],
        run=lambda: fused(x, rows),
        check=check,
        num_ops=0,
        num_bytes=4 * x.numel() + 4 * x.shape[0] * ROPE,
        alternatives={"torch": lambda: specified(x, rows)},
    )


def _latent_case(num_tokens: int, label: str, numbers: NumberFormat | None) -> Case:
    latent, weight, rows = _draw(num_tokens, RANK + ROPE), _draw_weight(RANK), _draw_rotary(num_tokens)
    layout = LatentRowLayout(RANK, ROPE, numbers or INT8)
    cache, slots = _draw_cache(num_tokens, layout.num_bytes if numbers else RANK + ROPE, numbers)

    def write(to: torch.Tensor) -> None:
        if numbers:
            cache_write.write_latent_encoded(latent, weight, EPS, rows, to, slots, layout)
        else:
            cache_write.write_latent(latent, weight, EPS, rows, to, slots)

    def write_in_torch(to: torch.Tensor, made: torch.Tensor) -> None:
        made[:, :RANK] = reference.rms_norm(made[:, :RANK], weight, EPS)
        reference.rope_interleaved_(made[:, RANK:].unsqueeze(1), rows)
        reference.write_cache(to, slots, reference_cache_rows.encode_latent(made, layout) if numbers else made)

    def decode(cache: torch.Tensor) -> torch.Tensor:
        return reference_cache_rows.decode_latent(cache, layout, torch.float32) if numbers else cache

    return _write_case(f"write_latent {label}", num_tokens, write, write_in_torch, decode, cache, latent)


def _index_k_case(num_tokens: int, label: str, numbers: NumberFormat | None) -> Case:
    key, weight, bias = _draw(num_tokens, INDEX_DIM), _draw_weight(INDEX_DIM), _draw_weight(INDEX_DIM)
    rows, hadamard = _draw_rotary(num_tokens), reference_cache_rows.hadamard_matrix(INDEX_DIM, torch.device("cuda"))
    cache, slots = _draw_cache(num_tokens, INDEX_DIM + 4 if numbers else INDEX_DIM, numbers)

    def write(to: torch.Tensor) -> None:
        if numbers:
            cache_write.write_index_k_encoded(key, weight, bias, EPS, rows, ROPE, to, slots, hadamard, numbers)
        else:
            cache_write.write_index_k(key, weight, bias, EPS, rows, ROPE, to, slots)

    def write_in_torch(to: torch.Tensor, raw: torch.Tensor) -> None:
        made = reference.layer_norm(raw, weight, bias, EPS)
        reference.rope_half_split_(made[:, :ROPE].unsqueeze(1), rows)
        encoded = reference_cache_rows.encode_index_k(made, hadamard, numbers) if numbers else made
        reference.write_cache(to, slots, encoded)

    def decode(cache: torch.Tensor) -> torch.Tensor:
        if numbers is None:
            return cache
        codes = cache[..., :INDEX_DIM].contiguous().view(numbers.dtype).float()
        return codes * cache[..., INDEX_DIM:].contiguous().view(torch.float32)

    return _write_case(f"write_index_k {label}", num_tokens, write, write_in_torch, decode, cache, key)


def _write_case(
    name: str,
    num_tokens: int,
    write: Callable[[torch.Tensor], None],
    write_in_torch: Callable[[torch.Tensor, torch.Tensor], None],
    decode: Callable[[torch.Tensor], torch.Tensor],
    cache: torch.Tensor,
    raw: torch.Tensor,
) -> Case:
    """``write_in_torch`` may change ``raw``, as the torch path does: it is timed on a copy that it changes again and
    again."""
    scratch = raw.clone()

    def check() -> None:
        out, expected = cache.clone(), cache.clone()
        write(out)
        write_in_torch(expected, raw.clone())
        decoded, expected_decoded = decode(out), decode(expected)
        if cache.dtype == torch.uint8:
            error = (decoded - expected_decoded).norm() / expected_decoded.norm()
            assert error <= ENCODED_ERROR, error
        else:
            _check_close(decoded, expected_decoded)

    row_bytes = cache.shape[2] * cache.element_size()
    return Case(
        name=name,
        rows=num_tokens,
        run=lambda: write(cache),
        check=check,
        num_ops=0,
        num_bytes=num_tokens * (2 * raw.shape[1] + row_bytes + 4 * ROPE + 8),
        alternatives={"torch": lambda: write_in_torch(cache, scratch)},
    )


def _case(
    name: str,
    num_tokens: int,
    run: Callable[[], object],
    specified: Callable[[], object],
    num_bytes: int,
    alternatives: Mapping[str, Callable[[], object]] | None = None,
) -> Case:
    """Results are a tensor or several; int8 ones follow from a bfloat16 one that may be a step apart."""

    def check() -> None:
        out, expected = run(), specified()
        pairs = zip(out, expected, strict=True) if isinstance(out, tuple) else ((out, expected),)
        for mine, theirs in pairs:
            if mine.dtype == torch.int8:
                assert (mine.int() - theirs.int()).abs().max() <= 1
            else:
                _check_close(mine, theirs)

    others = {"torch": specified, **(alternatives or {})}
    return Case(name=name, rows=num_tokens, run=run, check=check, num_ops=0, num_bytes=num_bytes, alternatives=others)


def _quantize_too(normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return normed, *reference_w8a8.quantize_per_token(normed)


def _check_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (out.float() - expected.float()).abs()
    assert (difference <= STEP * expected.float().abs() + ATOL).all(), difference.max()


def _draw(num_rows: int, width: int) -> torch.Tensor:
    return torch.randn(num_rows, width, device="cuda", dtype=torch.bfloat16)


def _draw_weight(width: int) -> torch.Tensor:
    return torch.rand(width, device="cuda") + 0.5


def _draw_rotary(num_tokens: int) -> RotaryRows:
    angles = torch.rand(4096, ROPE // 2, device="cuda") * 6.28
    return RotaryTable(angles.cos(), angles.sin()).at(torch.randint(4096, (num_tokens,), device="cuda"))


def _draw_cache(num_tokens: int, width: int, numbers: NumberFormat | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros, with slots far apart, as decode's are."""
    num_blocks = 16 * (num_tokens // BLOCK_SIZE + 1)
    dtype = torch.uint8 if numbers else torch.bfloat16
    cache = torch.zeros(num_blocks, BLOCK_SIZE, width, dtype=dtype, device="cuda")
    return cache, torch.randperm(num_blocks * BLOCK_SIZE, device="cuda")[:num_tokens]
