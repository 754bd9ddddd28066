"""Tiny random DeepSeek-V3.2 models for tests: saved by ``transformers``, so the checkpoint layout is the published one.

At least 32 index heads: with few, ReLU makes many index scores exactly 0, ties flip the top-k, and any oracle looks
broken.
"""

from pathlib import Path

import torch
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

BASE: dict[str, object] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 32,
    "index_head_dim": 16,
    "index_topk": 8,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 8,
        "original_max_position_embeddings": 256,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
}

# Shapes that differ in what could hide a mistake: every pair of sizes that BASE makes equal differs in one of these.
SHAPES: dict[str, dict[str, object]] = {
    "base": {},
    "all_moe_no_groups": {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
    "odd_sizes": {
        "hidden_size": 80,
        "kv_lora_rank": 48,
        "q_lora_rank": 56,
        "qk_nope_head_dim": 24,
        "v_head_dim": 40,
        "qk_rope_head_dim": 16,
        "index_head_dim": 24,
        "index_n_heads": 40,
        "index_topk": 12,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "n_shared_experts": 2,
    },
    "plain_rope_dense": {"rope_scaling": None, "index_topk": 512, "routed_scaling_factor": 1.0},
}


def build_oracle(shape: str = "base", seed: int = 0) -> DeepseekV32ForCausalLM:
    """A random float32 model. Weights are larger than the usual 0.02, so that routing and attention are not uniform."""
    settings = {**BASE, **SHAPES[shape]}
    if settings["rope_scaling"] is None:
        del settings["rope_scaling"]
    torch.manual_seed(seed)
    model = DeepseekV32ForCausalLM(DeepseekV32Config(**settings)).eval().float()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name or "norm.weight" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(5.0)
        for layer in model.model.layers[model.config.first_k_dense_replace :]:
            layer.mlp.gate.e_score_correction_bias.normal_(std=0.3, generator=generator)
    return model


def save_checkpoint(model: DeepseekV32ForCausalLM, directory: Path, *, max_shard_size: str = "300KB") -> None:
    """In Hugging Face layout, in several shards."""
    model.save_pretrained(directory, max_shard_size=max_shard_size)
