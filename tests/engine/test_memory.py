"""Memory: weights once, the cache as configured, and nothing that grows with the number of requests."""

import gc
from pathlib import Path

import pytest
import torch

from argosy import LLM, SamplingParams
from argosy.cache.cache_format import build_cache_format
from argosy.cache.layer_settings import CacheDims
from argosy.cache.mla_kv_cache import MLAKVCache
from argosy.config import CacheDTypes

PAGE_BYTES = 4096


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * PAGE_BYTES


def test_the_cache_has_the_configured_size() -> None:
    llm = LLM(device="cpu", num_threads=1, max_model_len=256, block_size=16, kv_cache_memory_bytes=8 * 2**20)
    cache = llm.engine.runner.cache
    bytes_per_block = 5 * 16 * (128 + 16 + 32) * 4  # layers x tokens x (latent, rope key, index key) x float32
    assert cache.num_blocks == llm.config.num_blocks == 8 * 2**20 // bytes_per_block
    assert cache.num_bytes == cache.num_blocks * bytes_per_block <= 8 * 2**20


def test_an_unused_cache_takes_no_memory_on_a_cpu() -> None:
    before = _resident_bytes()
    dims = CacheDims(kv_lora_rank=32, qk_rope_head_dim=16, index_head_dim=16)
    cache = MLAKVCache(
        build_cache_format(CacheDTypes(), dims, torch.bfloat16, torch.device("cpu")),
        num_layers=4,
        num_blocks=2**13,
        block_size=64,
        device=torch.device("cpu"),
    )
    assert cache.num_bytes == 2**28
    assert _resident_bytes() - before < 2**24
    assert not cache.latent.any() and cache.latent.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_requests_leave_no_memory_behind() -> None:
    llm = LLM(device="cpu", num_threads=1, max_model_len=64, max_num_seqs=128, kv_cache_memory_bytes=16 * 2**20)
    params = SamplingParams(temperature=1.0, max_tokens=2, ignore_eos=True)

    def run(num_requests: int, first: int) -> None:
        prompts = [[10 + (first + i) % 3000, 10 + (first + i) // 3000, 7] for i in range(num_requests)]
        assert len(llm.generate(prompts, params, use_tqdm=False)) == num_requests

    run(2000, 0)  # every pool and table has its size after these
    before = _resident_bytes()
    for part in range(10):
        run(1000, 2000 + 1000 * part)
    grown = _resident_bytes() - before
    assert grown < 8 * 2**20, f"{grown / 2**20:.1f} MiB more after 10,000 requests"
    assert llm.engine.scheduler.block_manager.num_free_blocks == llm.engine.scheduler.block_manager.num_usable_blocks
