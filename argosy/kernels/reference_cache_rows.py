"""Cache rows of 8-bit numbers: their layout, and every operation that writes or reads them, in plain torch.

Specification for all devices, like ``reference.py``; where rows lie and who owns them is ``cache/``'s business.
A latent row is ``R numbers | one float32 scale for every group of 128 | P rope numbers in bfloat16``: FlashMLA's 656
bytes for R = 512, P = 64. An index row is ``I numbers | one float32 scale``: 132 bytes for I = 128. Invariant: a row is
encoded from its own token alone, and decoded from its own bytes alone.

Shape letters: T tokens, B requests, H heads, R kv_lora_rank, P qk_rope_head_dim, C = R + P, S keys of one sequence,
J index heads, I index_head_dim, W bytes of a row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from argosy.kernels.reference import attend_absorbed, index_scores

GROUP_SIZE = 128  # numbers that share a scale; the last group of a row may be shorter
SCALE_BYTES = 4
ROPE_BYTES = 2
# What a row of tinier numbers counts as, so that a row of zeros divides: the floor of DeepSeek's act_quant.
MIN_AMAX = 1e-4
# Upper bound of the scratch memory that the loop of attend_sparse_encoded allocates at a time.
_SCRATCH_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """What 8 bits hold: multiples of a scale within +-``max_value``, halves rounded to even."""

    dtype: torch.dtype
    max_value: float

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` float32, in units of the scale -> ``dtype``. Changes ``x``."""
        # NOTE(numerics): x may exceed the maximum by a rounding; a cast to e4m3 would saturate or not, by platform.
        x.clamp_(-self.max_value, self.max_value)
        return (x if self.dtype.is_floating_point else x.round_()).to(self.dtype)


INT8 = NumberFormat(torch.int8, 127.0)
FP8 = NumberFormat(torch.float8_e4m3fn, 448.0)
# Every e4m3 number by its bits: on a CPU a look-up costs a fifth of torch's cast. Constant, never written.
_FP8_TABLE = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()


@dataclass(frozen=True, slots=True)
class LatentRowLayout:
    """Where what lies in a latent row."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    numbers: NumberFormat

    @property
    def group_size(self) -> int:
        return min(GROUP_SIZE, self.kv_lora_rank)

    @property
    def num_groups(self) -> int:
        return -(-self.kv_lora_rank // self.group_size)

    @property
    def rope_start(self) -> int:
        return self.kv_lora_rank + SCALE_BYTES * self.num_groups

    @property
    def num_bytes(self) -> int:
        return self.rope_start + ROPE_BYTES * self.qk_rope_head_dim


# --- numbers ----------------------------------------------------------------------------------------------------------


def quantize(x: torch.Tensor, numbers: NumberFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """``x: [..., n]`` any float -> numbers [..., n], and one scale [..., 1] float32 for each n.

    scale = max(amax, MIN_AMAX) / max_value; number = round(x / scale), half to even; both in float32. A NaN or an
    infinity makes the scale NaN or infinite, and so every number that is decoded with it NaN or infinite.
    """
    x = x.float()
    # NOTE(numerics): divided by a tensor, because CUDA multiplies by the reciprocal of a plain number.
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_(min=MIN_AMAX).div_(x.new_full((), numbers.max_value))
    return numbers.round(x / scale), scale


def numbers_to_float(numbers: torch.Tensor) -> torch.Tensor:
    """Any shape and either format -> float32, exactly."""
    if numbers.is_cpu and numbers.dtype == torch.float8_e4m3fn:
        return _FP8_TABLE.index_select(0, numbers.contiguous().view(torch.uint8).flatten().int()).view(numbers.shape)
    return numbers.float()


def _in_groups(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """``x: [..., n]`` -> [..., groups, group_size]; zeros fill a last group that is shorter."""
    num_missing = -x.shape[-1] % group_size
    padded = F.pad(x, (0, num_missing)) if num_missing else x
    return padded.unflatten(-1, (padded.shape[-1] // group_size, group_size))


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


# --- latent rows ------------------------------------------------------------------------------------------------------


def encode_latent(latent: torch.Tensor, layout: LatentRowLayout) -> torch.Tensor:
    """``latent: [T, C]`` any float -> rows [T, W] uint8."""
    kv_latent, k_rope = latent.split([layout.kv_lora_rank, layout.qk_rope_head_dim], dim=-1)
    numbers, scales = quantize(_in_groups(kv_latent, layout.group_size), layout.numbers)  # [T, groups, size], [.., 1]
    numbers = numbers.flatten(1)[:, : layout.kv_lora_rank]
    rope = k_rope.to(torch.bfloat16)  # also on a float32 engine
    return torch.cat((_as_bytes(numbers), _as_bytes(scales.squeeze(-1)), _as_bytes(rope)), dim=-1)


def decode_latent(rows: torch.Tensor, layout: LatentRowLayout, dtype: torch.dtype) -> torch.Tensor:
    """``rows: [..., W]`` uint8 -> latent [..., C] in ``dtype``: products in float32, rounded once."""
    rank = layout.kv_lora_rank
    numbers = numbers_to_float(rows[..., :rank].view(layout.numbers.dtype))
    scales = rows[..., rank : layout.rope_start].contiguous().view(torch.float32)  # contiguous: any alignment will do
    kv_latent = _in_groups(numbers, layout.group_size).mul_(scales.unsqueeze(-1)).flatten(-2)
    latent = rows.new_empty((*rows.shape[:-1], rank + layout.qk_rope_head_dim), dtype=dtype)
    latent[..., :rank] = kv_latent[..., :rank]
    latent[..., rank:] = rows[..., layout.rope_start :].contiguous().view(torch.bfloat16)
    return latent


def attend_sparse_encoded(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    topk_slots: torch.Tensor,
    layout: LatentRowLayout,
    softmax_scale: float,
    *,
    is_full: bool = False,
) -> torch.Tensor:
    """``reference.attend_sparse`` over encoded rows: ``latent_cache: [num_blocks, block_size, W]`` uint8.

    ``query: [T, H, C]``; what is decoded has its dtype. ``topk_slots: [T, index_topk]`` int64, -1 none; ``is_full``
    promises that there is no -1. Returns [T, H, R].
    """
    rows = latent_cache.view(-1, layout.num_bytes)
    num_tokens, num_selected = topk_slots.shape
    # A row takes its own bytes, its numbers in float32, and the decoded latent.
    row_bytes = layout.num_bytes + (4 + query.element_size()) * query.shape[2]
    step = max(1, _SCRATCH_BYTES // (num_selected * row_bytes))
    if num_tokens <= step:
        return _attend_rows(query, rows, topk_slots, layout, softmax_scale, is_full)
    parts = zip(query.split(step), topk_slots.split(step), strict=True)
    return torch.cat([_attend_rows(part, rows, slots, layout, softmax_scale, is_full) for part, slots in parts])


def _attend_rows(
    query: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    layout: LatentRowLayout,
    softmax_scale: float,
    is_full: bool,
) -> torch.Tensor:
    known = slots if is_full else slots.clamp(min=0)
    selected = rows.index_select(0, known.view(-1)).view(*slots.shape, layout.num_bytes)
    latent = decode_latent(selected, layout, query.dtype)  # [t, index_topk, C]
    return attend_absorbed(query, latent, None if is_full else slots < 0, layout.kv_lora_rank, softmax_scale)


# --- index rows -------------------------------------------------------------------------------------------------------


def hadamard_matrix(size: int, device: torch.device) -> torch.Tensor:
    """Sylvester's, times size^-0.5, which makes it orthogonal and its own inverse: [size, size] float32.

    ``size`` is a power of two. A product with it costs a tenth of the fast transform's many small steps on a CPU.
    """
    assert size > 0 and not size & (size - 1), size
    number = torch.arange(size, device=device)
    common = number.unsqueeze(1) & number  # entry (i, j) is -1 to the number of bits that i and j share
    parity = torch.zeros_like(common)
    while size > 1:
        parity ^= common & 1
        common = common >> 1
        size >>= 1
    return (1 - 2 * parity).float().mul_(number.shape[0] ** -0.5)


def quantize_rotated(
    x: torch.Tensor, hadamard: torch.Tensor, numbers: NumberFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x: [..., I]`` -> numbers [..., I] of the rotated x, and scales [..., 1] float32.

    The rotation spreads an outlier over all I numbers, so that one scale serves them; products of a query and a key
    that are both rotated are those of the unrotated ones.
    """
    return quantize(x.float() @ hadamard, numbers)


def encode_index_k(index_k: torch.Tensor, hadamard: torch.Tensor, numbers: NumberFormat) -> torch.Tensor:
    """``index_k: [T, I]`` -> rows [T, I + 4] uint8."""
    quantized, scale = quantize_rotated(index_k, hadamard, numbers)
    return torch.cat((_as_bytes(quantized), _as_bytes(scale)), dim=-1)


def index_scores_encoded(
    index_q: torch.Tensor,
    key_rows: torch.Tensor,
    index_weights: torch.Tensor,
    hadamard: torch.Tensor,
    numbers: NumberFormat,
) -> torch.Tensor:
    """``reference.index_scores`` of 8-bit queries and keys: [B, T, S] float32.

    ``index_q: [B, T, J, I]`` any float, ``key_rows: [B, S, I + 4]`` uint8, ``index_weights: [B, T, J]`` float32.
    Queries are rotated and quantised per token and head; score = sk[s] * sum over heads of w * sq * relu(q8 . k8).

    NOTE(numerics): q8 . k8 of int8 numbers is an integer of at most 127 * 127 * I, exact in float32 up to I = 1024, in
    any order of summation; e4m3's range is too wide for that, and its products round as any float32 sum does.
    """
    dim = hadamard.shape[0]
    query, query_scale = quantize_rotated(index_q, hadamard, numbers)
    keys = numbers_to_float(key_rows[..., :dim].view(numbers.dtype))
    key_scale = key_rows[..., dim:].contiguous().view(torch.float32)  # [B, S, 1]
    scores = index_scores(numbers_to_float(query), keys, index_weights * query_scale.squeeze(-1))
    return scores.mul_(key_scale.transpose(1, 2))
