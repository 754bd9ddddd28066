"""From the scheduler's plan to a step's tensors: the only place where host lists become device tensors.

Invariant: rows keep the plan's order, and every array is a pure function of the plan and the row table.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from argosy.distributed.ep_types import SINGLE_RANK_PLAN, ExchangePlan
from argosy.kernels import RotaryTable
from argosy.layers.forward_batch import AttentionMetadata, ForwardBatch, PrefillSegment
from argosy.messages import ScheduledBatch
from argosy.runner.row_table import RowTable
from argosy.runner.transfer import send


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
        position_tensor = self._to_device(positions)
        input_ids = self._to_device(self._table.token_ids[rows[entry], positions].astype(np.int64))
        late_tokens, late_rows, device_rows = self._to_device(
            np.concatenate((ends[late] - 1, rows[late], rows[sampled]))
        ).split((len(late), len(late), len(sampled)))
        if late.size:
            input_ids[late_tokens] = self.last_token_ids[late_rows]
        forward = ForwardBatch(
            input_ids=input_ids,
            positions=position_tensor,
            rotary=self._rotary.at(position_tensor),
            attention=self._build_attention(rows, computed, scheduled, seq_lens, self._slots(rows[entry], positions)),
            logits_indices=self._to_device(ends[sampled] - 1),
            exchange=exchange,
        )
        return BuiltBatch(forward, sampled, rows[sampled], device_rows)

    def build_dummy(self, exchange: ExchangePlan) -> ForwardBatch:
        """One token of nobody, at position 0: it attends to the null block and writes no slot."""
        one = np.ones(1, dtype=np.int64)
        position_tensor = self._to_device(0 * one)
        attention = self._build_attention(0 * one, 0 * one, one, one, -one)
        return ForwardBatch(
            input_ids=self._to_device(0 * one),
            positions=position_tensor,
            rotary=self._rotary.at(position_tensor),
            attention=dataclasses.replace(attention, block_table=torch.zeros_like(attention.block_table)),
            logits_indices=self._to_device(one[:0]),
            exchange=exchange,
        )

    def _slots(self, row_of_token: np.ndarray, positions: np.ndarray) -> np.ndarray:
        block_size = self._table.block_size
        blocks = self._table.block_table[row_of_token, positions // block_size].astype(np.int64)
        return blocks * block_size + positions % block_size

    def _build_attention(
        self, rows: np.ndarray, computed: np.ndarray, scheduled: np.ndarray, seq_lens: np.ndarray, slots: np.ndarray
    ) -> AttentionMetadata:
        is_prefill = scheduled != 1
        num_decodes = int(is_prefill.argmax()) if is_prefill.any() else len(rows)
        max_seq_len = int(seq_lens.max())
        max_blocks = (max_seq_len + self._table.block_size - 1) // self._table.block_size
        starts = np.concatenate(([0], scheduled.cumsum()))
        segments = tuple(
            PrefillSegment(
                row=i, start=int(starts[i]), num_tokens=int(scheduled[i]), num_computed_tokens=int(computed[i])
            )
            for i in range(num_decodes, len(rows))
        )
        return AttentionMetadata(
            query_start_loc=self._to_device(starts.astype(np.int32)),
            seq_lens=self._to_device(seq_lens.astype(np.int32)),
            slot_mapping=self._to_device(slots),
            block_table=self._to_device(self._table.block_table[rows, :max_blocks]),
            max_query_len=int(scheduled.max()),
            max_seq_len=max_seq_len,
            max_decode_seq_len=int(seq_lens[:num_decodes].max()) if num_decodes else 0,
            min_decode_seq_len=int(seq_lens[:num_decodes].min()) if num_decodes else 0,
            num_decode_tokens=num_decodes,
            num_prefill_tokens=len(slots) - num_decodes,
            prefill_segments=segments,
        )

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return send(array, self._device)
