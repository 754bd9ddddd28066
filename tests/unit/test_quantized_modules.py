"""Which modules of a DeepSeek-V3.2 checkpoint become INT8, by name."""

import pytest

from argosy.assets import builtin_model_directory
from argosy.models.deepseek.config import load_model_config
from argosy.models.deepseek.quantized_modules import build_w8a8_format

CONFIG = load_model_config(builtin_model_directory("argosy-tiny"))  # layer 5 is MTP's

INT8 = (
    "self_attn.q_a_proj",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.o_proj",
    "self_attn.indexer.wq_b",
    "self_attn.indexer.wk",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "mlp.shared_experts.gate_proj",
    "mlp.experts.31.up_proj",
    "mlp.experts.0.down_proj",
)
KEPT = (
    "input_layernorm",
    "self_attn.q_a_layernorm",
    "self_attn.indexer.k_norm",
    "self_attn.indexer.weights_proj",
    "mlp.gate",
)
MTP_KEPT = ("eh_proj", "enorm", "hnorm", "shared_head.norm", "shared_head.head", "embed_tokens")


@pytest.mark.parametrize("quantize_mtp", [False, True])
@pytest.mark.parametrize("quantize_kv_b", [False, True])
def test_modules_are_quantised_as_documented(quantize_kv_b: bool, quantize_mtp: bool) -> None:
    quantization = build_w8a8_format(CONFIG, quantize_kv_b=quantize_kv_b, quantize_mtp=quantize_mtp)
    for layer_id in range(6):
        is_main = layer_id < 5
        prefix = f"model.layers.{layer_id}."
        assert {quantization.is_quantized(prefix + name) for name in INT8} == {is_main or quantize_mtp}
        assert not any(quantization.is_quantized(prefix + name) for name in KEPT)
        is_kv_b = quantize_kv_b and (is_main or quantize_mtp)
        assert quantization.is_quantized(f"{prefix}self_attn.kv_b_proj") == is_kv_b
    assert not any(quantization.is_quantized(f"model.layers.5.{name}") for name in MTP_KEPT)
    assert not any(quantization.is_quantized(name) for name in ("lm_head", "model.embed_tokens", "model.norm"))
