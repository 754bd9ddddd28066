"""Operations on paged caches, composed of the plain ones: what fused kernels replace, and what a CPU runs.

Each takes a cache as the layers have it, of plain numbers or of encoded rows, and does what a layer wants of it in one
call. Invariant: every tensor on the way is rounded to the dtype that the layers' tensors have.

Shape letters: T tokens, B requests, H heads, R kv_lora_rank, P qk_rope_head_dim, C = R + P, S keys of one sequence,
J index heads, I index_head_dim, W bytes of a row.
"""

from collections.abc import Callable

import torch

from argosy.kernels.reference import (
    RotaryRows,
    attend_absorbed,
    gather_cache,
    index_scores,
    layer_norm,
    positions_to_slots,
    rms_norm,
    rope_half_split_,
    rope_interleaved_,
    write_cache,
)
from argosy.kernels.reference_cache_rows import (
    LatentRowLayout,
    NumberFormat,
    decode_latent,
    encode_index_k,
    encode_latent,
    index_scores_encoded,
)

Norm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]

# --- writing ----------------------------------------------------------------------------------------------------------


DecodeInputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def fill_decode_inputs(target: DecodeInputs, source: DecodeInputs) -> None:
    """A decode batch into tensors of n >= B rows: ids, positions, slots [B] int64, seq_lens [B] int32, block_table [B,
    blocks] int32. Rows behind it become padding: slot -1 and length 1.

    Ids, positions and blocks that an earlier batch left behind are read, and nothing comes of them.
    """
    num_rows = source[0].shape[0]
    *columns, block_table = zip(target, source, strict=True)
    for to, values in columns:
        to[:num_rows].copy_(values)
    to, values = block_table
    to[:num_rows, : values.shape[1]].copy_(values)
    _, _, slot_mapping, seq_lens, _ = target
    if num_rows < len(slot_mapping):
        slot_mapping[num_rows:].fill_(-1)
        seq_lens[num_rows:].fill_(1)


def write_latent(
    latent: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    rotary: RotaryRows,
    latent_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    norm: Norm = rms_norm,
) -> None:
    """Norm the first R, rotate the last P (interleaved), write: ``latent: [T, C]`` as ``kv_a_proj`` gave it, changed.

    ``norm_weight: [R]`` float32, ``latent_cache: [num_blocks, block_size, C]``, ``slot_mapping: [T]`` int64, -1 none.
    """
    _finish_latent(latent, norm_weight, eps, rotary, norm)
    write_cache(latent_cache, slot_mapping, latent)


def write_latent_encoded(
    latent: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    rotary: RotaryRows,
    latent_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: LatentRowLayout,
    norm: Norm = rms_norm,
) -> None:
    """``write_latent`` into rows of 8-bit numbers: ``latent_cache: [num_blocks, block_size, W]`` uint8."""
    _finish_latent(latent, norm_weight, eps, rotary, norm)
    write_cache(latent_cache, slot_mapping, encode_latent(latent, layout))


def _finish_latent(latent: torch.Tensor, norm_weight: torch.Tensor, eps: float, rotary: RotaryRows, norm: Norm) -> None:
    rank = norm_weight.shape[0]
    kv_latent = latent[:, :rank]
    kv_latent.copy_(norm(kv_latent, norm_weight, eps))
    rope_interleaved_(latent[:, rank:].unsqueeze(1), rotary)


def write_index_k(
    key: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    rotary: RotaryRows,
    rope_dim: int,
    index_k_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """LayerNorm, rotate the first ``rope_dim`` (half-split), write: ``key: [T, I]`` as ``wk`` gave it."""
    write_cache(index_k_cache, slot_mapping, _finish_index_k(key, norm_weight, norm_bias, eps, rotary, rope_dim))


def write_index_k_encoded(
    key: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    rotary: RotaryRows,
    rope_dim: int,
    index_k_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    hadamard: torch.Tensor,
    numbers: NumberFormat,
) -> None:
    """``write_index_k`` into rows of 8-bit numbers, rotated by ``hadamard: [I, I]`` float32 first."""
    finished = _finish_index_k(key, norm_weight, norm_bias, eps, rotary, rope_dim)
    write_cache(index_k_cache, slot_mapping, encode_index_k(finished, hadamard, numbers))


def _finish_index_k(
    key: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, rotary: RotaryRows, rope_dim: int
) -> torch.Tensor:
    finished = layer_norm(key, weight, bias, eps)
    rope_half_split_(finished[:, :rope_dim].unsqueeze(1), rotary)
    return finished


# --- reading ----------------------------------------------------------------------------------------------------------


def index_scores_paged(
    index_q: torch.Tensor,
    index_k_cache: torch.Tensor,
    index_weights: torch.Tensor,
    block_table: torch.Tensor,
    num_visible: torch.Tensor,
    max_seq_len: int,
) -> torch.Tensor:
    """``reference.index_scores`` on the keys of whole sequences: [B, T, max_seq_len] float32.

    ``index_q: [B, T, J, I]``, ``block_table: [B, >= blocks]`` int32, ``num_visible: [B, T]`` int32: the keys from there
    on are not the token's to see, and what stands for them is unspecified.
    """
    return index_scores(index_q, gather_cache(index_k_cache, block_table, max_seq_len), index_weights)


def index_scores_paged_encoded(
    index_q: torch.Tensor,
    index_k_cache: torch.Tensor,
    index_weights: torch.Tensor,
    block_table: torch.Tensor,
    num_visible: torch.Tensor,
    max_seq_len: int,
    hadamard: torch.Tensor,
    numbers: NumberFormat,
) -> torch.Tensor:
    """``index_scores_paged`` on rows of 8-bit numbers: ``index_k_cache: [num_blocks, block_size, I + 4]`` uint8."""
    key_rows = gather_cache(index_k_cache, block_table, max_seq_len)
    return index_scores_encoded(index_q, key_rows, index_weights, hadamard, numbers)


def attend_paged(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    kv_lora_rank: int,
    softmax_scale: float,
) -> torch.Tensor:
    """Absorbed attention of one token a request to all of its sequence: ``query: [B, H, C]`` -> [B, H, R].

    ``block_table: [B, >= blocks]`` int32, ``seq_lens: [B]`` int32, at most ``max_seq_len`` each.
    """
    latent = gather_cache(latent_cache, block_table, max_seq_len)
    return _attend_gathered(query, latent, seq_lens, kv_lora_rank, softmax_scale)


def attend_paged_encoded(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    layout: LatentRowLayout,
    softmax_scale: float,
) -> torch.Tensor:
    """``attend_paged`` on rows of 8-bit numbers."""
    latent = decode_latent(gather_cache(latent_cache, block_table, max_seq_len), layout, query.dtype)
    return _attend_gathered(query, latent, seq_lens, layout.kv_lora_rank, softmax_scale)


def _attend_gathered(
    query: torch.Tensor, latent: torch.Tensor, seq_lens: torch.Tensor, kv_lora_rank: int, softmax_scale: float
) -> torch.Tensor:
    position = torch.arange(latent.shape[1], device=latent.device)
    return attend_absorbed(query, latent, position >= seq_lens.unsqueeze(1), kv_lora_rank, softmax_scale)


def list_slots(block_table: torch.Tensor, seq_lens: torch.Tensor, max_seq_len: int, block_size: int) -> torch.Tensor:
    """Cache slots of whole sequences: [B, max_seq_len] int64, -1 behind a sequence's end."""
    position = torch.arange(max_seq_len, dtype=torch.int32, device=block_table.device)
    positions = torch.where(position < seq_lens.unsqueeze(1), position, -1)
    return positions_to_slots(positions, block_table, block_size)
