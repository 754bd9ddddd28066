"""A model with an 8-bit cache against itself with a plain one: every layer, and the final hidden states."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from argosy.assets import builtin_model_directory
from argosy.cache.rope import build_rotary_table
from argosy.config import KVCacheDType, choose_cache_dtypes
from argosy.engine.build_rank import rotary_settings
from argosy.validation.probe import ModelProbe
from tests.helpers.models import LoadedModel, load_model
from tests.helpers.tolerance import FINAL_COSINE, QUANTIZED_CACHE_LAYER_COSINE

NUM_TOKENS = 200  # past index_topk (64), so that scores on 8-bit keys choose
KINDS: tuple[KVCacheDType, ...] = ("int8", "fp8")


@dataclass(frozen=True, slots=True)
class Case:
    plain: LoadedModel
    quantized: dict[KVCacheDType, ModelProbe]
    prompts: list[list[int]]
    expected: list[torch.Tensor]  # final hidden states


@pytest.fixture(scope="module")
def case(device: str) -> Case:
    plain = load_model(builtin_model_directory("argosy-tiny"), device=device)
    rotary = build_rotary_table(rotary_settings(plain.config), torch.device(device))
    quantized = {kind: ModelProbe(plain.model, plain.config, rotary, choose_cache_dtypes(kind)) for kind in KINDS}
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(10, 3000, (n,), generator=generator).tolist() for n in (NUM_TOKENS, 64, 1)]
    return Case(plain, quantized, prompts, plain.probe.hidden_states(prompts, NUM_TOKENS))


def _cosine(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of all numbers together: single tokens take other experts and positions where scores nearly tie."""
    return F.cosine_similarity(ours.double().flatten(), theirs.double().flatten(), dim=0).item()


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_near_the_plain_ones_on_the_same_input(case: Case, kind: KVCacheDType) -> None:
    hidden_in = case.plain.model.model.embed_tokens.weight.detach()[case.prompts[0]]
    for layer_id in range(case.plain.config.num_hidden_layers):
        expected = case.plain.probe.layer_output(layer_id, hidden_in)
        out = case.quantized[kind].layer_output(layer_id, hidden_in)
        assert _cosine(out, expected) >= QUANTIZED_CACHE_LAYER_COSINE[kind], f"layer {layer_id}"
        change = _cosine(out - hidden_in, expected - hidden_in)
        assert change >= QUANTIZED_CACHE_LAYER_COSINE[kind] - 0.001, f"layer {layer_id}: what it adds"
        assert not torch.equal(out, expected), f"layer {layer_id} did not read 8-bit rows"
        hidden_in = expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [NUM_TOKENS, 37])
def test_final_hidden_states_are_near_the_plain_ones(case: Case, kind: KVCacheDType, chunk_size: int) -> None:
    found = case.quantized[kind].hidden_states(case.prompts, chunk_size)
    for ours, theirs in zip(found, case.expected, strict=True):
        assert _cosine(ours, theirs) >= FINAL_COSINE


@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_of_a_prompt_changes_little(case: Case, kind: KVCacheDType) -> None:
    """Every token reads 8-bit rows, its own chunk's too, so only float32's rounding is left, which may move a number
    by a step where it lies at the border of two."""
    whole, cut = (case.quantized[kind].hidden_states(case.prompts, size) for size in (NUM_TOKENS, 37))
    for ours, theirs in zip(cut, whole, strict=True):
        assert _cosine(ours, theirs) >= 0.999
