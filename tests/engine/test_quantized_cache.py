"""``LLM`` with an 8-bit cache: tokens do not depend on company, cuts, preemption or prefix hits; and more fits."""

import dataclasses

import pytest
import torch

from argosy import LLM, RequestOutput, SamplingParams
from argosy.engine.generation import Result

KINDS: dict[str, dict[str, object]] = {
    "int8": {"kv_cache_dtype": "int8"},
    "fp8": {"kv_cache_dtype": "fp8"},
    "fp8 index keys": {"index_cache_dtype": "fp8"},
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def _build(device: str, kind: str, **settings: object) -> LLM:
    fixed = {"device": device, "dtype": "float32", "num_threads": 1, "max_model_len": 512}
    return LLM(**{**fixed, **KINDS[kind], **settings})  # type: ignore[arg-type]


def _prompts() -> list[list[int]]:
    """Lengths around block (64) and index_topk (64) borders; two share a long prefix."""
    generator = torch.Generator().manual_seed(5)
    lengths = (1, 5, 63, 64, 65, 130, 200, 201)
    prompts = [torch.randint(10, 3000, (n,), generator=generator).tolist() for n in lengths]
    prompts[-1] = prompts[-2] + [77]
    return prompts


def _tokens(results: list[Result]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in results if isinstance(output, RequestOutput)]


@pytest.fixture(scope="module", params=["int8", "fp8 index keys", pytest.param("fp8", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def alone(device: str, kind: str) -> list[list[int]]:
    """Every prompt by itself, whole, in an engine without prefix caching: what everything else must equal."""
    llm = _build(device, kind, enable_prefix_caching=False)
    return [_tokens(llm.generate([prompt], GREEDY))[0] for prompt in _prompts()]


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 17, "max_num_seqs": 5}, {"block_size": 16, "enable_prefix_caching": False}],
    ids=str,
)
def test_greedy_tokens_do_not_depend_on_company_chunks_or_blocks(
    device: str, kind: str, settings: dict[str, object], alone: list[list[int]]
) -> None:
    assert _tokens(_build(device, kind, **settings).generate(_prompts(), GREEDY)) == alone


def test_preemption_changes_no_token(device: str, kind: str, alone: list[list[int]]) -> None:
    llm = _build(device, kind, block_size=16, num_blocks=33)
    results = _tokens(llm.generate(_prompts(), dataclasses.replace(GREEDY, max_tokens=100)))
    assert llm.engine.scheduler.num_preemptions > 0
    assert [tokens[:24] for tokens in results] == alone
    llm.engine.scheduler.check_integrity()


def test_a_prefix_hit_saves_work_and_changes_no_token(device: str, kind: str, alone: list[list[int]]) -> None:
    llm = _build(device, kind)
    first, again = (llm.generate([_prompts()[-1]], GREEDY)[0] for _ in range(2))
    assert isinstance(first, RequestOutput) and isinstance(again, RequestOutput)
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 192)
    assert first.outputs[0].token_ids == again.outputs[0].token_ids == alone[-1]


def test_the_same_memory_holds_more_blocks(device: str, kind: str) -> None:
    sizes = {"max_model_len": 256, "block_size": 16, "kv_cache_memory_bytes": 8 * 2**20}
    cache = _build(device, kind, **sizes).engine.runner.cache
    latent = 4 * (128 + 16) if kind == "fp8 index keys" else 128 + 4 + 2 * 16  # or with a scale, rope keys in bf16
    bytes_per_block = 5 * 16 * (latent + 32 + 4)  # and the index key with its scale
    assert cache.index_k.dtype == torch.uint8
    assert cache.num_blocks == 8 * 2**20 // bytes_per_block
    assert cache.num_bytes == cache.num_blocks * bytes_per_block <= 8 * 2**20


def test_a_bfloat16_engine_takes_it(device: str, kind: str) -> None:
    llm = _build(device, kind, dtype="bfloat16")
    assert [len(tokens) for tokens in _tokens(llm.generate(_prompts(), GREEDY))] == [24] * 8
