"""The training model against transformers, its export, its decoding loop, and the tokenizer's round trip."""

from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

from argosy.assets import builtin_model_directory
from tools.train_tiny import chat
from tools.train_tiny.config import TOKENIZER_ENTRIES, TinyConfig
from tools.train_tiny.decode import DecodeConfig, decode_greedy
from tools.train_tiny.export import checkpoint_tensors, export_checkpoint, load_exported
from tools.train_tiny.model import ForwardPlan, TinyModel
from tools.train_tiny.tokenizer import load_tokenizer

SMALL = TinyConfig(hidden_size=64, num_hidden_layers=3, index_topk=16, vocab_size=128)


def build_small_model(config: TinyConfig = SMALL) -> TinyModel:
    torch.manual_seed(0)
    model = TinyModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.01)
    return model


@pytest.mark.parametrize("index_topk", [16, 64], ids=["sparse", "dense"])
@torch.no_grad()
def test_logits_equal_transformers(index_topk):
    config = replace(SMALL, index_topk=index_topk)
    model = build_small_model(config)
    settings = config.to_json_dict()
    for key in ("architectures", "model_type", "torch_dtype"):
        settings.pop(key)
    oracle = DeepseekV32ForCausalLM(DeepseekV32Config(**settings, attn_implementation="eager")).eval()
    own_layers = {name: value for name, value in model.state_dict().items() if ".layers.3." not in name}
    oracle.load_state_dict(own_layers, strict=True)
    ids = torch.randint(0, 128, (2, 60))
    hidden = model.hidden_states(ids, torch.arange(60).unsqueeze(0), ForwardPlan(is_sparse=True))
    torch.testing.assert_close(model.lm_head(hidden), oracle(ids).logits, rtol=0, atol=2e-6)


def test_export_reads_back_rounded(tmp_path):
    model = build_small_model()
    export_checkpoint(model, tmp_path)
    state, loaded = model.state_dict(), load_exported(tmp_path, SMALL).state_dict()
    for name, value in state.items():
        is_exact = "norm" in name or "bias" in name
        expected = value if is_exact else value.to(torch.bfloat16).float()
        assert torch.equal(loaded[name], expected), name


def test_export_has_the_names_of_the_real_checkpoint():
    tensors = checkpoint_tensors(build_small_model())
    mtp = "model.layers.3."
    for name in ("embed_tokens.weight", "shared_head.head.weight", "shared_head.norm.weight", "eh_proj.weight"):
        assert mtp + name in tensors
    assert torch.equal(tensors[mtp + "embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert tensors["model.layers.1.mlp.experts.31.down_proj.weight"].shape == (64, 64)
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert tensors["model.layers.0.self_attn.indexer.k_norm.bias"].dtype == torch.float32
    assert tensors["model.layers.0.self_attn.indexer.weights_proj.weight"].dtype == torch.bfloat16


@torch.no_grad()
def test_cached_decoding_equals_recomputation():
    model = build_small_model()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(8, 120, (n,), generator=generator).tolist() for n in (40, 7, 25)]
    decoded = decode_greedy(model, prompts, DecodeConfig(max_new_tokens=6, num_vocab=120))
    for prompt, output in zip(prompts, decoded.outputs, strict=True):
        ids = list(prompt)
        for token in output:
            positions = torch.arange(len(ids)).unsqueeze(0)
            hidden = model.hidden_states(torch.tensor([ids]), positions, ForwardPlan(is_sparse=True))
            assert int(model.lm_head(hidden)[0, -1, :120].argmax()) == token
            ids.append(token)


@pytest.mark.parametrize(
    "text", ["Hello, 12345!\n\n  x\ty", "床前明月光，疑是地上霜。", "é😀Ω\u0000\uffff", " lead trail ", ""]
)
def test_tokenizer_round_trips_any_text(text):
    tokenizer = load_tokenizer(builtin_model_directory("argosy-tiny"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_tokenizer_has_deepseek_markers_first_and_single_digits():
    tokenizer = load_tokenizer(builtin_model_directory("argosy-tiny"))
    assert [tokenizer.token_to_id(text) for text in chat.SPECIAL_TOKENS] == list(range(len(chat.SPECIAL_TOKENS)))
    assert tokenizer.get_vocab_size() == TOKENIZER_ENTRIES < TinyConfig().vocab_size
    assert len(tokenizer.encode("2026", add_special_tokens=False).ids) == 4
    assert tokenizer.encode("hi").ids == tokenizer.encode("hi", add_special_tokens=False).ids


def test_think_markers_survive_when_control_tokens_are_skipped():
    tokenizer = load_tokenizer(builtin_model_directory("argosy-tiny"))
    ids = tokenizer.encode(f"{chat.USER}a{chat.THINK_END}b{chat.EOS}", add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"a{chat.THINK_END}b"
