"""``config.json``: what is wrong in it is one ValueError naming key, value and rule, before anything is built."""

import json
import math
from pathlib import Path

import pytest

from argosy.assets import builtin_model_directory
from argosy.models.deepseek.checkpoint import build_weight_mapping
from argosy.models.deepseek.config import load_model_config, parse_model_config


def built_in_config() -> dict[str, object]:
    path = builtin_model_directory("argosy-tiny") / "config.json"
    content: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return content


def yarn(**changes: object) -> dict[str, object]:
    scaling = {"type": "yarn", "factor": 8, "original_max_position_embeddings": 512}
    return {"rope_parameters": None, "rope_scaling": {**scaling, **changes}}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"model_type": "llama", "architectures": 5}, "architectures 5 is not supported"),
        ({"hidden_size": "256"}, "hidden_size must be a positive integer, got '256'"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, got 0"),
        ({"kv_lora_rank": True}, "kv_lora_rank must be a positive integer, got True"),
        ({"n_group": 5}, "n_routed_experts (32) must be divisible by n_group (5)"),
        ({"topk_group": 9}, "topk_group (9) must not exceed n_group (8)"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok (17) must not exceed"),
        ({"n_group": 32, "topk_group": 32}, "at least 2 experts"),
        ({"n_shared_experts": 1.5}, "n_shared_experts must be an integer >= 0, got 1.5"),
        ({"n_shared_experts": -1}, "n_shared_experts must be an integer >= 0, got -1"),
        ({"first_k_dense_replace": "x"}, "first_k_dense_replace must be an integer >= 0, got 'x'"),
        ({"first_k_dense_replace": 6}, "first_k_dense_replace (6) must not exceed num_hidden_layers (5)"),
        ({"num_nextn_predict_layers": "x"}, "num_nextn_predict_layers must be an integer >= 0, got 'x'"),
        ({"routed_scaling_factor": "x"}, "routed_scaling_factor must be a positive number, got 'x'"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive number, got -1"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a positive number, got nan"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false, got 'yes'"),
        ({"eos_token_id": "x"}, "eos_token_id must be an integer in [0, vocab_size = 3584), got 'x'"),
        ({"eos_token_id": [1, 3584]}, "eos_token_id must be an integer in [0, vocab_size = 3584), got 3584"),
        ({"eos_token_id": []}, "eos_token_id must name at least one token"),
        ({"bos_token_id": -1}, "bos_token_id must be an integer in [0, vocab_size = 3584), got -1"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; this engine supports 'sigmoid' only"),
        ({"rope_parameters": None, "rope_theta": "x"}, "rope_theta must be a positive number, got 'x'"),
        ({"rope_scaling": 5, "rope_parameters": None}, "rope_scaling must be an object, got 5"),
        (yarn(type="linear"), "type 'linear' is not supported"),
        (yarn(factor="x"), "factor must be a positive number, got 'x'"),
        (yarn(beta_fast=0), "beta_fast must be a positive number, got 0"),
        (yarn(original_max_position_embeddings=0), "original_max_position_embeddings must be a positive number"),
        (yarn(mscale=0.7), "mscale equal to mscale_all_dim"),
    ],
)
def test_impossible_value_is_refused_by_name(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json: ") as error:
        parse_model_config({**built_in_config(), **changes})
    assert complaint in str(error.value)


def test_missing_keys_are_all_named() -> None:
    raw = built_in_config()
    del raw["kv_lora_rank"], raw["index_topk"]
    with pytest.raises(ValueError, match="lacks kv_lora_rank, index_topk"):
        parse_model_config(raw)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"{bad", "is not valid JSON"), (b"\xff\xfe\x00", "is not valid JSON"), (b"[1]", "found list")],
)
def test_file_that_is_no_json_object_is_refused(content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        load_model_config(tmp_path)


def test_both_spellings_of_rope_mean_the_same() -> None:
    old = {**built_in_config(), **yarn(mscale=1.0, mscale_all_dim=1.0), "rope_theta": 5000}
    new = {**old, "rope_scaling": None, "rope_theta": None}
    new["rope_parameters"] = {**yarn(rope_theta=5000)["rope_scaling"]}  # type: ignore[dict-item]
    assert parse_model_config(old) == parse_model_config(new)
    assert parse_model_config(old).rope_theta == 5000.0


def test_only_the_mtp_layers_are_left_out() -> None:
    mapping = build_weight_mapping(4, 1)
    assert mapping("model.layers.4.input_layernorm.weight") is None
    for layer_id in (0, 3, 5):  # a sixth layer means that config.json is another model's: the loader refuses it
        assert mapping(f"model.layers.{layer_id}.input_layernorm.weight") is not None
