"""A step's tensors, as every layer sees them. Packed and token-major: no batch dimension, no padding.

Built once per step by ``runner/batch_builder.py``. It holds what does not outlive the step; weights, caches and
communicators live in modules. Invariant: rows (requests) are ordered decodes first, and a decode has exactly one token.

Shape letters: T tokens, B requests.
"""

from dataclasses import dataclass

import torch

from argosy.distributed.ep_types import ExchangePlan
from argosy.kernels import RotaryRows
from argosy.platforms import NoSideLane, SideLane


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillSegment:
    """One request that computes several tokens in this step; plain integers, so that loops need no device sync."""

    row: int  # row of block_table
    start: int  # first token in the batch
    num_tokens: int
    num_computed_tokens: int  # tokens already in the cache

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def seq_len(self) -> int:
        return self.num_computed_tokens + self.num_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMetadata:
    """What attention must know of the requests in the batch."""

    query_start_loc: torch.Tensor  # [B + 1] int32
    seq_lens: torch.Tensor  # [B] int32: computed + scheduled
    slot_mapping: torch.Tensor  # [T] int64; -1 = do not write
    block_table: torch.Tensor  # [B, max_blocks] int32
    max_query_len: int
    max_seq_len: int  # over all rows
    max_decode_seq_len: int  # over the decode rows; 0 without any
    min_decode_seq_len: int
    num_decode_tokens: int  # equals the number of decode rows
    num_prefill_tokens: int
    prefill_segments: tuple[PrefillSegment, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardBatch:
    """Inputs of one forward pass: equal on all ranks of a replica, whose token slices are cut from it."""

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    rotary: RotaryRows  # of ``positions``: looked up once, used by every layer
    attention: AttentionMetadata
    logits_indices: torch.Tensor  # [number of sampled rows] int64: tokens whose logits are wanted
    exchange: ExchangePlan  # how tokens reach their experts: agreed by all ranks
    side_lane: SideLane = NoSideLane()  # for work that need not wait for its neighbours

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]
