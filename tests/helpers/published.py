"""DeepSeek-V3.2 as published: its ``config.json``, and the headers of its checkpoint in several formats, without data.

Invariant: shapes come from ``models/deepseek/checkpoint.py``; here is only which tensor has which dtype.
"""

from pathlib import Path
from typing import Literal

from argosy.models.deepseek.checkpoint import checkpoint_shapes, mtp_shapes
from argosy.models.deepseek.config import ModelConfig
from argosy.quantization.safetensors_headers import DTYPE_BYTES, TensorHeader
from argosy.quantization.stored_tensors import scale_inv_shape

PUBLISHED_CONFIG: dict[str, object] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "max_position_embeddings": 163840,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
# Linears that stay in BF16 in every format.
_PLAIN_LINEARS = ("embed_tokens.", "head.", ".mlp.gate.weight", ".weights_proj.", ".eh_proj.")
_COMPANION = {"I8": "_scale", "F8_E4M3": "_scale_inv"}


def build_headers(config: ModelConfig, linear_dtype: Literal["BF16", "I8", "F8_E4M3"]) -> dict[str, TensorHeader]:
    """Of a checkpoint in one file; INT8 and FP8 have their scales. ``kv_b_proj`` and MTP layers are quantised too."""
    dtypes: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, shape in (checkpoint_shapes(config) | mtp_shapes(config)).items():
        is_linear = len(shape) == 2 and not any(text in name for text in _PLAIN_LINEARS)
        dtype = linear_dtype if is_linear else "F32" if len(shape) == 1 else "BF16"
        dtypes[name] = (shape, dtype)
        if dtype in _COMPANION:
            scale_shape = (shape[0], 1) if dtype == "I8" else scale_inv_shape(shape, (128, 128))
            dtypes[name + _COMPANION[dtype]] = (scale_shape, "F32")
    headers: dict[str, TensorHeader] = {}
    start = 0
    for name, (shape, dtype) in dtypes.items():
        num_bytes = DTYPE_BYTES[dtype]
        for size in shape:
            num_bytes *= size
        headers[name] = TensorHeader(shape, dtype, Path("model.safetensors"), start, start + num_bytes)
        start += num_bytes
    return headers
