"""Which module computes in which format: by name, by shape, by setting."""

import pytest
import torch

from argosy.config import QuantizationName
from argosy.layers.linear import build_column_parallel, build_linear, build_row_parallel
from argosy.layers.mlp import GatedMLP
from argosy.quantization.checkpoint_format import CheckpointQuantization, WeightFormat
from argosy.quantization.fp8_linear import FP8BlockExperts, FP8BlockLinear
from argosy.quantization.linear_shape import LinearShape
from argosy.quantization.plain_scheme import PlainExperts, PlainLinear
from argosy.quantization.scheme import Schemes, build_schemes, resolve_quantization
from argosy.quantization.w8a8_grouped_gemm import W8A8Experts
from argosy.quantization.w8a8_linear import W8A8Linear

W8A8 = CheckpointQuantization(kind="w8a8", ignored=(r"re:.*\.layers\.3\..*", "model.layers.1.mlp.up_proj"))
FP8 = CheckpointQuantization(kind="fp8_block")


def schemes(quantization: CheckpointQuantization) -> Schemes:
    return build_schemes(torch.bfloat16, quantization)


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[list[int], torch.dtype]]:
    return {name: (list(tensor.shape), tensor.dtype) for name, tensor in module.state_dict().items()}


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_linear_is_what_the_checkpoint_says_of_its_full_name() -> None:
    layers = schemes(W8A8).at("model.layers.2"), schemes(W8A8).at("model").at("layers.3")
    built = [build_linear(layer.at("self_attn"), "q_a_proj", 8, 16) for layer in layers]
    assert [type(module) for module in built] == [W8A8Linear, PlainLinear]


def test_parameters_are_named_and_shaped_as_in_the_checkpoint() -> None:
    attention = schemes(W8A8).at("model.layers.0.self_attn")
    assert shapes_of(build_linear(attention, "q_a_proj", 8, 16)) == {
        "weight": ([16, 8], torch.int8),
        "weight_scale": ([16, 1], torch.float32),
    }
    assert shapes_of(build_linear(schemes(FP8), "kv_a_proj_with_mqa", 7168, 576)) == {
        "weight": ([576, 7168], torch.float8_e4m3fn),
        "weight_scale_inv": ([5, 56], torch.float32),
    }
    assert shapes_of(build_linear(schemes(CheckpointQuantization()), "x", 8, 16)) == {
        "weight": ([16, 8], torch.bfloat16)
    }


def test_stacked_experts_are_named_and_shaped_as_the_loader_fills_them() -> None:
    experts = schemes(W8A8).at("model.layers.2.mlp.experts").build_experts(range(4, 7), 16, 8)
    assert shapes_of(experts) == {
        "gate_up_proj": ([3, 16, 16], torch.int8),
        "gate_up_proj_scale": ([3, 16, 1], torch.float32),
        "down_proj": ([3, 16, 8], torch.int8),
        "down_proj_scale": ([3, 16, 1], torch.float32),
    }
    experts = schemes(FP8).at("model.layers.2.mlp.experts").build_experts(range(4, 7), 256, 128)
    assert shapes_of(experts) == {
        "gate_up_proj": ([3, 256, 256], torch.float8_e4m3fn),
        "gate_up_proj_scale_inv": ([3, 2, 2], torch.float32),
        "down_proj": ([3, 256, 128], torch.float8_e4m3fn),
        "down_proj_scale_inv": ([3, 2, 1], torch.float32),
    }


def test_joined_halves_stored_differently_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.gate_proj' as w8a8 and .*up_proj' plain.*quantization"):
        GatedMLP(16, 8, schemes(W8A8).at("model.layers.1.mlp"))


def test_stacked_experts_stored_differently_are_refused() -> None:
    quantization = CheckpointQuantization(kind="w8a8", ignored=("model.layers.2.mlp.experts.5.down_proj",))
    at_experts = schemes(quantization).at("model.layers.2.mlp.experts")
    with pytest.raises(ValueError, match=r"experts.5.down_proj' plain"):
        at_experts.build_experts(range(4, 7), 16, 8)
    assert isinstance(at_experts.build_experts(range(6, 9), 16, 8), W8A8Experts), "another rank's experts are its own"


def test_a_weight_that_is_read_is_plain() -> None:
    assert isinstance(schemes(W8A8).build_plain_linear(LinearShape(in_features=8, out_features=8)), PlainLinear)


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_a_rank_holds_its_share() -> None:
    plain = schemes(CheckpointQuantization())
    assert shapes_of(build_column_parallel(plain, ("a", "b"), 8, 16, 4))["weight"][0] == [8, 8]
    assert shapes_of(build_row_parallel(plain, "a", 8, 16, 4))["weight"][0] == [16, 2]
    quantized = build_row_parallel(schemes(W8A8), "a", 8, 16, 4)
    assert shapes_of(quantized) == {"weight": ([16, 2], torch.int8), "weight_scale": ([16, 1], torch.float32)}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (LinearShape(in_features=256, out_features=256), FP8BlockLinear),
        (LinearShape(in_features=256, out_features=576), FP8BlockLinear),  # a ragged last block, whole
        (LinearShape(in_features=256, out_features=576, num_joined=2), PlainLinear),  # the second begins in a block
        (LinearShape(in_features=256, out_features=512, num_joined=2), FP8BlockLinear),
        (LinearShape(in_features=256, out_features=256, out_parts=2), FP8BlockLinear),
        (LinearShape(in_features=256, out_features=256, out_parts=4), PlainLinear),
        (LinearShape(in_features=256, out_features=256, in_parts=2), FP8BlockLinear),
        (LinearShape(in_features=256, out_features=256, in_parts=4), PlainLinear),
        (LinearShape(in_features=192, out_features=256), PlainLinear),  # a ragged group of activations
        (LinearShape(in_features=256, out_features=24), PlainLinear),  # not what cards multiply
    ],
)
def test_fp8_blocks_that_would_be_cut_are_plain(shape: LinearShape, expected: type) -> None:
    assert type(schemes(FP8).build_linear(("x",), shape)) is expected


def test_fp8_blocks_of_other_sizes_are_plain() -> None:
    other = CheckpointQuantization(kind="fp8_block", block_size=(64, 128))
    shape = LinearShape(in_features=256, out_features=256)
    assert isinstance(schemes(other).build_linear(("x",), shape), PlainLinear)


@pytest.mark.parametrize(("width", "expected"), [(128, FP8BlockExperts), (64, PlainExperts)])
def test_fp8_experts_whose_halves_are_no_whole_blocks_are_plain(width: int, expected: type) -> None:
    assert type(schemes(FP8).at("experts").build_experts(range(2), 256, width)) is expected


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "stored", "has_fp8_compute", "expected"),
    [
        ("auto", "none", True, "none"),
        ("auto", "w8a8", False, "w8a8"),
        ("auto", "fp8_block", True, "fp8_block"),
        ("auto", "fp8_block", False, "none"),
        ("none", "none", False, "none"),
        ("none", "w8a8", False, "none"),
        ("none", "fp8_block", True, "none"),
        ("w8a8", "w8a8", False, "w8a8"),
        ("fp8_block", "fp8_block", True, "fp8_block"),
    ],
)
def test_setting_and_checkpoint_decide(
    setting: QuantizationName, stored: WeightFormat, has_fp8_compute: bool, expected: WeightFormat
) -> None:
    assert resolve_quantization(setting, stored, has_fp8_compute=has_fp8_compute) == expected


@pytest.mark.parametrize(
    ("setting", "stored", "message"),
    [
        ("w8a8", "none", "'w8a8' was asked for, but the checkpoint holds unquantised weights; .*argosy quantize SRC"),
        ("w8a8", "fp8_block", "holds fp8_block weights; convert it with `argosy quantize SRC DST --scheme w8a8`"),
        ("fp8_block", "w8a8", "'fp8_block' was asked for, but the checkpoint holds w8a8 weights; .*--quantization"),
        ("fp8_block", "none", "holds unquantised weights; give a checkpoint with FP8 blocks"),
    ],
)
def test_a_setting_that_contradicts_the_checkpoint_is_refused(
    setting: QuantizationName, stored: WeightFormat, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_quantization(setting, stored, has_fp8_compute=True)


def test_fp8_compute_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="needs a CUDA card of compute capability 9.0.*--quantization auto"):
        resolve_quantization("fp8_block", "fp8_block", has_fp8_compute=False)


@pytest.mark.parametrize("stored", ["none", "w8a8", "fp8_block"])
@pytest.mark.parametrize("setting", ["none", "w8a8", "fp8_block"])
def test_dummy_weights_are_made_in_any_format(setting: QuantizationName, stored: WeightFormat) -> None:
    assert resolve_quantization(setting, stored, has_fp8_compute=True, is_dummy=True) == setting
