"""Number formats that a checkpoint's files declare: the three that are read, and refusal of every other by its name."""

import json
import re
import time
from pathlib import Path

import pytest

from argosy.quantization.checkpoint_format import (
    CheckpointQuantization,
    load_checkpoint_quantization,
    read_checkpoint_quantization,
)
from argosy.quantization.compressed_tensors import build_config
from argosy.quantization.modelslim import DESCRIPTION_NAME

LAYER = "model.layers.3"
LINEARS = (f"{LAYER}.self_attn.q_a_proj", f"{LAYER}.mlp.experts.7.down_proj", f"{LAYER}.self_attn.indexer.wk")
NOT_LINEAR = (
    "model.norm",
    "model.embed_tokens",
    f"{LAYER}.mlp.gate",
    f"{LAYER}.input_layernorm",
    f"{LAYER}.self_attn.indexer.k_norm",
    f"{LAYER}.enorm",
)


def parse(settings: object) -> CheckpointQuantization:
    return read_checkpoint_quantization(Path("nowhere"), {"quantization_config": settings})


def w8a8(path: str = "", value: object = None) -> dict[str, object]:
    """Our own config with the key at ``path`` set to ``value``; ``group`` at its front stands for the only group."""
    settings = build_config(["lm_head"])
    if path:
        *parents, key = re.sub("^group", "config_groups.group_0", path).split(".")
        inner = settings
        for parent in parents:
            inner = inner[parent]  # type: ignore[assignment]
        inner[key] = value
    return settings


def write_description(directory: Path, kinds: dict[str, str], **settings: object) -> Path:
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / DESCRIPTION_NAME).write_text(json.dumps({"model_quant_type": "W8A8_DYNAMIC", "metadata": {}, **kinds}))
    return directory


def test_checkpoint_that_says_nothing_is_plain() -> None:
    quantization = read_checkpoint_quantization(Path("nowhere"), {})
    assert quantization.kind == "none"
    assert not any(quantization.is_quantized(name) for name in (*LINEARS, *NOT_LINEAR))


def test_fp8_blocks_are_read_with_what_they_leave_plain() -> None:
    quantization = parse({"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [64, 32]})
    assert quantization.kind == "fp8_block"
    assert quantization.block_size == (64, 32)
    assert all(quantization.is_quantized(name) for name in LINEARS)
    plain = ("lm_head", f"{LAYER}.self_attn.indexer.weights_proj", "model.layers.61.eh_proj")
    assert not any(quantization.is_quantized(name) for name in (*plain, *NOT_LINEAR))


def test_fp8_modules_not_converted_are_whole_parts_of_a_name() -> None:
    quantization = parse({"quant_method": "fp8", "modules_to_not_convert": ["self_attn.q_a_proj", "model.layers.4"]})
    assert not quantization.is_quantized(f"{LAYER}.self_attn.q_a_proj")
    assert not quantization.is_quantized("model.layers.4.mlp.up_proj")
    assert quantization.is_quantized("model.layers.40.mlp.up_proj")
    assert quantization.is_quantized(f"{LAYER}.self_attn.q_a_proj_with_more")


def test_w8a8_quantises_all_linears_but_the_ignored() -> None:
    settings = w8a8()
    settings["ignore"] = ["lm_head", r"re:.*\.kv_b_proj$", "model.layers.3.mlp.up_proj"]
    quantization = parse(settings)
    assert quantization.kind == "w8a8"
    assert all(quantization.is_quantized(name) for name in LINEARS)
    ignored = ("lm_head", f"{LAYER}.self_attn.kv_b_proj", f"{LAYER}.mlp.up_proj")
    assert not any(quantization.is_quantized(name) for name in (*ignored, *NOT_LINEAR))
    # Entries are whole names: neither the end nor the beginning of another one matches.
    assert quantization.is_quantized("model.layers.13.mlp.up_proj") and quantization.is_quantized("draft.lm_head")


def test_pattern_matches_from_the_beginning_of_the_name() -> None:
    quantization = CheckpointQuantization(kind="w8a8", ignored=(r"re:model\.layers\.6",))
    assert not quantization.is_quantized("model.layers.61.mlp.up_proj")
    assert quantization.is_quantized("draft.model.layers.6.mlp.up_proj")


def test_targets_may_be_patterns_and_names() -> None:
    quantization = parse(w8a8("group.targets", [r"re:.*experts\.\d+\.down_proj", LINEARS[0]]))
    assert [quantization.is_quantized(name) for name in LINEARS] == [True, True, False]


def test_keys_that_a_config_leaves_out_have_the_packages_meaning() -> None:
    settings = w8a8("group.weights", {"strategy": "channel", "observer": "minmax", "group_size": None})
    assert parse(settings).kind == "w8a8"


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (
            "format",
            "pack-quantized",
            "quantization_config.format is 'pack-quantized'; this engine reads 'int-quantized'",
        ),
        ("group.weights.num_bits", 4, "weights.num_bits is 4; this engine reads 8"),
        ("group.weights.symmetric", 1, "weights.symmetric is 1; this engine reads True"),
        ("group.weights.type", "float", "weights.type is 'float'"),
        ("group.weights.symmetric", False, "weights.symmetric is False"),
        ("group.weights.strategy", "group", "weights.strategy is 'group'; this engine reads 'channel'"),
        ("group.weights.strategy", "tensor", "weights.strategy is 'tensor'"),
        ("group.weights.dynamic", True, "weights.dynamic is True"),
        ("group.weights.group_size", 128, "weights.group_size is 128"),
        ("group.weights.actorder", "weight", "weights.actorder is 'weight'"),
        ("group.weights", None, "weights is None"),
        ("group.input_activations", None, "input_activations is None"),
        ("group.input_activations.dynamic", False, "input_activations.dynamic is False; this engine reads True"),
        ("group.input_activations.strategy", "tensor", "input_activations.strategy is 'tensor'"),
        ("group.input_activations.num_bits", 16, "input_activations.num_bits is 16"),
        ("group.output_activations", {"num_bits": 8}, "output_activations is {'num_bits': 8}"),
        ("group.targets", [], "targets is empty"),
        ("group.targets", "Linear", "must be a list of module names"),
        ("group", "W8A8", "config_groups.group_0 must be an object"),
        ("config_groups", {}, "at least one group"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme is {'num_bits': 8}"),
        ("sparsity_config", {"format": "dense"}, "sparsity_config is"),
        ("quantization_status", "calibration", "quantization_status is 'calibration'"),
        ("ignore", ["re:("], "'re:(' is no regular expression"),
        ("ignore", [5], "quantization_config.ignore must be a list of module names"),
    ],
)
def test_other_compressed_tensors_format_is_refused_by_key(path: str, value: object, complaint: str) -> None:
    with pytest.raises(ValueError, match="quantization_config") as error:
        parse(w8a8(path, value))
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"quant_method": "awq"}, "quant_method 'awq' is not supported; this engine reads"),
        ({}, "quant_method None is not supported"),
        ("fp8", "quantization_config must be an object, got 'fp8'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "activation_scheme 'static'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "two positive integers, got [128]"),
        ({"quant_method": "fp8", "weight_block_size": [True, 128]}, "two positive integers, got [True, 128]"),
        ({"quant_method": "fp8", "modules_to_not_convert": "lm_head"}, "must be a list of module names"),
        ({"quant_method": "ascend"}, f"has no {DESCRIPTION_NAME}"),
    ],
)
def test_unknown_method_is_refused_by_name(settings: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json: ") as error:
        parse(settings)
    assert complaint in str(error.value)


def test_modelslim_description_names_the_quantised_modules(tmp_path: Path) -> None:
    kinds = {f"{LINEARS[0]}.{part}": "W8A8_DYNAMIC" for part in ("weight", "weight_scale", "weight_offset")}
    directory = write_description(tmp_path, {**kinds, "lm_head.weight": "FLOAT", f"{LINEARS[1]}.weight": "FLOAT"})
    quantization = load_checkpoint_quantization(directory)
    assert quantization.kind == "w8a8"
    assert [quantization.is_quantized(name) for name in (*LINEARS, "lm_head")] == [True, False, False, False]


def test_modelslim_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    directory = write_description(tmp_path, {f"{LINEARS[0]}.weight": "W4A8_DYNAMIC"})
    with pytest.raises(ValueError, match=r"q_a_proj\.weight is 'W4A8_DYNAMIC'; this engine reads 'W8A8_DYNAMIC'"):
        load_checkpoint_quantization(directory)


def test_modelslim_description_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="describes no weights"):
        load_checkpoint_quantization(write_description(tmp_path, {}))


def test_two_contradicting_descriptions_are_refused(tmp_path: Path) -> None:
    kinds = {"lm_head.weight": "FLOAT"}
    write_description(tmp_path, kinds, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match="says two things"):
        load_checkpoint_quantization(tmp_path)
    write_description(tmp_path, kinds, quantization_config={"quant_method": "ascend"})
    assert load_checkpoint_quantization(tmp_path).kind == "w8a8"


def test_sixty_thousand_ignored_names_are_judged_quickly() -> None:
    names = [f"model.layers.{i // 1000}.mlp.experts.{i % 1000}.down_proj" for i in range(60_000)]
    quantization = CheckpointQuantization(kind="w8a8", ignored=tuple(names))
    start = time.process_time()
    assert not any(quantization.is_quantized(name) for name in names)
    assert time.process_time() - start < 5.0  # a scan of the list for each name would take an hour
