"""DeepSeek-V3.2's chat format, and conversations as token ids with loss weights.

Only what training needs: no tools, no response schemas. Invariant: a turn's loss weight is 1 from the first token the
model must write up to and including the end-of-sentence token.
"""

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from tools.train_tiny.data.conversation import Conversation

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK_START, THINK_END, DSML = "<think>", "</think>", "｜DSML｜"
# in the order of their ids
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, THINK_START, THINK_END, DSML)
BOS_ID, EOS_ID, PAD_ID, USER_ID, ASSISTANT_ID = range(5)
_DIRECT_THOUGHT = {"en": "This can be answered directly.", "zh": "可以直接回答。"}


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedConversation:
    """Token ids and, for each, the loss weight of predicting it."""

    ids: np.ndarray  # [S] uint16
    weights: np.ndarray  # [S] float32; 0 for the first token


def render_prompt(prompt: str, system: str = "", is_thinking: bool = False) -> str:
    """The text whose continuation is the assistant's answer."""
    return f"{BOS}{system}{USER}{prompt}{ASSISTANT}{THINK_START if is_thinking else THINK_END}"


def render_conversation(conversation: Conversation) -> str:
    """The whole training text."""
    parts = [BOS, conversation.system]
    for turn in conversation.turns:
        parts += [USER, turn.prompt, ASSISTANT]
        if conversation.is_thinking:
            thought = turn.steps or _DIRECT_THOUGHT[turn.language]
            parts += [THINK_START, thought, THINK_END, turn.answer, EOS]
        else:
            parts += [THINK_END, turn.completion, EOS]
    return "".join(parts)


def encode_conversations(
    tokenizer: Tokenizer, conversations: list[Conversation], prompt_weight: float
) -> list[EncodedConversation]:
    """Token ids and loss weights of a list of conversations."""
    texts = [render_conversation(c) for c in conversations]
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [_weigh(np.array(e.ids, dtype=np.int64), prompt_weight) for e in encodings]


def _weigh(ids: np.ndarray, prompt_weight: float) -> EncodedConversation:
    weights = np.full(len(ids), prompt_weight, dtype=np.float32)
    weights[0] = 0.0
    starts, ends = np.flatnonzero(ids == ASSISTANT_ID), np.flatnonzero(ids == EOS_ID)
    for start, end in zip(starts, ends, strict=True):
        weights[start : start + 2] = 0.0  # the encoding writes <Assistant> and the think marker
        weights[start + 2 : end + 1] = 1.0
    weights[ids == USER_ID] = 0.0
    return EncodedConversation(ids=ids.astype(np.uint16), weights=weights)
