"""Made weights: parts of one model on every topology, in every format, of a variance that keeps activations' size."""

import pytest
import torch
from torch import nn

from argosy.assets import builtin_model_directory
from argosy.distributed.layout import ParallelLayout
from argosy.models.deepseek.config import load_model_config
from argosy.quantization.checkpoint_format import WeightFormat
from argosy.quantization.dummy_weights import CHUNK_NUMBERS, fill_with_dummy_weights
from argosy.quantization.tensor_boxes import Index, Part
from argosy.quantization.weight_plan import Destination
from tests.helpers.rank_models import build_shares

CONFIG = load_model_config(builtin_model_directory("argosy-tiny"))
ATTENTION, EXPERTS = "model.layers.1.self_attn", "model.layers.1.mlp.experts"


@pytest.mark.parametrize("weight_format", ["none", "w8a8", "fp8_block"])
def test_ranks_hold_the_same_parts_on_every_topology(weight_format: WeightFormat) -> None:
    (whole,) = build_shares(CONFIG, ParallelLayout(), dummy=True, weight_format=weight_format)
    shares = build_shares(CONFIG, ParallelLayout(dp_size=2, tp_size=2), dummy=True, weight_format=weight_format)
    for name, dim in {
        f"{ATTENTION}.o_proj.weight": 1,
        f"{ATTENTION}.q_b_proj.weight": 0,
        "lm_head.weight": 0,
        "model.layers.0.mlp.down_proj.weight": 1,
    }.items():
        joined = torch.cat([share[name] for share in shares[:2]], dim)
        if joined.dtype == whole[name].dtype:  # a tp share may not fit FP8's blocks where the whole does
            assert torch.equal(joined.float(), whole[name].float()), name
        assert torch.equal(shares[0][name].float(), shares[2][name].float()), name
    for name, parameter in whole.items():
        if name.startswith(EXPERTS):
            assert torch.equal(torch.cat([share[name] for share in shares]).float(), parameter.float()), name
        elif "_scale" in name and shares[0][name].shape == parameter.shape:
            assert torch.equal(shares[1][name], parameter), name


@pytest.mark.parametrize(
    ("parameters", "product"),
    [
        ({"a": (torch.float32, (512, 2048))}, lambda p: p["a"]),
        ({"a": (torch.bfloat16, (512, 2048))}, lambda p: p["a"].float()),
        (
            {"a": (torch.int8, (512, 2048)), "a_scale": (torch.float32, (512, 1))},
            lambda p: p["a"].float() * p["a_scale"],
        ),
        (
            {"a": (torch.float8_e4m3fn, (512, 2048)), "a_scale_inv": (torch.float32, (4, 16))},
            lambda p: p["a"].float() * p["a_scale_inv"][0, 0],
        ),
    ],
)
def test_matrices_have_the_variance_that_keeps_activations(parameters: dict, product: object) -> None:  # type: ignore[type-arg]
    model = build_module(parameters)
    fill_with_dummy_weights(model, {"a": (512, 2048)}, lambda name: Destination(name))
    numbers = product(model.state_dict())  # type: ignore[operator]
    assert numbers.mean().abs() < 1e-3
    assert torch.isclose(numbers.var() * 2048, torch.tensor(1.0), rtol=0.02)
    assert all(bool((tensor > 0).all()) for name, tensor in model.state_dict().items() if "_scale" in name)


def build_module(parameters: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> nn.Module:
    model = nn.Module()
    for name, (dtype, shape) in parameters.items():
        model.register_parameter(name, nn.Parameter(torch.zeros(shape).to(dtype), requires_grad=False))
    return model


@pytest.mark.parametrize("source", [(Part(1, 3),), (slice(1500, 2600), slice(7, 4000)), (Part(0, 1), Part(1, 2))])
def test_parts_of_tensors_that_are_drawn_in_chunks_are_those_of_the_whole(source: Index) -> None:
    shape = (3000, 4096)
    assert shape[0] * shape[1] > 2 * CHUNK_NUMBERS
    whole = build_module({"a": (torch.int8, shape), "a_scale": (torch.float32, (shape[0], 1))})
    fill_with_dummy_weights(whole, {"a": shape}, lambda name: Destination(name))
    part = (slice(1000, 2000),) if source == (Part(1, 3),) else source
    part = (slice(None), slice(2048, 4096)) if source == (Part(0, 1), Part(1, 2)) else part
    expected = whole.a[part]  # type: ignore[index]
    model = build_module({"a": (torch.int8, tuple(expected.shape)), "a_scale": (torch.float32, (len(expected), 1))})
    fill_with_dummy_weights(model, {"a": shape}, lambda name: Destination(name, (), source))
    assert torch.equal(model.a, expected)  # type: ignore[arg-type]


def test_another_seed_is_another_model() -> None:
    models = [build_module({"a": (torch.float32, (8, 8))}) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        fill_with_dummy_weights(model, {"a": (8, 8)}, lambda name: Destination(name), seed=seed)
    assert torch.equal(models[0].a, models[1].a)  # type: ignore[arg-type]
    assert not torch.equal(models[0].a, models[2].a)  # type: ignore[arg-type]


def test_norms_are_one_and_biases_zero() -> None:
    model = build_module({"norm.weight".replace(".", "_"): (torch.float32, (4,)), "bias": (torch.float32, (4,))})
    fill_with_dummy_weights(model, {"norm_weight": (4,), "bias": (4,)}, lambda name: Destination(name))
    assert model.state_dict()["norm_weight"].tolist() == [1.0] * 4
    assert model.state_dict()["bias"].tolist() == [0.0] * 4


def test_shapes_that_do_not_fill_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lacks 1 of the model's 1 tensors: 'a'"):
        fill_with_dummy_weights(build_module({"a": (torch.float32, (8, 8))}), {}, lambda name: Destination(name))
