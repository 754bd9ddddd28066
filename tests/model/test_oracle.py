"""Our model against ``transformers`` on random models: every layer, every way to prefill, sparse attention active."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from argosy.validation.oracle import Oracle, OracleTrace
from tests.helpers.models import LoadedModel, load_model
from tests.helpers.tiny import SHAPES, build_oracle, save_checkpoint
from tests.helpers.tolerance import FP32_HIDDEN_ATOL, FP32_LOGITS_ATOL, LAYER_COSINE

NUM_TOKENS = 150  # far past index_topk (8 and 12), many cache blocks, past several chunks


@dataclass(frozen=True, slots=True)
class Case:
    ours: LoadedModel
    oracle: Oracle
    prompt: list[int]
    trace: OracleTrace


@pytest.fixture(scope="module", params=sorted(SHAPES))
def case(request: pytest.FixtureRequest, device: str, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory: Path = tmp_path_factory.mktemp(request.param)
    save_checkpoint(build_oracle(request.param), directory)
    prompt = torch.randint(2, 512, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    oracle = Oracle(directory, torch.float32)
    return Case(load_model(directory, device=device), oracle, prompt, oracle.trace(prompt))


def test_every_layer_equals_the_oracle_on_the_oracles_input(case: Case) -> None:
    for layer_id, layer in enumerate(case.trace.layers):
        out = case.ours.probe.layer_output(layer_id, layer.hidden_in).cpu()
        assert F.cosine_similarity(out, layer.hidden_out, dim=-1).min() >= LAYER_COSINE, f"layer {layer_id}"
        assert (out - layer.hidden_out).abs().max() < FP32_HIDDEN_ATOL, f"layer {layer_id}"


@pytest.mark.parametrize("chunk_size", [NUM_TOKENS, 37, 1])
def test_logits_equal_however_the_prompt_is_cut(case: Case, chunk_size: int) -> None:
    (logits,) = case.ours.probe.logits([case.prompt], chunk_size)
    assert (logits.cpu() - case.trace.logits).abs().max() < FP32_LOGITS_ATOL


def test_logits_equal_in_a_batch_of_mixed_lengths(case: Case) -> None:
    """Lengths chosen so that steps mix decodes, dense prefills and sparse prefills."""
    prompts = [case.prompt, case.prompt[:70], case.prompt[:59], case.prompt[:5], case.prompt[:1]]
    for prompt, logits in zip(prompts, case.ours.probe.logits(prompts, 29), strict=True):
        assert (logits.cpu() - case.trace.logits[: len(prompt)]).abs().max() < FP32_LOGITS_ATOL


def test_a_sequence_of_at_most_index_topk_tokens_is_dense_attention(case: Case) -> None:
    """The exact invariant of DSA: with few enough keys all are selected, so the indexer's weights do not matter."""
    prompt = case.prompt[: case.ours.config.index_topk]
    (before,) = case.ours.probe.logits([prompt], 3)
    indexer = case.ours.model.model.layers[0].self_attn.indexer
    saved = indexer.wk.weight.clone()
    indexer.wk.weight.data.normal_()
    (after,) = case.ours.probe.logits([prompt], 3)
    indexer.wk.weight.data.copy_(saved)
    assert torch.equal(before, after)


def test_sparse_attention_is_active_past_index_topk(tmp_path: Path) -> None:
    """Guards the tests above: were nothing dropped, they would not test the selection."""
    save_checkpoint(build_oracle("base"), tmp_path)
    ours = load_model(tmp_path)
    prompt = list(range(2, 102))
    (sparse,) = ours.probe.logits([prompt], 100)
    for layer in ours.model.model.layers:
        layer.self_attn.indexer.topk = 512
    (dense,) = ours.probe.logits([prompt], 100)
    assert torch.allclose(sparse[:8], dense[:8], atol=FP32_LOGITS_ATOL)
    assert (sparse[50:] - dense[50:]).abs().max() > 0.01
