"""A prefill that multiplies all keys and hides some, against one that gathers the chosen cache rows: the same numbers.

Which of them runs is a matter of speed (``kernels.is_masked_faster``); here it is said for both.
"""

import pytest
import torch

from argosy.assets import builtin_model_directory
from argosy.models.deepseek import mla
from tests.helpers.models import LoadedModel, load_model
from tests.helpers.tolerance import FP32_HIDDEN_ATOL

NUM_TOKENS = 200  # past index_topk (64)


@pytest.fixture(scope="module")
def loaded(device: str) -> LoadedModel:
    return load_model(builtin_model_directory("argosy-tiny"), device=device)


@pytest.mark.parametrize("chunk_size", [NUM_TOKENS, 37])
def test_masked_prefill_equals_the_sparse_one(
    loaded: LoadedModel, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = torch.randint(10, 3000, (NUM_TOKENS,), generator=torch.Generator().manual_seed(5)).tolist()
    num_asked = 0

    def compute(is_masked: bool) -> torch.Tensor:
        def answer(*_: object, **__: object) -> bool:
            nonlocal num_asked
            num_asked += 1
            return is_masked

        monkeypatch.setattr(mla, "is_masked_faster", answer)
        return loaded.probe.hidden_states([prompt], chunk_size)[0]

    torch.testing.assert_close(compute(True), compute(False), atol=FP32_HIDDEN_ATOL, rtol=0)
    assert num_asked > 0
