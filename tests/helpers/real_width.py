"""One MoE layer of V3.2 at its real widths; experts are cut to what memory fits."""

from dataclasses import replace
from pathlib import Path

from transformers import DeepseekV32Config

from argosy.models.deepseek.config import ModelConfig, load_model_config

NUM_TOKENS = 48
INDEX_TOPK = 32  # below NUM_TOKENS, so that the sparse path runs
V32 = {
    "vocab_size": 64,
    "hidden_size": 7168,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": INDEX_TOPK,
    "rope_scaling": {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


def save_real_width_config(directory: Path) -> DeepseekV32Config:
    """The oracle's configuration, also as ``config.json``."""
    hf_config = DeepseekV32Config(**V32, max_position_embeddings=4096, attn_implementation="eager")
    hf_config.architectures = ["DeepseekV32ForCausalLM"]
    hf_config.save_pretrained(directory)
    return hf_config


def load_real_width_config(directory: Path) -> ModelConfig:
    return replace(load_model_config(directory), max_position_embeddings=64)
