"""Converting a checkpoint to W8A8: what the files hold, from every source format, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from argosy.quantization.checkpoint_format import load_checkpoint_quantization
from argosy.quantization.conversion_plan import Action
from argosy.quantization.convert_shard import PIECE_BYTES
from argosy.quantization.fp8_block import dequantize_fp8_block
from argosy.quantization.quantize_weight import quantize_per_channel
from argosy.quantization.safetensors_headers import read_headers
from tests.helpers.conversions import (
    DOWN,
    FP8_CONFIG,
    KV_B,
    NORM,
    Q_A,
    SHAPES,
    TARGET,
    convert,
    load_converted,
    make_fp8,
    make_weights,
    read_tree,
    split_weights,
    write_source,
)

QUANTIZED = tuple(name for name in SHAPES if name != KV_B)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float_checkpoint_becomes_the_specified_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = make_weights(dtype=dtype)
    source = write_source(tmp_path / "source", *split_weights(weights, 2), hidden_size=33)
    convert(source, tmp_path / "out")
    converted = load_converted(tmp_path / "out")
    for name in QUANTIZED:
        quantized, scale = quantize_per_channel(weights[name])
        assert torch.equal(converted.pop(name), quantized), name
        assert torch.equal(converted.pop(f"{name}_scale"), scale), name
    assert converted.keys() == {KV_B, NORM, "lm_head.weight"}
    for name, tensor in converted.items():
        assert tensor.dtype is weights[name].dtype and torch.equal(tensor, weights[name]), name


def test_result_names_its_format_and_keeps_the_other_files(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", make_weights(), hidden_size=33)
    convert(source, tmp_path / "out")
    quantization = load_checkpoint_quantization(tmp_path / "out")
    assert quantization.kind == "w8a8" and quantization.ignored == TARGET.ignored
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == 33
    for name in ("tokenizer.json", "encoding/notes.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    headers = read_headers(tmp_path / "out")  # checks layout and index
    assert headers[f"{Q_A}_scale"].shape == (48, 1) and headers[f"{Q_A}_scale"].dtype == "F32"
    assert all(header.start_byte % 4 == 0 for header in headers.values() if header.dtype == "F32")


def test_fp8_checkpoint_is_converted_from_its_dequantised_numbers(tmp_path: Path) -> None:
    weights = make_weights(dtype=torch.float32)
    tensors = make_fp8(weights)
    assert tensors[f"{DOWN}_scale_inv"].shape == (3, 3)  # 300 x 260: ragged both ways
    # Scales may lie in another shard than their weights.
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("_scale_inv")}
    rest = {name: tensor for name, tensor in tensors.items() if name not in scales}
    source = write_source(tmp_path / "source", rest, scales, quantization_config=FP8_CONFIG)
    convert(source, tmp_path / "out")
    converted = load_converted(tmp_path / "out")
    for name in QUANTIZED:
        exact = dequantize_fp8_block(tensors[name], tensors[f"{name}_scale_inv"], torch.float32)
        quantized, scale = quantize_per_channel(exact)
        assert torch.equal(converted[name], quantized) and torch.equal(converted[f"{name}_scale"], scale), name
        # Against the original: e4m3 keeps 3 bits of fraction (half of its last is 2^-4 of the number), or half a
        # subnormal (2^-10 of its block's scale); INT8 adds half a step of its own.
        block_scale = tensors[f"{name}_scale_inv"].max()
        bound = weights[name].abs() * 2**-4 + block_scale * 2**-10 + scale * 0.5
        difference = (converted[name].float() * converted[f"{name}_scale"] - weights[name]).abs()
        assert bool((difference <= bound * (1 + 1e-5)).all()), name
    assert converted[KV_B].dtype is torch.bfloat16
    assert torch.equal(
        converted[KV_B], dequantize_fp8_block(tensors[KV_B], tensors[f"{KV_B}_scale_inv"], torch.bfloat16)
    )
    assert not any(name.endswith("_scale_inv") for name in converted)
    assert load_checkpoint_quantization(tmp_path / "out").kind == "w8a8"


def test_other_block_sizes_are_read_from_config(tmp_path: Path) -> None:
    weight = torch.randn(70, 50)
    codes = weight.to(torch.float8_e4m3fn)
    scale_inv = torch.rand(3, 4) + 0.5
    config = {**FP8_CONFIG, "weight_block_size": [32, 16]}
    source = write_source(tmp_path / "s", {Q_A: codes, f"{Q_A}_scale_inv": scale_inv}, quantization_config=config)
    convert(source, tmp_path / "out")
    expected, _ = quantize_per_channel(dequantize_fp8_block(codes, scale_inv, torch.float32, (32, 16)))
    assert torch.equal(load_converted(tmp_path / "out")[Q_A], expected)


def test_tensor_of_several_pieces_is_whole(tmp_path: Path) -> None:
    width = 3000
    num_rows = PIECE_BYTES // (2 * width) * 2 + 77
    weight = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(3)).bfloat16()
    weight[5] = 0
    kept = torch.randn(num_rows, width).bfloat16()
    source = write_source(tmp_path / "source", {Q_A: weight, "lm_head.weight": kept})
    reports = {report.name: report for report in convert(source, tmp_path / "out")}
    converted = load_converted(tmp_path / "out")
    quantized, scale = quantize_per_channel(weight)
    assert torch.equal(converted[Q_A], quantized) and torch.equal(converted[f"{Q_A}_scale"], scale)
    assert torch.equal(converted["lm_head.weight"], kept)
    errors = reports[Q_A].errors
    assert errors is not None
    difference = quantized.double() * scale.double() - weight.double()
    assert errors.error_sq == pytest.approx(float(difference.square().sum()), rel=1e-4)
    assert reports["lm_head.weight"].errors is None and reports["lm_head.weight"].action is Action.COPY


def test_result_does_not_depend_on_threads(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", *split_weights(make_weights(), 3))
    convert(source, tmp_path / "one", num_threads=1)
    convert(source, tmp_path / "four", num_threads=4)
    assert read_tree(tmp_path / "one") == read_tree(tmp_path / "four")


def test_shards_follow_max_shard_bytes(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", make_weights())
    convert(source, tmp_path / "out", max_shard_bytes=40_000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    headers = read_headers(tmp_path / "out")
    assert len(shards) > 2
    for shard in shards:
        sizes = [header.num_bytes for header in headers.values() if header.file == shard]
        assert sum(sizes) <= 40_000 or len(sizes) == 2  # a tensor that is larger alone is alone, with its scales
    assert load_converted(tmp_path / "out").keys() == headers.keys()


def test_empty_and_vector_tensors_pass_through(tmp_path: Path) -> None:
    tensors = {Q_A: torch.empty(0, 8), NORM: torch.ones(3), "count": torch.tensor(7), "mask": torch.tensor([True])}
    source = write_source(tmp_path / "source", tensors)
    convert(source, tmp_path / "out")
    converted = load_converted(tmp_path / "out")
    assert converted[Q_A].shape == (0, 8) and converted[f"{Q_A}_scale"].shape == (0, 1)
    assert torch.equal(converted["count"], tensors["count"]) and torch.equal(converted["mask"], tensors["mask"])


# --- refused ----------------------------------------------------------------------------------------------------------


def refuse(tmp_path: Path, tensors: dict[str, torch.Tensor], match: str, **settings: object) -> None:
    """The conversion fails with the message, and nothing there looks whole."""
    source = write_source(tmp_path / "source", tensors, **settings)
    with pytest.raises(ValueError, match=match):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert not list((tmp_path / "out").glob(".*.safetensors.partial"))


@pytest.mark.parametrize("name", [Q_A, "lm_head.weight", NORM])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_number_that_is_not_finite_is_refused_by_tensor(name: str, bad: float, tmp_path: Path) -> None:
    weights = make_weights()
    weights[name].view(-1)[7] = bad
    refuse(tmp_path, weights, rf"tensor '{name}' in .*model\.safetensors: .* {bad}; weights must be finite")


def test_nan_of_a_kept_fp8_tensor_is_refused_by_tensor(tmp_path: Path) -> None:
    tensors = make_fp8(make_weights())
    tensors[KV_B].view(torch.uint8)[3, 5] = 0xFF
    refuse(tmp_path, tensors, f"tensor '{KV_B}' in .*NaN", quantization_config=FP8_CONFIG)


@pytest.mark.parametrize("name", [DOWN, KV_B])
@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_fp8_scale_that_is_not_positive_is_refused_by_tensor(name: str, bad: float, tmp_path: Path) -> None:
    tensors = make_fp8(make_weights())
    tensors[f"{name}_scale_inv"][-1, -1] = bad
    row = tensors[f"{name}_scale_inv"].shape[0] - 1
    refuse(
        tmp_path,
        tensors,
        rf"tensor '{name}' in .*weight_scale_inv\[{row}, \d\] is {bad}",
        quantization_config=FP8_CONFIG,
    )


def test_quantised_source_is_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", make_weights())
    convert(source, tmp_path / "once")
    with pytest.raises(ValueError, match="quantised to INT8 already"):
        convert(tmp_path / "once", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_int8_weights_without_a_config_are_refused(tmp_path: Path) -> None:
    refuse(tmp_path, {Q_A: torch.ones(3, 3, dtype=torch.int8)}, "quantised to INT8 already")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({f"{Q_A}_scale_inv": None}, r"must have 2 dims and .*_scale_inv' beside it; no scale"),
        ({Q_A: None}, "scale .* belongs to an F8_E4M3 tensor of its name, but found no such tensor"),
        ({Q_A: torch.ones(48, 200)}, "but found F32"),
        ({f"{Q_A}_scale_inv": torch.ones(1, 1)}, r"must be F32 \[1, 2\], found F32 \[1, 1\]"),
        ({f"{Q_A}_scale_inv": torch.ones(1, 2).bfloat16()}, r"must be F32 \[1, 2\], found BF16"),
        ({NORM: torch.ones(8).to(torch.float8_e4m3fn)}, "must have 2 dims"),
        ({Q_A: torch.ones(48, 200, dtype=torch.float64), f"{Q_A}_scale_inv": None}, "is F64; BF16, F16, F32"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(
    changes: dict[str, torch.Tensor | None], match: str, tmp_path: Path
) -> None:
    changed = {**make_fp8(make_weights()), **changes}
    tensors = {name: tensor for name, tensor in changed.items() if tensor is not None}
    refuse(tmp_path, tensors, match, quantization_config=FP8_CONFIG)
