"""What a cache holds by ``kv_cache_dtype`` and ``index_cache_dtype``: bytes, blocks, and who is refused."""

import dataclasses
from pathlib import Path

import pytest
import torch

from argosy.assets import builtin_model_directory
from argosy.cache.cache_format import build_cache_format
from argosy.cache.index_key_format import PlainIndexKeys
from argosy.cache.latent_format import PlainLatents
from argosy.cache.layer_settings import CacheDims, NormSettings
from argosy.cache.mla_kv_cache import MLAKVCache, kv_bytes_per_block
from argosy.config import CacheDTypes, EngineConfig, IndexCacheDType, KVCacheDType, choose_cache_dtypes
from argosy.engine.build import prepare
from argosy.engine.build_rank import cache_dims, measure_num_blocks
from argosy.kernels import RotaryRows, attend_sparse, gather_cache, index_scores, write_cache
from argosy.models.deepseek.config import load_model_config, parse_model_config
from argosy.platforms.cpu import CpuPlatform
from tests.helpers.tiny import build_oracle, save_checkpoint

CPU = torch.device("cpu")
# From the published config.json.
V32: dict[str, object] = {
    "model_type": "deepseek_v32", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "first_k_dense_replace": 3, "num_attention_heads": 128,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "index_n_heads": 64, "index_head_dim": 128,
    "index_topk": 2048, "max_position_embeddings": 163840,
}  # fmt: skip
TINY = CacheDims(kv_lora_rank=48, qk_rope_head_dim=8, index_head_dim=16)


def _cache(kind: KVCacheDType, dtype: torch.dtype = torch.float32) -> MLAKVCache:
    return MLAKVCache(
        build_cache_format(choose_cache_dtypes(kind), TINY, dtype, CPU),
        num_layers=2,
        num_blocks=5,
        block_size=4,
        device=CPU,
    )


LATENT_NORM = NormSettings(torch.ones(48), 0.0)
KEY_NORM = NormSettings(torch.ones(16), 1e-5, torch.zeros(16))


def _normed(latent: torch.Tensor) -> torch.Tensor:
    """Such that ``LATENT_NORM`` changes nothing."""
    latent[:, :48] /= latent[:, :48].square().mean(dim=1, keepdim=True).sqrt()
    return latent


def _no_rotation(num_tokens: int) -> RotaryRows:
    ones = torch.ones(num_tokens, 1, 8)
    return RotaryRows(torch.complex(ones[..., :4], torch.zeros(num_tokens, 1, 4)), ones, 0 * ones)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("stored", "dtype", "bytes_per_token"),
    [
        (CacheDTypes(), torch.bfloat16, 1408),
        (CacheDTypes(), torch.float32, 2816),
        (CacheDTypes(latent="int8", index_key="int8"), torch.bfloat16, 788),
        (CacheDTypes(latent="fp8", index_key="fp8"), torch.bfloat16, 788),
        (CacheDTypes(latent="int8", index_key="int8"), torch.float32, 788),  # the rope part is bf16 there too
        (CacheDTypes(index_key="fp8"), torch.bfloat16, 1152 + 132),
        (CacheDTypes(latent="int8"), torch.bfloat16, 656 + 256),
    ],
)
def test_bytes_of_a_token_of_the_published_model(stored: CacheDTypes, dtype: torch.dtype, bytes_per_token: int) -> None:
    cache_format = build_cache_format(stored, cache_dims(parse_model_config(V32)), dtype, torch.device("meta"))
    assert kv_bytes_per_block(cache_format, num_layers=1, block_size=1) == bytes_per_token
    assert kv_bytes_per_block(cache_format, num_layers=61, block_size=64) == 61 * 64 * bytes_per_token


@pytest.mark.parametrize("kind", ["auto", "int8", "fp8"])
def test_raw_tensors_are_layers_blocks_slots_and_a_row(kind: KVCacheDType) -> None:
    cache = _cache(kind)
    quantized = kind != "auto"
    assert cache.latent.dtype == cache.index_k.dtype == (torch.uint8 if quantized else torch.float32)
    assert cache.latent.shape == (2, 5, 4, 48 + 4 + 2 * 8 if quantized else 56)
    assert cache.index_k.shape == (2, 5, 4, 20 if quantized else 16)
    assert cache.num_bytes == 5 * kv_bytes_per_block(cache.format, num_layers=2, block_size=4)
    assert cache.layer(1).latent.data_ptr() == cache.latent[1].data_ptr()


def test_blocks_for_a_given_memory_grow_as_bytes_shrink() -> None:
    model_config = load_model_config(builtin_model_directory("argosy-tiny"))
    settings = EngineConfig(device="cpu", max_model_len=256, kv_cache_memory_bytes=8 * 2**20)

    def num_blocks(kind: KVCacheDType) -> int:
        config = dataclasses.replace(settings, kv_cache_dtype=kind)
        return measure_num_blocks(config, model_config, torch.float32, CpuPlatform(), 1)

    assert num_blocks("auto") == 8 * 2**20 // (5 * 64 * (128 + 16 + 32) * 4)
    assert num_blocks("int8") == num_blocks("fp8") == 8 * 2**20 // (5 * 64 * (128 + 4 + 32 + 32 + 4))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_an_index_head_that_no_hadamard_matrix_rotates_is_refused(kind: KVCacheDType) -> None:
    dims = dataclasses.replace(TINY, index_head_dim=24)
    with pytest.raises(
        ValueError, match=rf"{kind}: index_head_dim \(24\) must be a power of two.*--index-cache-dtype model"
    ):
        build_cache_format(choose_cache_dtypes(kind), dims, torch.float32, CPU)
    assert build_cache_format(choose_cache_dtypes(kind, "model"), dims, torch.float32, CPU).index_keys.width == 24


def test_the_refusal_comes_before_weights_are_read(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    save_checkpoint(build_oracle("odd_sizes"), directory)
    for shard in directory.glob("*.safetensors"):
        shard.unlink()
    tokenizer = str(builtin_model_directory("argosy-tiny"))
    with pytest.raises(ValueError, match="power of two"):
        prepare(EngineConfig(model=str(directory), tokenizer=tokenizer, device="cpu", kv_cache_dtype="int8"))


def test_the_plain_format_is_the_kernels_themselves() -> None:
    latents, index_keys = PlainLatents(TINY, torch.float32), PlainIndexKeys(TINY, torch.float32)
    ours, theirs = torch.zeros(5, 4, 56), torch.zeros(5, 4, 56)
    slots, latent = torch.tensor([5, -1, 9]), _normed(_random(3, 56))
    latents.write(ours, slots, latent.clone(), LATENT_NORM, _no_rotation(3))
    write_cache(theirs, slots, latent)
    table, query = torch.tensor([[1, 2]], dtype=torch.int32), _random(2, 3, 56, seed=1)
    torch.testing.assert_close(ours[1:], theirs[1:])  # a slot of -1: nowhere, or the null block
    ours = theirs
    assert torch.equal(latents.gather(ours, table, 7), gather_cache(theirs, table, 7))
    chosen = torch.tensor([[5, 9], [9, -1]])
    expected = attend_sparse(query, theirs, chosen, 48, 0.3)
    assert torch.equal(latents.attend_sparse(query, ours, chosen, 0.3, is_full=False), expected)
    keys = _random(5, 4, 16, seed=2)
    index_q, weights = _random(1, 2, 4, 16, seed=3), _random(1, 2, 4, seed=4)
    scores = index_keys.score(index_q, keys, weights, table, torch.tensor([[7, 7]], dtype=torch.int32), 7)
    assert torch.equal(scores, index_scores(index_q, gather_cache(keys, table, 7), weights))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writing_touches_its_slots_alone_and_reading_gives_them_back(kind: KVCacheDType, dtype: torch.dtype) -> None:
    kv = _cache(kind, dtype).layer(1)
    latent, key = _normed(_random(3, 56)).to(dtype), _random(3, 16, seed=1).to(dtype)
    slots, rotary = torch.tensor([13, -1, 4]), _no_rotation(3)
    kv.write_latent(slots, latent.clone(), LATENT_NORM, rotary)
    kv.write_index_k(slots, key, KEY_NORM, rotary)
    index_k = torch.nn.functional.layer_norm(key.float(), (16,)).to(dtype)
    written = kv.latent.view(20, -1).any(dim=-1), kv.index_k.view(20, -1).any(dim=-1)
    for touched in written:
        assert touched.nonzero().flatten().tolist() == [0, 4, 13]  # 0 lies in the null block
    gathered = kv.gather_latent(torch.tensor([[3, 1]], dtype=torch.int32), 5)
    assert gathered.dtype == dtype and gathered.shape == (1, 5, 56)
    found = gathered[0, [1, 4]].double()
    assert torch.cosine_similarity(found, latent[[0, 2]].double(), dim=-1).min() > 0.998
    assert not gathered[0, [0, 2, 3]].any()
    everything = kv.attend_sparse(_random(1, 2, 56).to(dtype), torch.tensor([[13, 4, -1]]), 0.2)
    assert everything.dtype == dtype and everything.shape == (1, 2, 48) and everything.isfinite().all()
    scores = kv.index_scores(
        index_k[:1].view(1, 1, 1, 16),
        torch.ones(1, 1, 1),
        torch.tensor([[3, 1]], dtype=torch.int32),
        torch.tensor([[5]], dtype=torch.int32),
        5,
    )
    assert scores.shape == (1, 1, 5) and scores.argmax().item() == 1  # the key that equals the query
    assert scores[0, 0, 1].item() == pytest.approx(index_k[0].float().square().sum().item(), rel=0.05)


@pytest.mark.parametrize(
    ("kv_cache_dtype", "index_cache_dtype", "latent", "index_key"),
    [
        ("auto", "auto", "model", "model"),
        ("int8", "auto", "int8", "int8"),
        ("auto", "fp8", "model", "fp8"),
        ("int8", "fp8", "int8", "fp8"),
        ("fp8", "model", "fp8", "model"),
    ],
)
def test_index_keys_follow_the_latent_unless_told_otherwise(
    kv_cache_dtype: KVCacheDType, index_cache_dtype: IndexCacheDType, latent: str, index_key: str
) -> None:
    stored = EngineConfig(kv_cache_dtype=kv_cache_dtype, index_cache_dtype=index_cache_dtype).cache_dtypes
    assert (stored.latent, stored.index_key) == (latent, index_key)
    found = build_cache_format(stored, TINY, torch.float32, CPU)
    dtypes = {"model": torch.float32, "int8": torch.uint8, "fp8": torch.uint8}
    assert (found.latents.dtype, found.index_keys.dtype) == (dtypes[latent], dtypes[index_key])


def test_choices_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of auto, int8, fp8, got 'int4'"):
        EngineConfig(kv_cache_dtype="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="index_cache_dtype must be one of auto, model, int8, fp8, got 'int4'"):
        EngineConfig(index_cache_dtype="int4")  # type: ignore[arg-type]


def test_the_number_format_says_what_index_keys_are() -> None:
    assert EngineConfig(dtype="float32", quantization="none", index_cache_dtype="fp8").number_format == (
        "float32, fp8 index keys"
    )
    told = EngineConfig(dtype="float32", quantization="none", kv_cache_dtype="int8", index_cache_dtype="model")
    assert told.number_format == "float32, int8 cache, index keys in the model's dtype"
