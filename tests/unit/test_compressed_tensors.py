"""Our W8A8 layout as the ``compressed-tensors`` package sees it: same config, same modules, same numbers."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.utils import match

from argosy.assets import builtin_model_directory
from argosy.models.deepseek.checkpoint import checkpoint_shapes
from argosy.models.deepseek.config import load_model_config
from argosy.models.deepseek.quantized_modules import build_w8a8_format
from argosy.quantization.checkpoint_format import load_checkpoint_quantization, read_checkpoint_quantization
from argosy.quantization.quantize_weight import dequantize_per_channel
from tests.helpers.conversions import KV_B, SHAPES, convert, load_converted, make_weights, write_source


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    convert(write_source(tmp_path / "source", make_weights()), tmp_path / "out")
    return tmp_path / "out"


def read_config(directory: Path) -> QuantizationConfig:
    raw = json.loads((directory / "config.json").read_text())
    return QuantizationConfig.model_validate(raw["quantization_config"])


def test_package_reads_our_config_as_w8a8(converted: Path) -> None:
    config = read_config(converted)
    scheme = config.config_groups["group_0"]
    assert config.format == "int-quantized" and config.quantization_status == "compressed"
    for arguments, strategy, is_dynamic in (
        (scheme.weights, "channel", False),
        (scheme.input_activations, "token", True),
    ):
        assert (arguments.num_bits, arguments.type, arguments.symmetric) == (8, "int", True)
        assert (arguments.strategy, arguments.dynamic) == (strategy, is_dynamic)


def test_we_read_what_the_package_writes(converted: Path) -> None:
    dumped = read_config(converted).model_dump(mode="json")
    ours = load_checkpoint_quantization(converted)
    assert read_checkpoint_quantization(Path("nowhere"), {"quantization_config": dumped}) == ours


@pytest.mark.parametrize("name", [name for name in SHAPES if name != KV_B])
def test_package_makes_the_same_numbers(name: str, converted: Path) -> None:
    arguments = read_config(converted).config_groups["group_0"].weights
    tensors = load_converted(converted)
    quantized, scale = tensors[name], tensors[f"{name}_scale"]
    theirs = dequantize(quantized, scale, args=arguments, dtype=torch.float32)
    assert torch.equal(theirs, dequantize_per_channel(quantized, scale, torch.float32))
    again = quantize(make_weights()[name].float(), scale, None, arguments, dtype=torch.int8)
    assert torch.equal(again, quantized)


@pytest.mark.parametrize("quantize_mtp", [False, True])
@pytest.mark.parametrize("quantize_kv_b", [False, True])
def test_package_finds_the_same_modules(quantize_kv_b: bool, quantize_mtp: bool) -> None:
    config = load_model_config(builtin_model_directory("argosy-tiny"))
    ours = build_w8a8_format(config, quantize_kv_b=quantize_kv_b, quantize_mtp=quantize_mtp)
    linear = torch.nn.Linear(1, 1)
    shapes = checkpoint_shapes(config)
    mtp = {name.replace("layers.4.", "layers.5."): shape for name, shape in shapes.items() if "layers.4." in name}
    extra = {f"model.layers.5.{name}.weight": (8, 8) for name in ("eh_proj", "shared_head.head")}
    num_quantized = 0
    for name, shape in {**shapes, **mtp, **extra}.items():
        module_name = name.removesuffix(".weight")
        # To transformers neither of these is a Linear, and the package would ask it.
        if len(shape) == 2 and not module_name.endswith("embed_tokens"):
            theirs = match.is_match(module_name, linear, "Linear") and not match.is_match(
                module_name, linear, list(ours.ignored)
            )
            assert ours.is_quantized(module_name) == theirs, module_name
            num_quantized += theirs
    assert num_quantized > 400
