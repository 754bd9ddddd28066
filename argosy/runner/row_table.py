"""The runner's memory of the requests that run: token ids and block tables by row.

A row is the small integer the scheduler gives a request (``argosy/messages.py``). This table follows the scheduler's
plan and the sampled tokens; it decides nothing. Invariant: ``token_ids[row, :num_tokens[row]]`` are all tokens known
of the request in that row.
"""

import numpy as np

from argosy.messages import AdmittedRequest, ScheduledBatch


class RowTable:
    """Host tables, allocated once. Memory that no request has touched yet costs nothing (the kernel's zero pages)."""

    def __init__(self, *, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        max_blocks = (max_model_len + block_size - 1) // block_size
        self.block_size = block_size
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int32)
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int32)
        self.num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int32)
        self.block_table = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._num_blocks = np.zeros(max_num_seqs, dtype=np.int32)

    def apply(self, batch: ScheduledBatch) -> None:
        """Take over the rows that start and the blocks that were added."""
        for request in batch.admitted:
            self._admit(request)
        for row, block_ids in batch.new_block_ids:
            self._append_blocks(row, block_ids)

    def append_tokens(self, row: int, token_ids: list[int]) -> None:
        start = self.num_tokens[row]
        self.token_ids[row, start : start + len(token_ids)] = token_ids
        self.num_tokens[row] = start + len(token_ids)

    def append_one_token_each(self, rows: np.ndarray, token_ids: np.ndarray) -> None:
        """One new token for every row, without a loop."""
        self.token_ids[rows, self.num_tokens[rows]] = token_ids
        self.num_tokens[rows] += 1

    def _admit(self, request: AdmittedRequest) -> None:
        row = request.row
        self.num_tokens[row] = 0
        self.append_tokens(row, request.token_ids)
        self.num_prompt_tokens[row] = request.num_prompt_tokens
        self._num_blocks[row] = 0
        self._append_blocks(row, request.block_ids)

    def _append_blocks(self, row: int, block_ids: list[int]) -> None:
        start = self._num_blocks[row]
        self.block_table[row, start : start + len(block_ids)] = block_ids
        self._num_blocks[row] = start + len(block_ids)
