"""Scores a model on questions: exact match per category and language, and the acceptance rate of MTP drafts.

Invariant: a question counts as right only if the text after the last `####`, trimmed, equals its answer.
"""

import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer

from tools.train_tiny import chat
from tools.train_tiny.data.example import Example, extract_answer
from tools.train_tiny.decode import DecodeConfig, decode_greedy
from tools.train_tiny.model import Indexer, TinyModel


@dataclass(kw_only=True, slots=True)
class Score:
    """Counts of one evaluation."""

    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    total: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    num_drafts: int = 0
    num_accepted: int = 0
    num_output_tokens: int = 0
    misses: list[tuple[str, str, str]] = field(default_factory=list)  # prompt, answer, completion

    @property
    def exact_match(self) -> float:
        """Share of right answers."""
        return self.right["all"] / max(1, self.total["all"])

    @property
    def acceptance_rate(self) -> float:
        """Share of drafts equal to the main model's next token."""
        return self.num_accepted / max(1, self.num_drafts)

    def report(self) -> str:
        """One line."""
        parts = [f"{key} {self.right[key]}/{self.total[key]}" for key in sorted(self.total)]
        return f"exact match {self.exact_match:.4f} | MTP acceptance {self.acceptance_rate:.4f} | " + ", ".join(parts)


def score_questions(
    model: TinyModel,
    tokenizer: Tokenizer,
    questions: list[Example],
    config: DecodeConfig,
    max_batch_tokens: int,
    is_thinking: bool = False,
) -> Score:
    """Greedy answers of all questions, sorted by length into batches."""
    score = Score()
    prompts = [
        tokenizer.encode(chat.render_prompt(q.prompt, is_thinking=is_thinking), add_special_tokens=False).ids
        for q in questions
    ]
    order = sorted(range(len(questions)), key=lambda i: len(prompts[i]))
    while order:
        size = 1
        while size < len(order) and (size + 1) * len(prompts[order[size]]) <= max_batch_tokens:
            size += 1
        batch, order = order[:size], order[size:]
        decoded = decode_greedy(model, [prompts[i] for i in batch], config)
        score.num_drafts += decoded.num_drafts
        score.num_accepted += decoded.num_accepted
        for i, output in zip(batch, decoded.outputs, strict=True):
            score.num_output_tokens += len(output)
            _count(score, questions[i], tokenizer.decode(output, skip_special_tokens=True), is_thinking)
    return score


@torch.no_grad()
def randomise_indexers(model: TinyModel, seed: int) -> None:
    """Replaces every indexer's weights by random ones of the same size: the answers should suffer."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Indexer):
            for parameter in (module.wq_b.weight, module.wk.weight, module.weights_proj.weight):
                noise = torch.randn(parameter.shape, generator=generator) * float(parameter.std())
                parameter.copy_(noise)


def timed(label: str, score: Score, start_s: float) -> str:
    """A report line with its label and duration."""
    return f"{label}: {score.report()} ({time.perf_counter() - start_s:.1f} s)"


def _count(score: Score, question: Example, completion: str, is_thinking: bool) -> None:
    answer = completion.rsplit(chat.THINK_END, 1)[-1] if is_thinking else completion
    is_right = extract_answer(answer) == question.answer
    for key in ("all", question.category, f"language {question.language}"):
        score.total[key] += 1
        score.right[key] += is_right
    if not is_right:
        score.misses.append((question.prompt[-300:], question.answer, completion))
