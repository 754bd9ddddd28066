"""Which modules of a DeepSeek-V3.2 checkpoint W8A8 leaves as they are.

Names only; the arithmetic and the files know no model. Invariant: a pure function, so that a converter, a loader and a
model built without a checkpoint agree on every module.
"""

from argosy.models.deepseek.config import ModelConfig
from argosy.quantization.checkpoint_format import CheckpointQuantization

# Logits and routing are sensitive and small; the head weights of the indexer are computed in float32.
_ALWAYS_KEPT = ("lm_head", r"re:.*\.mlp\.gate$", r"re:.*\.indexer\.weights_proj$")
_KV_B = r"re:.*\.kv_b_proj$"  # absorption reads its halves as matrices
_MTP_KEPT = (r"re:.*\.eh_proj$", r"re:.*\.shared_head\.head$", r"re:.*\.embed_tokens$")


def build_w8a8_format(
    config: ModelConfig, *, quantize_kv_b: bool = False, quantize_mtp: bool = False
) -> CheckpointQuantization:
    """W8A8 of every linear but the router, the indexer's head weights and the head; kv_b_proj and MTP as asked.

    Of MTP layers ``eh_proj``, the head and the embedding are kept in any case.
    """
    first_mtp_layer = config.num_hidden_layers
    mtp_layers = range(first_mtp_layer, first_mtp_layer + config.num_nextn_predict_layers)
    whole_mtp = tuple(rf"re:model\.layers\.{layer_id}\." for layer_id in mtp_layers)
    return CheckpointQuantization(
        kind="w8a8",
        ignored=(*_ALWAYS_KEPT, *(() if quantize_kv_b else (_KV_B,)), *(_MTP_KEPT if quantize_mtp else whole_mtp)),
    )
