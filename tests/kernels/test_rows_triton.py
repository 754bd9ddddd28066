"""Rows looked up in a table, and each row's largest number, against their specifications.

On an NVIDIA card, or without one in Triton's interpreter:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_rows_triton.py
"""

import os
from types import SimpleNamespace

import pytest
import torch

from argosy.kernels import reference

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
DTYPES = (torch.float32,) if IS_INTERPRETED else (torch.float32, torch.bfloat16)
# Within one block, at its end, and with a last block that is not full; on a card also DeepSeek's vocabulary.
WIDTHS = (1, 40, 2048, 5003) if IS_INTERPRETED else (1, 40, 2048, 5003, 128815)
NUMS_ROWS = (0, 1, 7) if IS_INTERPRETED else (0, 1, 7, 16, 128)

pytestmark = pytest.mark.skipif(
    not IS_INTERPRETED and not torch.cuda.is_available(), reason="needs an NVIDIA card, or TRITON_INTERPRET=1"
)


@pytest.fixture
def kernels() -> SimpleNamespace:
    pytest.importorskip("triton")
    from argosy.kernels.triton import argmax, embedding

    return SimpleNamespace(argmax_rows=argmax.argmax_rows, look_up=embedding.look_up)


def expect_places(x: torch.Tensor) -> torch.Tensor:
    """On the host: a card's own argmax promises no order among equals."""
    return reference.argmax_rows(x.cpu()).to(DEVICE)


@pytest.mark.parametrize("num_rows", NUMS_ROWS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_number_is_found(kernels: SimpleNamespace, dtype: torch.dtype, width: int, num_rows: int) -> None:
    """Behind a row's end stand larger ones, which are not valid tokens'."""
    torch.manual_seed(num_rows)
    wide = torch.randn(num_rows, width + 16, device=DEVICE).to(dtype)
    wide[:, width:] = 100.0
    x = wide[:, :width]
    for numbers in (x, -x.abs() - 1.0):
        places = kernels.argmax_rows(numbers)
        assert places.dtype == torch.int64 and torch.equal(places, expect_places(numbers))


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_first_of_equals_is_taken(kernels: SimpleNamespace, width: int) -> None:
    x = torch.full((5, width), -1.0, device=DEVICE)
    x[1, [width // 2, width - 1]] = 3.0
    x[2, 3:] = 0.0
    x[2, 7], x[2, 3] = 0.0, -0.0
    x[3] = -torch.inf
    x[4, 5:] = torch.inf
    assert kernels.argmax_rows(x).tolist() == [0, width // 2, 3, 0, 5]


@pytest.mark.parametrize("sign", (1.0, -1.0))
def test_a_nan_is_above_all(kernels: SimpleNamespace, sign: float) -> None:
    x = torch.zeros(2, 5003, device=DEVICE)
    x[:, 10] = torch.inf
    x[1, [4000, 5002]] = torch.copysign(torch.tensor(torch.nan), torch.tensor(sign)).item()
    assert kernels.argmax_rows(x).tolist() == expect_places(x).tolist() == [10, 4000]


@pytest.mark.parametrize("num_tokens", (0, 1, 7, 40))
@pytest.mark.parametrize("width", (40, 1500) if IS_INTERPRETED else (40, 1500, 7168))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_rows_are_looked_up(kernels: SimpleNamespace, dtype: torch.dtype, width: int, num_tokens: int) -> None:
    torch.manual_seed(num_tokens)
    table = torch.randn(90, width, device=DEVICE).to(dtype)
    ids = torch.randint(90, (num_tokens, 2), device=DEVICE)
    ids[:1] = 89
    for numbers in (ids[:, 0], ids[:, 1].contiguous()):
        assert torch.equal(kernels.look_up(table, numbers), reference.look_up(table, numbers))
