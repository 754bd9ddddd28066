"""Quantised tensors: kept as they are stored, or dequantised, whole or in a rank's part; and what is refused."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from argosy.models.deepseek.checkpoint import WeightShard, build_weight_mapping
from argosy.quantization.fp8_block import dequantize_fp8_block
from argosy.quantization.quantize_weight import dequantize_per_channel, quantize_per_channel
from argosy.quantization.tensor_boxes import Index, Part
from argosy.quantization.weight_loader import load_weights
from argosy.quantization.weight_plan import Destination, WeightMapping
from tests.helpers.checkpoints import quantize_fp8_block, write_checkpoint

Tensors = Mapping[str, torch.Tensor]


class Parameters(nn.Module):
    """Parameters by name, dots allowed; their first values are of no checkpoint."""

    def __init__(self, **parameters: tuple[torch.dtype, tuple[int, ...]]) -> None:
        super().__init__()
        self._parameters.update(
            {
                name.replace("__", "."): nn.Parameter(torch.full(shape, 77).to(dtype), requires_grad=False)
                for name, (dtype, shape) in parameters.items()
            }
        )

    def __getitem__(self, name: str) -> torch.Tensor:
        parameter = self._parameters[name]
        assert parameter is not None
        return parameter


def take(**sources: Index) -> WeightMapping:
    return lambda name: Destination(name, (), sources.get(name, ()))


def int8_tensors(num_rows: int, num_columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_per_channel(torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed)))


# ---- INT8


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_int8_parameters_get_bytes_and_scales(tmp_path: Path, scale_dtype: torch.dtype) -> None:
    weight, scale = int8_tensors(6, 5)
    scale = scale.to(scale_dtype)
    write_checkpoint(tmp_path, {"a": weight, "a_scale": scale})
    model = Parameters(a=(torch.int8, (6, 5)), a_scale=(torch.float32, (6, 1)))
    load_weights(model, tmp_path)
    assert torch.equal(model["a"], weight)
    assert torch.equal(model["a_scale"], scale.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("source", "part"),
    [
        ((), (slice(0, 6), slice(0, 8))),
        ((Part(1, 3),), (slice(2, 4), slice(0, 8))),
        ((Part(0, 1), Part(1, 2)), (slice(0, 6), slice(4, 8))),
        ((slice(1, 4), slice(3, 8)), (slice(1, 4), slice(3, 8))),
    ],
)
def test_float_parameters_get_int8_dequantised_in_any_part(
    tmp_path: Path, dtype: torch.dtype, source: Index, part: tuple[slice, slice]
) -> None:
    weight, scale = int8_tensors(6, 8)
    write_checkpoint(tmp_path, {"a": weight}, {"a_scale": scale})
    expected = dequantize_per_channel(weight, scale, dtype)[part]
    model = Parameters(a=(dtype, tuple(expected.shape)))
    load_weights(model, tmp_path, mapping=take(a=source))
    assert torch.equal(model["a"], expected)


def expert_tensors(num_experts: int) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for expert_id in range(num_experts):
        for number, (kind, shape) in enumerate({"gate": (4, 6), "up": (4, 6), "down": (6, 4)}.items()):
            name = f"model.layers.0.mlp.experts.{expert_id}.{kind}_proj.weight"
            tensors[name], tensors[name + "_scale"] = int8_tensors(*shape, seed=3 * expert_id + number)
    return tensors


@pytest.mark.parametrize("expert_ids", [range(0, 4), range(2, 4)])
def test_int8_experts_are_stacked_with_their_scales(tmp_path: Path, expert_ids: range) -> None:
    tensors = expert_tensors(4)
    write_checkpoint(tmp_path, tensors)
    prefix, e = "model.layers.0.mlp.experts", len(expert_ids)
    shapes = {"gate_up_proj": (e, 8, 6), "down_proj": (e, 6, 4)}
    parameters = {f"{prefix}.{name}": (torch.int8, shape) for name, shape in shapes.items()}
    parameters |= {f"{prefix}.{name}_scale": (torch.float32, (*shape[:2], 1)) for name, shape in shapes.items()}
    model = Parameters(**parameters)
    load_weights(model, tmp_path, mapping=build_weight_mapping(1, 0, WeightShard(expert_ids=expert_ids)))
    for suffix in ("", "_scale"):
        for idx, expert_id in enumerate(expert_ids):
            stored = {
                kind: tensors[f"{prefix}.{expert_id}.{kind}_proj.weight{suffix}"] for kind in ("gate", "up", "down")
            }
            assert torch.equal(model[f"{prefix}.gate_up_proj{suffix}"][idx], torch.cat([stored["gate"], stored["up"]]))
            assert torch.equal(model[f"{prefix}.down_proj{suffix}"][idx], stored["down"])


def test_tp_shares_of_int8_keep_the_scales_of_their_rows(tmp_path: Path) -> None:
    q_b, q_b_scale = int8_tensors(8, 6)
    o, o_scale = int8_tensors(6, 8, seed=1)
    prefix = "model.layers.0.self_attn"
    write_checkpoint(
        tmp_path,
        {f"{prefix}.q_b_proj.weight": q_b, f"{prefix}.q_b_proj.weight_scale": q_b_scale},
        {f"{prefix}.o_proj.weight": o, f"{prefix}.o_proj.weight_scale": o_scale},
    )
    model = Parameters(
        **{
            f"{prefix}.q_b_proj.weight": (torch.int8, (4, 6)),
            f"{prefix}.q_b_proj.weight_scale": (torch.float32, (4, 1)),
            f"{prefix}.o_proj.weight": (torch.int8, (6, 4)),
            f"{prefix}.o_proj.weight_scale": (torch.float32, (6, 1)),
        }
    )
    load_weights(model, tmp_path, mapping=build_weight_mapping(1, 0, WeightShard(tp_rank=1, tp_size=2)))
    assert torch.equal(model[f"{prefix}.q_b_proj.weight"], q_b[4:])
    assert torch.equal(model[f"{prefix}.q_b_proj.weight_scale"], q_b_scale[4:])
    assert torch.equal(model[f"{prefix}.o_proj.weight"], o[:, 4:])
    assert torch.equal(model[f"{prefix}.o_proj.weight_scale"], o_scale)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_offsets_that_are_zero_are_read_and_left(tmp_path: Path, dtype: torch.dtype) -> None:
    weight, scale = int8_tensors(6, 5)
    write_checkpoint(tmp_path, {"a": weight, "a_scale": scale, "a_offset": torch.zeros(6, 1)})
    kept = {"a_scale": (torch.float32, (6, 1))} if dtype == torch.int8 else {}
    model = Parameters(a=(dtype, (6, 5)), **kept)
    stats = load_weights(model, tmp_path)
    assert torch.equal(model["a"].float(), weight.float() if dtype == torch.int8 else weight.float() * scale)
    assert stats.read_bytes == 6 * 5 + 6 * 4 + 6 * 4


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_other_offsets_are_refused_by_their_place(tmp_path: Path, dtype: torch.dtype) -> None:
    weight, scale = int8_tensors(6, 5)
    offset = torch.zeros(6, 1)
    offset[4] = -3.0
    write_checkpoint(tmp_path, {"a": weight, "a_scale": scale, "a_offset": offset})
    model = Parameters(a=(dtype, (3, 5)), **({"a_scale": (torch.float32, (3, 1))} if dtype == torch.int8 else {}))
    load_weights(model, tmp_path, mapping=take(a=(Part(0, 2),)))  # the bad row is another rank's
    with pytest.raises(ValueError, match=r"'a_offset' in model.safetensors: \[4, 0\] is -3.0, but offsets must be 0"):
        load_weights(model, tmp_path, mapping=take(a=(Part(1, 2),)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_int8_scales_that_are_no_positive_number_are_refused(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    weight, scale = int8_tensors(6, 5)
    scale[4] = bad
    write_checkpoint(tmp_path, {"a": weight, "a_scale": scale})
    model = Parameters(a=(dtype, (3, 5)), **({"a_scale": (torch.float32, (3, 1))} if dtype == torch.int8 else {}))
    with pytest.raises(ValueError, match=r"^tensor 'a' in model.safetensors: weight_scale\[4, 0\] is .*positive"):
        load_weights(model, tmp_path, mapping=take(a=(Part(1, 2),)))


# ---- FP8


def test_fp8_parameters_get_bytes_and_scales(tmp_path: Path) -> None:
    weight, scale_inv = quantize_fp8_block(torch.randn(300, 200))
    write_checkpoint(tmp_path, {"a": weight, "a_scale_inv": scale_inv})
    model = Parameters(a=(torch.float8_e4m3fn, (300, 200)), a_scale_inv=(torch.float32, (3, 2)))
    load_weights(model, tmp_path)
    assert torch.equal(model["a"].view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(model["a_scale_inv"], scale_inv)


def test_fp8_shares_on_block_boundaries_get_their_blocks_scales(tmp_path: Path) -> None:
    gate, gate_scale = quantize_fp8_block(torch.randn(512, 256))
    up, up_scale = quantize_fp8_block(torch.randn(512, 256) * 9)
    names = ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
    tensors = {names[0]: gate, names[1]: up, names[0] + "_scale_inv": gate_scale, names[1] + "_scale_inv": up_scale}
    write_checkpoint(tmp_path, tensors)
    fused = "model.layers.0.mlp.gate_up_proj.weight"
    model = Parameters(**{fused: (torch.float8_e4m3fn, (512, 256)), f"{fused}_scale_inv": (torch.float32, (4, 2))})
    load_weights(model, tmp_path, mapping=build_weight_mapping(1, 0, WeightShard(tp_rank=1, tp_size=2)))
    expected = torch.cat([gate[256:].view(torch.uint8), up[256:].view(torch.uint8)])
    assert torch.equal(model[fused].view(torch.uint8), expected)
    assert torch.equal(model[f"{fused}_scale_inv"], torch.cat([gate_scale[2:], up_scale[2:]]))


def test_fp8_shares_inside_a_block_are_refused_where_the_parameter_keeps_fp8(tmp_path: Path) -> None:
    weight, scale_inv = quantize_fp8_block(torch.randn(256, 384))
    write_checkpoint(tmp_path, {"a": weight, "a_scale_inv": scale_inv})
    model = Parameters(a=(torch.float8_e4m3fn, (256, 192)), a_scale_inv=(torch.float32, (2, 2)))
    with pytest.raises(
        ValueError, match=r"'a' of shape \[256, 384\] is cut at 192:384, inside a block of 128.*--quant"
    ):
        load_weights(model, tmp_path, mapping=take(a=(Part(0, 1), Part(1, 2))))


@pytest.mark.parametrize("source", [(slice(100, 333), slice(70, 290)), (slice(128, 300),), (Part(0, 1), Part(1, 2))])
@pytest.mark.parametrize("staging_bytes", [1 << 20, 5000, 100])
def test_parts_of_fp8_are_dequantised_as_the_whole_is(tmp_path: Path, source: Index, staging_bytes: int) -> None:
    weight, scale_inv = quantize_fp8_block(torch.randn(400, 300))
    write_checkpoint(tmp_path, {"a": weight, "a_scale_inv": scale_inv})
    part = (slice(None), slice(150, 300)) if isinstance(source[0], Part) else source
    expected = dequantize_fp8_block(weight, scale_inv, torch.bfloat16)[part]
    model = Parameters(a=(torch.bfloat16, tuple(expected.shape)))
    load_weights(model, tmp_path, mapping=take(a=source), staging_bytes=staging_bytes)
    assert torch.equal(model["a"], expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float32])
def test_fp8_scales_stored_as_exponents_alone_can_be_read(tmp_path: Path, dtype: torch.dtype) -> None:
    weight, scale_inv = quantize_fp8_block(torch.randn(300, 200))
    write_checkpoint(tmp_path, {"a": weight, "a_scale_inv": scale_inv.to(torch.float8_e8m0fnu)})
    kept = {"a_scale_inv": (torch.float32, (3, 2))} if dtype == torch.float8_e4m3fn else {}
    model = Parameters(a=(dtype, (300, 200)), **kept)
    load_weights(model, tmp_path)
    if kept:
        assert torch.equal(model["a_scale_inv"], scale_inv)
    else:
        assert torch.equal(model["a"], dequantize_fp8_block(weight, scale_inv, torch.float32))


# ---- what does not suit


INT8 = torch.zeros(6, 5, dtype=torch.int8)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.zeros(6, 5)}, r"'a' has dtype F32, but 'a', where it goes, holds I8; convert .*argosy quantize"),
        ({"a": INT8}, r"I8 tensor 'a' has no scale: expected 'a_scale' beside it"),
        ({"a": INT8, "a_scale": torch.ones(5, 1)}, r"'a_scale' must be \[6, 1\] F32 or BF16 .* found \[5, 1\] F32"),
        ({"a": INT8, "a_scale": torch.ones(6)}, r"'a_scale' must be \[6, 1\] F32 or BF16 .* found \[6\] F32"),
        ({"a": INT8, "a_scale": torch.ones(6, 1).half()}, r"'a_scale' must be .* found \[6, 1\] F16"),
        ({"a_scale": torch.ones(6, 1)}, r"scale 'a_scale' belongs to an I8 tensor 'a', but found no such tensor"),
        ({"a": torch.zeros(6, 5), "a_offset": torch.ones(6, 1)}, r"offset 'a_offset' belongs to an I8 .* found F32"),
        ({"a": INT8, "a_scale": torch.ones(6, 1), "a_offset": torch.zeros(5, 1)}, r"'a_offset' must be \[6, 1\]"),
        ({"a": INT8[0], "a_scale": torch.ones(5, 1)}, r"I8 tensor 'a' must have 2 dims to be scaled, found \[5\]"),
    ],
)
def test_what_does_not_suit_is_refused_before_anything_is_written(
    tmp_path: Path, tensors: Tensors, message: str
) -> None:
    write_checkpoint(tmp_path, dict(tensors) | {"b": torch.zeros(2)})
    model = Parameters(a=(torch.int8, (6, 5)), a_scale=(torch.float32, (6, 1)), b=(torch.float32, (2,)))
    with pytest.raises(ValueError, match=message) as error:
        load_weights(model, tmp_path)
    assert "\n" not in str(error.value)
    assert model["b"].tolist() == [77.0, 77.0]


def test_a_model_without_a_place_for_scales_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": INT8, "a_scale": torch.ones(6, 1)})
    with pytest.raises(ValueError, match=r"scale 'a_scale' has no place: the model has no parameter 'a_scale'"):
        load_weights(Parameters(a=(torch.int8, (6, 5))), tmp_path)
