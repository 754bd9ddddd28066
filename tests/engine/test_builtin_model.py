"""What only a trained model can show: sparse attention finds what it needs because its indexer was trained."""

import random

import pytest
import torch

from argosy import LLM, RequestOutput, SamplingParams
from argosy.assets import builtin_model_directory
from tools.train_tiny.data.example import Example
from tools.train_tiny.data.needles import build_needle
from tools.train_tiny.tokenizer import load_tokenizer, token_counter

NUM_TOKENS = 700  # eleven times index_topk
PARAMS = SamplingParams(temperature=0.0, max_tokens=32)


@pytest.fixture(scope="module")
def llm(device: str) -> LLM:
    return LLM(device=device, dtype="float32", num_threads=1, max_model_len=1024)


@pytest.fixture(scope="module")
def needles(llm: LLM) -> list[Example]:
    rng = random.Random("held out")
    count_tokens = token_counter(load_tokenizer(builtin_model_directory("argosy-tiny")))
    return [build_needle(rng, language, NUM_TOKENS, count_tokens) for language in ("en", "zh") * 4]


def _num_right(llm: LLM, needles: list[Example]) -> int:
    results = llm.chat([[{"role": "user", "content": needle.prompt}] for needle in needles], PARAMS)
    answers = [result.outputs[0].text.strip() for result in results if isinstance(result, RequestOutput)]
    return sum(answer == needle.answer for answer, needle in zip(answers, needles, strict=True))


def test_needles_are_found_through_the_trained_indexer_and_not_through_a_random_one(
    llm: LLM, needles: list[Example]
) -> None:
    assert _num_right(llm, needles) >= 7
    untrained = LLM(device=llm.built.platform.device_type, dtype="float32", num_threads=1, max_model_len=1024)
    generator = torch.Generator().manual_seed(0)
    for layer in untrained.engine.runner.model.model.layers:
        for weight in (layer.self_attn.indexer.wq_b.weight, layer.self_attn.indexer.wk.weight):
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.std().item())
    assert _num_right(untrained, needles) <= 3
