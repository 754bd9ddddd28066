"""Writes, reads and counts with the tokenizer of a checkpoint folder, in Hugging Face's layout.

It adds no bos by itself: the chat encoding does. Training it is `tokenizer_training.py`.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer

from tools.train_tiny import chat
from tools.train_tiny.data import needles


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_position_embeddings: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": chat.BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": chat.EOS,
        "model_max_length": max_position_embeddings,
        "pad_token": chat.PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def token_counter(tokenizer: Tokenizer) -> needles.TokenCounter:
    """Counts the tokens of plain texts."""

    def count(texts: list[str]) -> list[int]:
        return [len(e) for e in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return count
