"""From the scheduler's plan to a step's tensors: the only place where host lists become device tensors.

Invariant: rows keep the plan's order, and every array is a pure function of the plan and the row table.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from argosy.distributed.ep_types import SINGLE_RANK_PLAN, ExchangePlan
from argosy.kernels import RotaryTable, rotary_rows
from argosy.layers.forward_batch import AttentionMetadata, ForwardBatch, PrefillSegment
from argosy.messages import ScheduledBatch
from argosy.runner.row_table import RowTable
from argosy.runner.transfer import send_together


@dataclass(frozen=True, slots=True)
class BuiltBatch:
    """A forward batch, and which entries of the plan will be sampled from its logits."""

    forward: ForwardBatch
    sampled: np.ndarray  # [number of sampled rows] int64: indices into ScheduledBatch.rows, ascending
    sampled_rows: np.ndarray  # the rows themselves
    device_rows: torch.Tensor  # the same on the device


class BatchBuilder:
    """Holds what every batch needs: the row table, the rotation angles, the device.

    ``last_token_ids``: [max_num_seqs] int64 on the device, the token sampled last in each row. A batch takes from there
    what the row table does not know yet.
    """

    def __init__(self, row_table: RowTable, rotary: RotaryTable, device: torch.device) -> None:
        self._table = row_table
        self._rotary = rotary
        self._device = device
        self.last_token_ids = torch.zeros(len(row_table.num_tokens), dtype=torch.int64, device=device)

    def build(self, batch: ScheduledBatch, exchange: ExchangePlan = SINGLE_RANK_PLAN) -> BuiltBatch:
        """NOTE(sync): copies from the host; nothing is read back."""
        rows = np.asarray(batch.rows, dtype=np.int64)
        computed = np.asarray(batch.num_computed_tokens, dtype=np.int64)
        scheduled = np.asarray(batch.num_scheduled_tokens, dtype=np.int64)
        ends = scheduled.cumsum()
        seq_lens = computed + scheduled

        entry = np.repeat(np.arange(len(rows)), scheduled)  # [T]: which entry of the plan each token belongs to
        positions = np.arange(batch.num_tokens) - np.repeat(ends - scheduled - computed, scheduled)
        sampled = np.flatnonzero(seq_lens == self._table.num_tokens[rows])
        late = np.flatnonzero(seq_lens > self._table.num_known_tokens[rows])  # their last token is not known yet
        input_ids, position_tensor, logits_indices, late_tokens, late_rows, device_rows, *attention = send_together(
            (
                self._table.token_ids[rows[entry], positions].astype(np.int64),
                positions,
                ends[sampled] - 1,
                ends[late] - 1,
                rows[late],
                rows[sampled],
                *self._attention_arrays(rows, scheduled, seq_lens, self._slots(rows[entry], positions)),
            ),
            self._device,
        )
        if late.size:
            input_ids[late_tokens] = self.last_token_ids[late_rows]
        forward = ForwardBatch(
            input_ids=input_ids,
            positions=position_tensor,
            rotary=rotary_rows(self._rotary, position_tensor),
            attention=_build_attention(*attention, computed, scheduled),
            logits_indices=logits_indices,
            exchange=exchange,
        )
        return BuiltBatch(forward, sampled, rows[sampled], device_rows)

    def build_dummy(self, exchange: ExchangePlan) -> ForwardBatch:
        """One token of nobody, at position 0: it attends to the null block and writes no slot."""
        one = np.ones(1, dtype=np.int64)
        arrays = 0 * one, 0 * one, one[:0], *self._attention_arrays(0 * one, one, one, -one)
        input_ids, position_tensor, logits_indices, *tensors = send_together(arrays, self._device)
        attention = _build_attention(*tensors, 0 * one, one)
        return ForwardBatch(
            input_ids=input_ids,
            positions=position_tensor,
            rotary=rotary_rows(self._rotary, position_tensor),
            attention=dataclasses.replace(attention, block_table=torch.zeros_like(attention.block_table)),
            logits_indices=logits_indices,
            exchange=exchange,
        )

    def _slots(self, row_of_token: np.ndarray, positions: np.ndarray) -> np.ndarray:
        block_size = self._table.block_size
        blocks = self._table.block_table[row_of_token, positions // block_size].astype(np.int64)
        return blocks * block_size + positions % block_size

    def _attention_arrays(
        self, rows: np.ndarray, scheduled: np.ndarray, seq_lens: np.ndarray, slots: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """query_start_loc, seq_lens, slot_mapping and block_table of ``AttentionMetadata``."""
        max_blocks = (int(seq_lens.max()) + self._table.block_size - 1) // self._table.block_size
        starts = np.concatenate(([0], scheduled.cumsum()))
        block_table = self._table.block_table[rows, :max_blocks]
        return starts.astype(np.int32), seq_lens.astype(np.int32), slots, block_table


def _build_attention(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    computed: np.ndarray,
    scheduled: np.ndarray,
) -> AttentionMetadata:
    """The tensors as they are; what the host must know, from ``computed`` and ``scheduled`` tokens of each row."""
    lengths, starts = computed + scheduled, scheduled.cumsum() - scheduled
    is_prefill = scheduled != 1
    num_decodes = int(is_prefill.argmax()) if is_prefill.any() else len(scheduled)
    segments = tuple(
        PrefillSegment(row=i, start=int(starts[i]), num_tokens=int(scheduled[i]), num_computed_tokens=int(computed[i]))
        for i in range(num_decodes, len(scheduled))
    )
    return AttentionMetadata(
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        slot_mapping=slot_mapping,
        block_table=block_table,
        max_query_len=int(scheduled.max()),
        max_seq_len=int(lengths.max()),
        max_decode_seq_len=int(lengths[:num_decodes].max()) if num_decodes else 0,
        min_decode_seq_len=int(lengths[:num_decodes].min()) if num_decodes else 0,
        num_decode_tokens=num_decodes,
        num_prefill_tokens=slot_mapping.shape[0] - num_decodes,
        prefill_segments=segments,
    )
