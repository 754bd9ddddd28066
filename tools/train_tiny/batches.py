"""Batches of similar length, a pure function of (seed, group index).

A group draws conversations, sorts them into length buckets and cuts full batches; what does not fill one moves up
a bucket.
Invariant: the sequence of batches does not depend on how many worker processes prepare it.
Shapes: B sequences, S padded length.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from tools.train_tiny import chat
from tools.train_tiny.config import RecipeConfig
from tools.train_tiny.data.conversation import MixtureConfig
from tools.train_tiny.data.mixture import sample_conversation
from tools.train_tiny.tokenizer import load_tokenizer, token_counter

Batch = tuple[torch.Tensor, torch.Tensor]  # ids [B, S] int64, weights [B, S] float32
PackedBatch = tuple[np.ndarray, np.ndarray]  # the same as uint16 and float16: small to send between processes
_CHUNK = 256  # conversations encoded at once


class BatchGroups(Dataset):
    """Group index -> the list of its batches."""

    def __init__(
        self, folder: Path, seed: int, recipe: RecipeConfig, mixture: MixtureConfig, held_out: frozenset[str]
    ) -> None:
        self._folder = folder
        self._seed = seed
        self._recipe = recipe
        self._mixture = mixture
        self._held_out = held_out
        self._tokenizer: Tokenizer | None = None  # loaded in the worker

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, group: int) -> list[PackedBatch]:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._folder)
        rng = Random(f"group-{self._seed}-{group}")
        buckets = self._fill_buckets(rng, self._tokenizer)
        batches, left_over = [], []
        for length in self._recipe.bucket_lengths:
            rows = left_over + buckets[length]
            count = max(1, self._recipe.num_batch_tokens // length)
            full = len(rows) // count * count
            batches += [_stack(rows[start : start + count], length) for start in range(0, full, count)]
            left_over = rows[full:]
        rng.shuffle(batches)
        return batches

    def _fill_buckets(self, rng: Random, tokenizer: Tokenizer) -> dict[int, list[chat.EncodedConversation]]:
        buckets: dict[int, list[chat.EncodedConversation]] = defaultdict(list)
        counter, mixture, drawn = token_counter(tokenizer), self._mixture, 0
        while drawn < self._recipe.group_tokens:
            conversations = [sample_conversation(rng, mixture, counter, self._held_out) for _ in range(_CHUNK)]
            for row in chat.encode_conversations(tokenizer, conversations, mixture.prompt_weight):
                drawn += len(row.ids)
                length = next((n for n in self._recipe.bucket_lengths if n >= len(row.ids)), None)
                if length is not None:
                    buckets[length].append(row)
        return buckets


def iterate_batches(groups: BatchGroups, num_workers: int, first_group: int = 0) -> Iterator[Batch]:
    """Endless batches, groups in order."""
    loader = DataLoader(
        groups,
        batch_size=None,
        sampler=range(first_group, 10**9),
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
        collate_fn=_keep,
    )
    for batches in loader:
        for ids, weights in batches:
            yield torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(weights.astype(np.float32))


def _keep(batches: list[PackedBatch]) -> list[PackedBatch]:
    """No collation: arrays travel pickled, not as shared-memory tensors, whose file descriptors run out."""
    return batches


def _stack(rows: list[chat.EncodedConversation], length: int) -> PackedBatch:
    """Right-padded arrays."""
    ids = np.full((len(rows), length), chat.PAD_ID, dtype=np.uint16)
    weights = np.zeros((len(rows), length), dtype=np.float16)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = row.ids
        weights[at, : len(row.ids)] = row.weights
    return ids, weights
