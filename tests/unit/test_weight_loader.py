"""Loading checkpoints: into place, once, and with errors that name tensor, expected and found."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from argosy.models.deepseek.checkpoint import build_weight_mapping
from argosy.quantization.fp8_block import dequantize_fp8_block
from argosy.quantization.load_progress import LoadProgress
from argosy.quantization.safetensors_headers import read_headers
from argosy.quantization.tensor_boxes import Part
from argosy.quantization.weight_loader import load_weights
from argosy.quantization.weight_plan import Destination, map_to_same_name
from tests.helpers.checkpoints import (
    quantize_fp8_block,
    read_index,
    write_checkpoint,
    write_index,
    write_raw_shard,
)

NUM_EXPERTS, WIDTH, HIDDEN = 3, 4, 6


class Holder(nn.Module):
    """A module tree made from dotted parameter names."""

    def __init__(self, dtype: torch.dtype, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.full(shape, 7.0, dtype=dtype), requires_grad=False))


class Experts(Holder):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype, gate_up_proj=(NUM_EXPERTS, 2 * WIDTH, HIDDEN), down_proj=(NUM_EXPERTS, HIDDEN, WIDTH))


class GatedMLP(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = Holder(dtype, weight=(2 * WIDTH, HIDDEN))
        self.down_proj = Holder(dtype, weight=(HIDDEN, WIDTH))


class MoE(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.experts = Experts(dtype)
        self.shared_experts = GatedMLP(dtype)


class Layer(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.input_layernorm = Holder(torch.float32, weight=(HIDDEN,))


class Backbone(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(GatedMLP(dtype)), Layer(MoE(dtype))])


class TinyModel(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = Backbone(dtype)
        self.lm_head = Holder(dtype, weight=(10, HIDDEN))


def gated_mlp_tensors(prefix: str) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.gate_proj.weight": torch.randn(WIDTH, HIDDEN),
        f"{prefix}.up_proj.weight": torch.randn(WIDTH, HIDDEN),
        f"{prefix}.down_proj.weight": torch.randn(HIDDEN, WIDTH),
    }


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    result = {"lm_head.weight": torch.randn(10, HIDDEN)}
    for layer_id in range(2):
        result[f"model.layers.{layer_id}.input_layernorm.weight"] = torch.randn(HIDDEN)
    result |= gated_mlp_tensors("model.layers.0.mlp") | gated_mlp_tensors("model.layers.1.mlp.shared_experts")
    for expert_id in range(NUM_EXPERTS):
        result |= gated_mlp_tensors(f"model.layers.1.mlp.experts.{expert_id}")
    result["model.layers.2.enorm.weight"] = torch.randn(HIDDEN)  # MTP's, which the tiny model does not build
    return result


def split(tensors: dict[str, torch.Tensor], num_shards: int) -> list[dict[str, torch.Tensor]]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[i::num_shards]} for i in range(num_shards)]


mapping = build_weight_mapping(2, 1)


def check_loaded(model: TinyModel, tensors: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    dtype = model.lm_head.weight.dtype

    def same(loaded: torch.Tensor, name: str) -> None:
        assert torch.equal(loaded, tensors[name].to(loaded.dtype)), name

    same(state["lm_head.weight"], "lm_head.weight")
    same(state["model.layers.1.input_layernorm.weight"], "model.layers.1.input_layernorm.weight")
    assert state["model.layers.1.input_layernorm.weight"].dtype == torch.float32
    for prefix in ("model.layers.0.mlp", "model.layers.1.mlp.shared_experts"):
        same(state[f"{prefix}.gate_up_proj.weight"][:WIDTH], f"{prefix}.gate_proj.weight")
        same(state[f"{prefix}.gate_up_proj.weight"][WIDTH:], f"{prefix}.up_proj.weight")
        same(state[f"{prefix}.down_proj.weight"], f"{prefix}.down_proj.weight")
    for expert_id in range(NUM_EXPERTS):
        prefix = "model.layers.1.mlp.experts"
        same(state[f"{prefix}.gate_up_proj"][expert_id, :WIDTH], f"{prefix}.{expert_id}.gate_proj.weight")
        same(state[f"{prefix}.gate_up_proj"][expert_id, WIDTH:], f"{prefix}.{expert_id}.up_proj.weight")
        same(state[f"{prefix}.down_proj"][expert_id], f"{prefix}.{expert_id}.down_proj.weight")
    assert state["model.layers.1.mlp.experts.down_proj"].dtype == dtype


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_lands_in_its_place_in_the_models_dtype(
    tmp_path: Path, tensors: dict[str, torch.Tensor], num_shards: int, stored: torch.dtype, dtype: torch.dtype
) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    write_checkpoint(tmp_path, *split(tensors, num_shards))
    model = TinyModel(dtype)
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    load_weights(model, tmp_path, mapping=mapping)
    check_loaded(model, tensors)
    assert addresses == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_persistent_buffers_are_filled_and_others_left_alone(tmp_path: Path) -> None:
    model = Holder(torch.float32, weight=(2, 3))
    model.register_buffer("bias", torch.zeros(2))
    model.register_buffer("table", torch.ones(4), persistent=False)
    tensors = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    load_weights(model, write_checkpoint(tmp_path, tensors))
    assert torch.equal(model.get_buffer("bias"), tensors["bias"])
    assert torch.equal(model.get_buffer("table"), torch.ones(4))


def test_a_model_made_in_inference_mode_can_be_filled(tmp_path: Path) -> None:
    with torch.inference_mode():
        model = Holder(torch.float32, weight=(2,))
    load_weights(model, write_checkpoint(tmp_path, {"weight": torch.tensor([1.0, 2.0])}))
    assert model.weight.tolist() == [1.0, 2.0]


def test_progress_counts_tensors_and_bytes(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_checkpoint(tmp_path, *split(tensors, 2))
    seen: list[LoadProgress] = []
    load_weights(TinyModel(torch.bfloat16), tmp_path, mapping=mapping, on_progress=seen.append)
    used = [tensor for name, tensor in tensors.items() if ".2." not in name or "expert" in name]
    num_bytes = sum(tensor.numel() * 4 for tensor in used)
    assert [progress.num_tensors for progress in seen] == list(range(len(used) + 1))
    assert seen[0] == LoadProgress(0, 0, len(used), num_bytes)
    assert seen[-1] == LoadProgress(len(used), num_bytes, len(used), num_bytes)


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory through /proc")
def test_memory_holds_no_second_copy_of_the_model(tmp_path: Path) -> None:
    tensor_bytes = 4 << 20
    tensors = {f"weight_{i}": torch.randn(tensor_bytes // 4) for i in range(24)}
    model = Holder(torch.float32, **{name: tuple(tensor.shape) for name, tensor in tensors.items()})
    write_checkpoint(tmp_path, *split(tensors, 2))
    del tensors
    base, seen = anonymous_bytes(), []
    load_weights(model, tmp_path, on_progress=lambda progress: seen.append(anonymous_bytes() - base))
    assert max(seen) < 3 * tensor_bytes


# ---- FP8


@pytest.mark.parametrize("shape", [(576, 300), (128, 128), (1, 1), (256, 7), (130, 256), (0, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_blocks_are_scaled_one_by_one_with_ragged_last_blocks(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale_inv = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)) + 0.01
    expanded = scale_inv.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    expected = (weight.float() * expanded).to(dtype)
    loaded = dequantize_fp8_block(weight, scale_inv, dtype)
    assert loaded.dtype == dtype
    assert torch.equal(loaded, expected)


def test_fp8_with_power_of_two_scales_is_exact_in_bf16() -> None:
    torch.manual_seed(2)
    weight, scale_inv = quantize_fp8_block(torch.randn(200, 200) * 0.02)
    assert torch.equal(
        dequantize_fp8_block(weight, scale_inv, torch.bfloat16).float(),
        dequantize_fp8_block(weight, scale_inv, torch.float32),
    )


@pytest.mark.parametrize("scale_apart", [False, True])
def test_fp8_tensors_are_dequantised_into_place(tmp_path: Path, scale_apart: bool) -> None:
    torch.manual_seed(3)
    first, first_scale = quantize_fp8_block(torch.randn(576, 200))
    second, second_scale = quantize_fp8_block(torch.randn(192, 130))
    weights = {"a.weight": first, "mlp.gate_proj.weight": second, "mlp.up_proj.weight": second.clone()}
    scales = {
        "a.weight_scale_inv": first_scale,
        "mlp.gate_proj.weight_scale_inv": second_scale,
        "mlp.up_proj.weight_scale_inv": 2 * second_scale,
    }
    write_checkpoint(tmp_path, *([weights, scales] if scale_apart else [weights | scales]))
    model = nn.Module()
    model.a = Holder(torch.bfloat16, weight=(576, 200))
    model.mlp = nn.Module()
    model.mlp.gate_up_proj = Holder(torch.float32, weight=(384, 130))
    load_weights(model, tmp_path, mapping=mapping)
    assert torch.equal(model.a.weight, dequantize_fp8_block(first, first_scale, torch.bfloat16))
    half = dequantize_fp8_block(second, second_scale, torch.float32)
    assert torch.equal(model.mlp.gate_up_proj.weight, torch.cat([half, 2 * half]))


def test_a_rank_can_take_its_part_of_a_tensor(tmp_path: Path) -> None:
    torch.manual_seed(4)
    weight, scale_inv = quantize_fp8_block(torch.randn(256, 300))
    plain = torch.randn(4, 6)
    write_checkpoint(tmp_path, {"a": weight, "a_scale_inv": scale_inv, "b": plain, "other": torch.randn(3)})
    sources = {"a": (slice(100, 200), Part(1, 3)), "b": (Part(1, 2), 4)}
    model = Holder(torch.float32, a=(100, 100), b=(2,))

    def take_part(name: str) -> Destination | None:
        return Destination(name, (), sources[name]) if name in sources else None

    load_weights(model, tmp_path, mapping=take_part)
    assert torch.equal(model.a, dequantize_fp8_block(weight, scale_inv, torch.float32)[100:200, 100:200])
    assert torch.equal(model.b, plain[2:, 4])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_fp8_scales_that_are_no_positive_number_are_refused(tmp_path: Path, bad: float) -> None:
    weight, scale_inv = quantize_fp8_block(torch.randn(256, 256))
    scale_inv[1, 0] = bad
    write_checkpoint(tmp_path, {"a": weight, "a_scale_inv": scale_inv})
    with pytest.raises(ValueError, match=r"^tensor 'a' in model.safetensors: weight_scale_inv\[1, 0\] is .*positive"):
        load_weights(Holder(torch.float32, a=(256, 256)), tmp_path)


@pytest.mark.parametrize(
    ("weight", "scale_inv", "message"),
    [
        (torch.zeros(4, 4), torch.ones(1, 1), r"must be 2-dimensional float8_e4m3fn, got \[4, 4\] torch.float32"),
        (torch.zeros(4).to(torch.float8_e4m3fn), torch.ones(1, 1), r"2-dimensional .* got \[4\]"),
        (torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.ones(1, 2), r"must be \[1, 1\] float32, got \[1, 2\]"),
        (torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.ones(1, 1).half(), r"got \[1, 1\] torch.float16"),
    ],
)
def test_fp8_dequantisation_refuses_wrong_tensors(weight: torch.Tensor, scale_inv: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dequantize_fp8_block(weight, scale_inv, torch.float32)


FP8 = torch.zeros(130, 4).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"a": FP8}, r"F8_E4M3 tensor 'a' has no scale: expected 'a_scale_inv'"),
        ({"a_scale_inv": torch.ones(2, 1)}, r"scale 'a_scale_inv' belongs to .* 'a', but found no such tensor"),
        ({"a": FP8.float(), "a_scale_inv": torch.ones(2, 1)}, r"scale 'a_scale_inv' belongs to .* but found F32"),
        ({"a": FP8, "a_scale_inv": torch.ones(1, 1)}, r"'a_scale_inv' must be \[2, 1\] F32 .* found \[1, 1\] F32"),
        ({"a": FP8, "a_scale_inv": torch.ones(2, 1).half()}, r"must be \[2, 1\] F32 .* found \[2, 1\] F16"),
        ({"a": FP8[:, 0].contiguous(), "a_scale_inv": torch.ones(2)}, r"'a' must have 2 dims .* found \[130\]"),
        (
            {"a": FP8.to(torch.int16)},
            r"'a' has dtype I16; expected BF16, F16, F32, I8 with 'a_scale', or F8_E4M3 with 'a_scale_inv'",
        ),
    ],
)
def test_scales_and_dtypes_are_checked_before_anything_is_written(
    tmp_path: Path, checkpoint: dict[str, torch.Tensor], message: str
) -> None:
    model = Holder(torch.float32, a=(130, 4), b=(2,))
    write_checkpoint(tmp_path, checkpoint | {"b": torch.zeros(2)})
    with pytest.raises(ValueError, match=message) as error:
        load_weights(model, tmp_path)
    assert "\n" not in str(error.value)
    assert torch.equal(model.b, torch.full((2,), 7.0))


# ---- the plan


def load_tiny(directory: Path) -> None:
    load_weights(TinyModel(torch.float32), directory, mapping=mapping)


EXPERTS = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), r"lacks 1 of the model's 9 tensors: 'lm_head.weight'"),
        (lambda t: t.pop(f"{EXPERTS}.1.up_proj.weight"), r"lacks 1 .*'model.layers.1.mlp.experts.gate_up_proj\[1\]'"),
        (
            lambda t: [t.pop(name) for name in list(t) if "down_proj" in name or "norm" in name],
            r"lacks 5 of the model's 9 tensors: .*'model.layers.0.mlp.down_proj.weight'.* and 2 more",
        ),
        (
            lambda t: t.update({f"surplus{i}": torch.zeros(1) for i in range(5)}),
            r"has 5 unknown tensors: 'surplus0', 'surplus1', 'surplus2' and 2 more; .*no parameter 'surplus0'",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(HIDDEN, 10)}),
            r"'lm_head.weight' must give shape \[10, 6\] to 'lm_head.weight', found \[6, 10\]",
        ),
        (
            lambda t: t.update({f"{EXPERTS}.2.up_proj.weight": torch.zeros(2 * WIDTH, HIDDEN)}),
            r"experts.2.up_proj.weight' must give shape \[4, 6\] to '.*gate_up_proj'\[2, 4:8\], found \[8, 6\]",
        ),
        (
            lambda t: t.update({f"{EXPERTS}.3.up_proj.weight": torch.zeros(WIDTH, HIDDEN)}),
            r"gate_up_proj', where '.*experts.3.up_proj.weight' goes, has shape \[3, 8, 6\], but index \[3:4\]",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.gate_up_proj.weight": torch.zeros(2 * WIDTH, HIDDEN)}),
            r"'model.layers.0.mlp.gate_proj.weight' and 'model.layers.0.mlp.gate_up_proj.weight' both fill|"
            r"'model.layers.0.mlp.gate_up_proj.weight' and 'model.layers.0.mlp.gate_proj.weight' both fill",
        ),
    ],
)
def test_the_plan_refuses_checkpoints_that_do_not_fit(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    change: Callable[[dict[str, torch.Tensor]], object],
    message: str,
) -> None:
    change(tensors)
    write_checkpoint(tmp_path, *split(tensors, 2))
    with pytest.raises(ValueError, match=message) as error:
        load_tiny(tmp_path)
    assert "\n" not in str(error.value)


def test_overlapping_destinations_are_refused_wherever_they_meet(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.zeros(3, 4), "b": torch.zeros(2, 4), "c": torch.zeros(4, 2)})
    places = {"a": (slice(0, 3), slice(0, 4)), "b": (slice(2, 4), slice(4, 8)), "c": (slice(0, 4), slice(3, 5))}
    with pytest.raises(ValueError, match="tensors 'a' and 'c' both fill 'w'"):
        load_weights(Holder(torch.float32, w=(4, 8)), tmp_path, mapping=lambda name: Destination("w", places[name]))


def test_parts_must_divide_the_dim(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"'a', where 'a' goes, has a dim of 5 in \[5\], not divisible by 2"):
        load_weights(Holder(torch.float32, a=(5,)), tmp_path, mapping=lambda name: Destination(name, (Part(0, 2),)))


def test_too_many_indices_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"has shape \[2\], found 2 indices"):
        load_weights(Holder(torch.float32, a=(2,)), tmp_path, mapping=lambda name: Destination(name, (0, 0)))


def test_parameters_without_elements_need_no_tensor(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.ones(2)})
    load_weights(Holder(torch.float32, a=(2,), none=(0, 5)), tmp_path)


def test_parameters_without_memory_are_our_own_mistake(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.ones(2)})
    with torch.device("meta"):
        model = Holder(torch.float32, a=(2,))
    with pytest.raises(AssertionError, match="without memory"):
        load_weights(model, tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lm_head.weight", Destination("lm_head.weight")),
        ("model.layers.0.self_attn.q_a_proj.weight", Destination("model.layers.0.self_attn.q_a_proj.weight")),
        ("model.layers.1.mlp.gate.weight", Destination("model.layers.1.mlp.gate.weight")),
        ("model.layers.0.mlp.up_proj.weight", Destination("model.layers.0.mlp.gate_up_proj.weight", (Part(1, 2),))),
        ("model.layers.0.mlp.down_proj.weight", Destination("model.layers.0.mlp.down_proj.weight")),
        (
            "model.layers.1.mlp.shared_experts.gate_proj.weight",
            Destination("model.layers.1.mlp.shared_experts.gate_up_proj.weight", (Part(0, 2),)),
        ),
        ("model.layers.1.mlp.experts.12.down_proj.weight", Destination(f"{EXPERTS}.down_proj", (12,))),
        ("model.layers.1.mlp.experts.12.up_proj.weight", Destination(f"{EXPERTS}.gate_up_proj", (12, Part(1, 2)))),
        ("model.layers.2.mlp.experts.12.up_proj.weight", None),
        ("model.layers.2.enorm.weight", None),
        ("model.layers.1.mlp.experts.0.other.weight", Destination("model.layers.1.mlp.experts.0.other.weight")),
    ],
)
def test_deepseek_names_are_mapped(name: str, expected: Destination | None) -> None:
    assert mapping(name) == expected


# ---- files


def test_headers_tell_shape_dtype_and_place_of_every_tensor(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
    write_checkpoint(tmp_path, {"a": tensors["a"]}, {"b": tensors["b"]})
    headers = read_headers(tmp_path)
    assert {name: (h.shape, h.dtype, h.num_bytes) for name, h in headers.items()} == {
        "a": ((2, 3), "F32", 24),
        "b": ((5,), "BF16", 10),
    }
    for name, header in headers.items():
        raw = header.file.read_bytes()[header.start_byte : header.stop_byte]
        assert raw == tensors[name].contiguous().view(torch.uint8).numpy().tobytes()


def test_a_directory_without_a_checkpoint_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none does not exist; .*model.safetensors.index.json or model.safetensors"):
        read_headers(tmp_path / "none")
    with pytest.raises(ValueError, match=r"looked for model.safetensors.index.json and .* found an empty directory"):
        read_headers(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is a file"):
        read_headers(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"looked for .* found 'config.json'"):
        read_headers(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"pickled weights \('pytorch_model.bin'\).*convert them to safetensors"):
        read_headers(tmp_path)


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "num_bytes", "message"),
    [
        ({"a": entry([2], 0, 8)}, 7, r"is truncated: its header describes 77 bytes, the file has 76"),
        ({"a": entry([2], 0, 8)}, 9, r"is corrupt: its header describes 77 bytes, the file has 78"),
        ({"a": entry([2], 0, 4)}, 4, r"'a' of shape \[2\] and dtype F32 takes 8 bytes, but .* \[0, 4\] hold 4"),
        ({"a": entry([2], 4, 12)}, 12, r"'a' starts at byte 74, but the one before ends at 70"),
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, 4, r"'b' starts at byte"),
        ({"a": entry([2], 0, 8, "F31")}, 8, r"'a' has the unknown dtype 'F31'; known: "),
        ({"a": entry([-1], 0, 4)}, 4, r"the header of 'a' must have dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32"}}, 0, r"the header of 'a' must have dtype, shape and data_offsets, got \{'dtype'"),
        ({"a": 3}, 0, r"the header of 'a' must have"),
        (b"[1]", 0, r"its header is not a JSON object"),
        (b"{", 0, r"its header is not JSON"),
        (b"[" * 100_000, 0, r"its header is not JSON"),
        (b"\xff\xff", 0, r"its header is not JSON"),
    ],
)
def test_headers_that_lie_are_refused(
    tmp_path: Path, header: dict[str, object] | bytes, num_bytes: int, message: str
) -> None:
    write_raw_shard(tmp_path / "model.safetensors", header, bytes(num_bytes))
    with pytest.raises(ValueError, match=message) as error:
        read_headers(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"it has 0 bytes, and the header's length alone takes 8"),
        (b"1234567", r"it has 7 bytes"),
        ((100).to_bytes(8, "little") + b"{}", r"its header should have 100 bytes, but the file has 10 in all"),
        ((2**63).to_bytes(8, "little") + b"{}", r"its header should have 9223372036854775808 bytes"),
    ],
)
def test_short_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_headers(tmp_path)


def test_every_truncation_of_a_file_is_noticed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.ones(3), "b": torch.ones(2, 2)})
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    for num_bytes in range(len(content)):
        file.write_bytes(content[:num_bytes])
        with pytest.raises(ValueError, match=r"truncated|no safetensors file"):
            read_headers(tmp_path)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": FIRST, "b": "model-3.safetensors"}, r"names the shard 'model-3.safetensors', which is not in"),
        (
            {"a": FIRST, "b": SECOND, "c": SECOND},
            r"lists 1 tensors that are in no shard: 'c'; 'c' should be in 'model-0",
        ),
        ({"b": SECOND, "a": SECOND}, r"lists 1 tensors that are in no shard: 'a'"),
        ({"a": SECOND, "b": FIRST}, r"says 'a' is in 'model-00002-of-00002.safetensors', but it is in 'model-00001-of"),
        ({"a": FIRST, "b": "../other.safetensors"}, r"'../other.safetensors'; a shard must be a .safetensors file"),
        ({"a": FIRST, "b": "pytorch_model.bin"}, r"'pytorch_model.bin'; a shard must be a .safetensors file"),
        ({"a": 1}, r"must be an object with a 'weight_map'"),
    ],
)
def test_an_index_that_disagrees_with_the_shards_is_refused(
    tmp_path: Path, weight_map: dict[str, str], message: str
) -> None:
    write_checkpoint(tmp_path, {"a": torch.ones(1)}, {"b": torch.ones(1)})
    assert read_index(tmp_path) == {"a": FIRST, "b": SECOND}
    write_index(tmp_path, weight_map)
    with pytest.raises(ValueError, match=message):
        read_headers(tmp_path)


def test_a_tensor_that_the_index_does_not_list_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.ones(1), "c": torch.ones(1)}, {"b": torch.ones(1)})
    write_index(tmp_path, {"a": FIRST, "b": SECOND})
    with pytest.raises(ValueError, match=r"does not list 1 tensors of its shards: 'c'; 'c' is in 'model-00001"):
        read_headers(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.ones(1), "c": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(ValueError, match=r"tensor 'a' is in two shards .*'model-00001.*model-00002"):
        read_headers(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, '{"weight_map": []}'])
def test_an_index_that_is_no_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index.json (is not JSON|must be an object)"):
        read_headers(tmp_path)


def test_same_name_mapping_is_the_identity() -> None:
    assert map_to_same_name("x.weight") == Destination("x.weight")
