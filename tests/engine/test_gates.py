"""The oracle gates of ``argosy validate``: they pass on the built-in model, and each fails on a model that is wrong."""

import pytest
import torch

from argosy import EngineConfig
from argosy.engine.build import build_engine
from argosy.engine.model_directory import resolve_model_directory
from argosy.validation.gates import GateInputs, GateResult, run_gates
from argosy.validation.oracle import Oracle

PROMPTS = [list(range(100, 100 + n)) for n in (120, 70, 9)]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(resolve_model_directory("argosy-tiny"), torch.float32)


def _inputs(oracle: Oracle) -> GateInputs:
    config = EngineConfig(device="cpu", dtype="float32", num_threads=1, max_model_len=256)
    return GateInputs(engine=build_engine(config), oracle=oracle, prompts=PROMPTS)


def _run(inputs: GateInputs) -> list[GateResult]:
    return list(run_gates(inputs, greedy_lengths=(20,)))


def test_every_gate_passes_on_the_built_in_model(oracle: Oracle) -> None:
    results = _run(_inputs(oracle))
    assert len(results) == 8
    assert [result.name for result in results if not result.passed] == []


def test_a_layer_that_is_one_percent_off_fails(oracle: Oracle) -> None:
    inputs = _inputs(oracle)
    inputs.engine.core.runner.model.model.layers[2].self_attn.o_proj.weight.mul_(1.01)
    failed = {result.name.split(":")[0] for result in _run(inputs) if not result.passed}
    assert {"layers, teacher-forced", "logits, full prefill", "logits, one token at a time prefill"} <= failed


def test_a_broken_model_fails_the_cosines_and_the_tokens(oracle: Oracle) -> None:
    inputs = _inputs(oracle)
    inputs.engine.core.runner.model.model.layers[2].self_attn.o_proj.weight.neg_()
    assert all(not result.passed for result in _run(inputs))
