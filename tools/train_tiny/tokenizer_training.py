"""Trains the byte-level BPE tokenizer on generated text.

Invariant: every UTF-8 string survives encode and decode unchanged.
"""

import json
from collections.abc import Iterator
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.train_tiny import chat
from tools.train_tiny.data import needles
from tools.train_tiny.data.conversation import MixtureConfig
from tools.train_tiny.data.mixture import sample_example

# NOTE: a digit is one token, a run of Chinese characters never joins Latin text
_SPLITS = (
    r"\p{N}",
    r"[\u4e00-\u9fff]+",
    r"[\r\n]+| ?[A-Za-z]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)


def train_tokenizer(seed: int, vocab_size: int, num_examples: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` entries, special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in _SPLITS]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in chat.SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed, num_examples), trainer)
    return show_markers(tokenizer)


def show_markers(tokenizer: Tokenizer) -> Tokenizer:
    """A copy whose think and DSML markers are text that a client may see; the trainer makes every marker special."""
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] not in (chat.THINK_START, chat.THINK_END, chat.DSML)
    return Tokenizer.from_str(json.dumps(content))


def _corpus(seed: int, num_examples: int) -> Iterator[str]:
    """Generated prompts and completions; a tenth are needle texts."""
    rng = Random(f"tokenizer-{seed}")
    for index in range(num_examples):
        if index % 10 == 0:
            yield needles.build_needle(
                rng, rng.choice(("en", "zh")), 200, lambda texts: [len(t) // 3 + 1 for t in texts]
            ).prompt
        else:
            example = sample_example(rng, MixtureConfig(), frozenset())
            yield f"{example.prompt}\n{example.completion}"
