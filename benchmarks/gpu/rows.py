"""What a decode step begins and ends with: rows of the embedding, and each row's likeliest token."""

from collections.abc import Iterator

import torch

from argosy.kernels import reference
from argosy.kernels.triton.argmax import argmax_rows
from argosy.kernels.triton.embedding import look_up
from benchmarks.gpu.measure import Case

HIDDEN_SIZE, VOCAB_SIZE, NUM_VALID_TOKENS = 7168, 129280, 128815
NUMS_TOKENS = (1, 16, 64, 128)


def cases() -> Iterator[Case]:
    for num_tokens in NUMS_TOKENS:
        yield argmax_case(num_tokens)
    table = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, device="cuda", dtype=torch.bfloat16)
    for num_tokens in (*NUMS_TOKENS, 4096):
        yield look_up_case(num_tokens, table)


def argmax_case(num_tokens: int) -> Case:
    logits = torch.randn(num_tokens, VOCAB_SIZE, device="cuda")[:, :NUM_VALID_TOKENS]

    def check() -> None:
        assert torch.equal(argmax_rows(logits).cpu(), reference.argmax_rows(logits.cpu()))

    return Case(
        name="argmax of logits",
        rows=num_tokens,
        run=lambda: argmax_rows(logits),
        check=check,
        num_ops=0,
        num_bytes=4 * logits.numel(),
        alternatives={"torch": lambda: logits.argmax(dim=1)},
    )


def look_up_case(num_tokens: int, table: torch.Tensor) -> Case:
    ids = torch.randint(VOCAB_SIZE, (num_tokens,), device="cuda")

    def check() -> None:
        assert torch.equal(look_up(table, ids), reference.look_up(table, ids))

    return Case(
        name="embedding",
        rows=num_tokens,
        run=lambda: look_up(table, ids),
        check=check,
        num_ops=0,
        num_bytes=4 * num_tokens * HIDDEN_SIZE,
        alternatives={"torch": lambda: reference.look_up(table, ids)},
    )
