"""Which implementation of rotation, of what touches the cache, and of attention runs: the input's device decides.

As ``choice.py``, which has all other operations. Invariant: every implementation of an operation gives what
``reference.py``, ``reference_cache_rows.py`` or ``reference_paged.py`` gives.
"""

from types import ModuleType

import torch

from argosy.kernels import cpu, reference, reference_cache_rows, reference_paged
from argosy.kernels.card import has_kernels
from argosy.kernels.choice import rms_norm
from argosy.kernels.cpu_choice import MAX_SCORES, load_loops, loops_for
from argosy.kernels.reference import RotaryRows, RotaryTable
from argosy.kernels.reference_cache_rows import LatentRowLayout, NumberFormat
from argosy.kernels.reference_paged import DecodeInputs

SLOT_MULTIPLE = 16  # what Triton compiles a kernel for, and apart from other lengths

# --- rotary embeddings ------------------------------------------------------------------------------------------------


def rotary_rows(table: RotaryTable, positions: torch.Tensor) -> RotaryRows:
    """See ``reference.RotaryTable.at``."""
    if not has_kernels(positions):
        loops = load_loops() if positions.is_cpu else None
        return table.at(positions) if loops is None else loops.rotary_rows(table, positions)
    from argosy.kernels.triton import rotary

    return rotary.rotary_rows(table, positions)


def rope_interleaved_into(x: torch.Tensor, rotary: RotaryRows, out: torch.Tensor) -> None:
    """See ``reference.rope_interleaved_into``."""
    _rotary_of(x).rope_interleaved_into(x, rotary, out)


def rope_interleaved_(x: torch.Tensor, rotary: RotaryRows) -> None:
    """See ``reference.rope_interleaved_``."""
    _rotary_of(x).rope_interleaved_(x, rotary)


def rope_half_split_(x: torch.Tensor, rotary: RotaryRows) -> None:
    """See ``reference.rope_half_split_``."""
    _rotary_of(x).rope_half_split_(x, rotary)


def _rotary_of(x: torch.Tensor) -> ModuleType:
    if not has_kernels(x):
        return loops_for(x) or reference
    from argosy.kernels.triton import rotary

    return rotary


# --- the cache --------------------------------------------------------------------------------------------------------


def write_latent(
    latent: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    rotary: RotaryRows,
    latent_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """See ``reference_paged.write_latent``."""
    arguments = latent, norm_weight, eps, rotary, latent_cache, slot_mapping
    loops = loops_for(latent) if latent_cache.dtype is latent.dtype else None
    if loops is not None:
        loops.write_latent(*arguments)
        return
    if not has_kernels(latent):
        reference_paged.write_latent(*arguments, rms_norm)
        return
    from argosy.kernels.triton import cache_write

    cache_write.write_latent(*arguments)


def write_latent_encoded(
    latent: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    rotary: RotaryRows,
    latent_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: LatentRowLayout,
) -> None:
    """See ``reference_paged.write_latent_encoded``."""
    arguments = (latent, norm_weight, eps, rotary, latent_cache, slot_mapping, layout)
    if not has_kernels(latent):
        reference_paged.write_latent_encoded(*arguments, rms_norm)
        return
    from argosy.kernels.triton import cache_write

    cache_write.write_latent_encoded(*arguments)


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
    """See ``reference_paged.write_index_k``."""
    chosen = (loops_for(key) if index_k_cache.dtype is key.dtype else None) or _cache_write_of(key)
    chosen.write_index_k(key, norm_weight, norm_bias, eps, rotary, rope_dim, index_k_cache, slot_mapping)


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
    """See ``reference_paged.write_index_k_encoded``."""
    _cache_write_of(key).write_index_k_encoded(
        key, norm_weight, norm_bias, eps, rotary, rope_dim, index_k_cache, slot_mapping, hadamard, numbers
    )


def _cache_write_of(x: torch.Tensor) -> ModuleType:
    if not has_kernels(x):
        return reference_paged
    from argosy.kernels.triton import cache_write

    return cache_write


def fill_decode_inputs(target: DecodeInputs, source: DecodeInputs) -> None:
    """See ``reference_paged.fill_decode_inputs``."""
    if not has_kernels(target[0]):
        reference_paged.fill_decode_inputs(target, source)
        return
    from argosy.kernels.triton import decode_inputs

    decode_inputs.fill_decode_inputs(target, source)


# --- the indexer and attention ----------------------------------------------------------------------------------------


def index_scores_paged(
    index_q: torch.Tensor,
    index_k_cache: torch.Tensor,
    index_weights: torch.Tensor,
    block_table: torch.Tensor,
    num_visible: torch.Tensor,
    max_seq_len: int,
) -> torch.Tensor:
    """See ``reference_paged.index_scores_paged``."""
    chosen = _index_scores_of(index_q)
    return chosen.index_scores_paged(index_q, index_k_cache, index_weights, block_table, num_visible, max_seq_len)


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
    """See ``reference_paged.index_scores_paged_encoded``."""
    return _index_scores_of(index_q).index_scores_paged_encoded(
        index_q, index_k_cache, index_weights, block_table, num_visible, max_seq_len, hadamard, numbers
    )


def _index_scores_of(index_q: torch.Tensor) -> ModuleType:
    if not has_kernels(index_q):
        return reference_paged
    from argosy.kernels.triton import index_scores

    return index_scores if index_scores.takes(index_q) else reference_paged


def select_topk_slots(
    scores: torch.Tensor, num_visible: torch.Tensor, topk: int, block_table: torch.Tensor, block_size: int
) -> torch.Tensor:
    """See ``reference.select_topk_slots``; the order within a row is the implementation's own."""
    if scores.is_cpu:
        chosen = loops_for(scores, MAX_SCORES) or cpu
        return chosen.select_topk_slots(scores, num_visible, topk, block_table, block_size)
    if not has_kernels(scores):
        return reference.select_topk_slots(scores, num_visible, topk, block_table, block_size)
    from argosy.kernels.triton import topk as triton_topk

    return triton_topk.select_topk_slots(scores, num_visible, topk, block_table, block_size)


def select_topk_mask(scores: torch.Tensor, num_visible: torch.Tensor, topk: int) -> torch.Tensor:
    """See ``reference.select_topk_mask``."""
    if not has_kernels(scores):
        return reference.select_topk_mask(scores, num_visible, topk)
    from argosy.kernels.triton import topk as triton_topk

    return triton_topk.select_topk_mask(scores, num_visible, topk)


def is_masked_faster(
    q_nope: torch.Tensor, *, num_computed: int, num_selected: int, kv_lora_rank: int, rope_dim: int, v_dim: int
) -> bool:
    """Whether ``q_nope: [T, H, N]`` are better off with ``attend_expanded_masked`` than with ``attend_sparse``: on
    NVIDIA cards, up to a length (``triton/masked_mla.py``)."""
    if not has_kernels(q_nope):
        return False
    from argosy.kernels.triton import masked_mla

    dims = masked_mla.Dims(kv_lora_rank, q_nope.shape[2], rope_dim, v_dim)
    return masked_mla.is_faster_than_sparse(q_nope.shape[0], num_computed, num_selected, dims)


def attend_expanded_masked(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    num_computed: int,
    softmax_scale: float,
) -> torch.Tensor:
    """See ``reference.attend_expanded_masked``."""
    tensors = (q_nope, q_rope, k_nope, k_rope, value, mask, num_computed, softmax_scale)
    if not has_kernels(q_nope):
        return reference.attend_expanded_masked(*tensors)
    from argosy.kernels.triton import masked_mla

    return masked_mla.attend_expanded_masked(*tensors)


def attend_sparse(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    topk_slots: torch.Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
    *,
    is_full: bool = False,
) -> torch.Tensor:
    """See ``reference.attend_sparse``."""
    if not has_kernels(query):
        return reference.attend_sparse(query, latent_cache, topk_slots, kv_lora_rank, softmax_scale, is_full=is_full)
    from argosy.kernels.triton import sparse_mla

    return sparse_mla.attend_sparse(query, latent_cache, topk_slots, kv_lora_rank, softmax_scale, is_full=is_full)


def attend_sparse_encoded(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    topk_slots: torch.Tensor,
    layout: LatentRowLayout,
    softmax_scale: float,
    *,
    is_full: bool = False,
) -> torch.Tensor:
    """See ``reference_cache_rows.attend_sparse_encoded``."""
    if not has_kernels(query):
        return reference_cache_rows.attend_sparse_encoded(
            query, latent_cache, topk_slots, layout, softmax_scale, is_full=is_full
        )
    from argosy.kernels.triton import sparse_mla

    return sparse_mla.attend_sparse_encoded(query, latent_cache, topk_slots, layout, softmax_scale, is_full=is_full)


def attend_paged(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    kv_lora_rank: int,
    softmax_scale: float,
) -> torch.Tensor:
    """See ``reference_paged.attend_paged``. On a card it is sparse attention that selects everything."""
    if not has_kernels(query):
        return reference_paged.attend_paged(
            query, latent_cache, block_table, seq_lens, max_seq_len, kv_lora_rank, softmax_scale
        )
    slots = _list_slots(block_table, seq_lens, max_seq_len, latent_cache.shape[1])
    return attend_sparse(query, latent_cache, slots, kv_lora_rank, softmax_scale)


def attend_paged_encoded(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    layout: LatentRowLayout,
    softmax_scale: float,
) -> torch.Tensor:
    """See ``reference_paged.attend_paged_encoded``."""
    if not has_kernels(query):
        return reference_paged.attend_paged_encoded(
            query, latent_cache, block_table, seq_lens, max_seq_len, layout, softmax_scale
        )
    slots = _list_slots(block_table, seq_lens, max_seq_len, latent_cache.shape[1])
    return attend_sparse_encoded(query, latent_cache, slots, layout, softmax_scale)


def _list_slots(block_table: torch.Tensor, seq_lens: torch.Tensor, max_seq_len: int, block_size: int) -> torch.Tensor:
    """``reference_paged.list_slots`` in whole multiples: for rows of other lengths a kernel is compiled once more."""
    multiple = min(SLOT_MULTIPLE, block_size)  # both powers of two, so the block table reaches as far
    num_slots = -(-max_seq_len // multiple) * multiple
    return reference_paged.list_slots(block_table, seq_lens, num_slots, block_size)
