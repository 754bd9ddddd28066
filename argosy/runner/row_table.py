"""The runner's memory of the requests that run: token ids and block tables by row.

A row is the small integer the scheduler gives a request (``argosy/messages.py``). This table follows the scheduler's
plan and the sampled tokens; it decides nothing. Invariant: ``token_ids[row, :num_known_tokens[row]]`` are the tokens of
the request in that row; one more is counted in ``num_tokens`` while a step in flight samples it.
"""

import numpy as np

from argosy.messages import AdmittedRequest, ScheduledBatch

UNKNOWN_TOKEN_ID = -1  # until ``learn``; no embedding has such a row, so reading it fails loudly


class RowTable:
    """Host tables, allocated once. Memory that no request has touched yet costs nothing (the kernel's zero pages)."""

    def __init__(self, *, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        max_blocks = (max_model_len + block_size - 1) // block_size
        self.block_size = block_size
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int32)
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int32)
        self.num_known_tokens = np.zeros(max_num_seqs, dtype=np.int32)
        self.num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int32)
        self.block_table = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._num_blocks = np.zeros(max_num_seqs, dtype=np.int32)

    def apply(self, batch: ScheduledBatch) -> None:
        """Take over the rows that start and the blocks that were added."""
        for request in batch.admitted:
            self._admit(request)
        for row, block_ids in batch.new_block_ids:
            self._append_blocks(row, block_ids)

    def count_sampled(self, rows: np.ndarray) -> np.ndarray:
        """Each row gets one more token, which is not known yet; where ``learn`` will put it."""
        positions = self.num_tokens[rows]
        self.token_ids[rows, positions] = UNKNOWN_TOKEN_ID
        self.num_tokens[rows] += 1
        return positions

    def learn(self, rows: np.ndarray, positions: np.ndarray, token_ids: np.ndarray) -> None:
        """The tokens that ``count_sampled`` announced, step by step in its order."""
        self.token_ids[rows, positions] = token_ids
        self.num_known_tokens[rows] = positions + 1

    def _admit(self, request: AdmittedRequest) -> None:
        row, num_tokens = request.row, len(request.token_ids)
        self.token_ids[row, :num_tokens] = request.token_ids
        self.num_tokens[row] = self.num_known_tokens[row] = num_tokens
        self.num_prompt_tokens[row] = request.num_prompt_tokens
        self._num_blocks[row] = 0
        self._append_blocks(row, request.block_ids)

    def _append_blocks(self, row: int, block_ids: list[int]) -> None:
        start = self._num_blocks[row]
        self.block_table[row, start : start + len(block_ids)] = block_ids
        self._num_blocks[row] = start + len(block_ids)
