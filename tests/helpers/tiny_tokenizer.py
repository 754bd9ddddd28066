"""A byte-level BPE tokenizer with DeepSeek's special tokens, trained in a blink, so that tests need no assets.

Its vocabulary is so small that most Chinese characters and every emoji are split over several tokens.
"""

import json
from pathlib import Path

import tokenizers

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
# Not special in DeepSeek's files either: skip_special_tokens must leave them in the text.
VISIBLE_MARKS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜")

_CORPUS = [
    "The capital of France is Paris. The answer is 42. #### 42",
    "What is 12 + 30? 12 + 30 = 42. Stop here and think again.",
    "法国的首都是巴黎。答案是四十二。床前明月光，疑是地上霜。",
    "What is the capital of China? 中国的首都是北京。",
]


def build_tiny_backend(vocab_size: int = 360) -> tokenizers.Tokenizer:
    """bos is 0, eos is 1; the visible marks have the highest ids."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    backend.add_tokens([tokenizers.AddedToken(mark, special=False, normalized=False) for mark in VISIBLE_MARKS])
    return backend


def write_tiny_tokenizer(directory: Path, **tokenizer_config: object) -> Path:
    """Writes tokenizer.json and a tokenizer_config.json that names bos and eos; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    build_tiny_backend().save(str(directory / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": {"content": EOS}, **tokenizer_config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
