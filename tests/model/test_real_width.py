"""One decoder layer at V3.2's real widths in bfloat16, on the oracle's weights; experts are cut to what memory fits."""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers.masking_utils import create_causal_mask
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Model

from argosy.cache.rope import build_rotary_table
from argosy.engine.build_rank import rotary_settings
from argosy.models.deepseek.model import DeepseekV32Model as OurModel
from argosy.validation.probe import ModelProbe
from tests.helpers.real_width import NUM_TOKENS, load_real_width_config, save_real_width_config
from tests.helpers.tolerance import BF16_LAYER_COSINE


def test_one_layer_at_real_widths_equals_the_oracle_in_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    hf_config = save_real_width_config(tmp_path)
    torch.set_default_dtype(torch.bfloat16)
    try:
        oracle = DeepseekV32Model(hf_config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    config = load_real_width_config(tmp_path)
    ours = OurModel(config, torch.bfloat16)
    _share_layer_weights(oracle.layers[0], ours.model.layers[0])
    hidden_in = torch.randn(NUM_TOKENS, 7168, dtype=torch.bfloat16)

    expected = _oracle_layer(oracle, hidden_in)
    probe = ModelProbe(ours, config, build_rotary_table(rotary_settings(config), torch.device("cpu")))
    out = probe.layer_output(0, hidden_in)

    cosine = F.cosine_similarity(out.double(), expected.double(), dim=-1).min().item()
    change = F.cosine_similarity((out - hidden_in).double(), (expected - hidden_in).double(), dim=-1).min().item()
    assert cosine >= BF16_LAYER_COSINE
    assert change >= BF16_LAYER_COSINE, "what the layer adds to the residual stream differs"


def _share_layer_weights(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    """Without a checkpoint on disk: a layer is 1 GB."""
    tensors = dict(theirs.state_dict())
    for name in [name for name in tensors if name.endswith("shared_experts.gate_proj.weight")]:
        gate, up = tensors.pop(name), tensors.pop(name.replace("gate_proj", "up_proj"))
        tensors[name.replace("gate_proj", "gate_up_proj")] = torch.cat((gate, up))
    ours.load_state_dict(tensors)


@torch.inference_mode()
def _oracle_layer(oracle: DeepseekV32Model, hidden_in: torch.Tensor) -> torch.Tensor:
    hidden = hidden_in.unsqueeze(0)
    positions = torch.arange(hidden.shape[1]).unsqueeze(0)
    mask = create_causal_mask(oracle.config, hidden, None, None, positions, allow_is_causal_skip=False)
    out = oracle.layers[0](hidden, attention_mask=mask, position_embeddings=oracle.rotary_emb(hidden, positions))
    return (out[0] if isinstance(out, tuple) else out).squeeze(0)
