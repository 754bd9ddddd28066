"""How far W8A8 and FP8 blocks are from the model's own dtype: per linear, per expert, and at the end."""

from pathlib import Path

import pytest
import torch

from argosy.assets import builtin_model_directory
from argosy.cache.rope import build_rotary_table
from argosy.engine.build_rank import rotary_settings
from argosy.engine.tokenizer import Tokenizer
from argosy.models.deepseek.config import ModelConfig
from argosy.models.deepseek.model import DeepseekV32Model
from argosy.quantization.checkpoint_format import CheckpointQuantization
from argosy.validation.probe import ModelProbe
from tests.helpers.models import LoadedModel, load_model
from tests.helpers.quantized_twin import FP8, W8A8, build_quantized_twin, compare_modules, cosine
from tests.helpers.real_width import NUM_TOKENS, load_real_width_config, save_real_width_config
from tests.helpers.tolerance import FP8_MODULE_COSINE, QUANTIZED_FINAL_COSINE, W8A8_MODULE_COSINE, W8A8_TIE

PROMPTS = (
    "Emma has 12 apples and gives 5 of them to her brother. How many apples does she keep? Answer with the number.",
    "The capital of France is Paris. The river that flows through it is",
    "A train leaves at 9:15 and arrives at 11:40. How many minutes does the journey take?",
)
MODULE_COSINE = {"w8a8": W8A8_MODULE_COSINE, "fp8_block": FP8_MODULE_COSINE}
FORMATS = pytest.mark.parametrize("quantization", [W8A8, FP8], ids=["w8a8", "fp8_block"])


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model(builtin_model_directory("argosy-tiny"))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = Tokenizer.from_directory(builtin_model_directory("argosy-tiny"))
    return [tokenizer.encode_prompt(prompt) for prompt in PROMPTS]


def probe_of(model: DeepseekV32Model, config: ModelConfig) -> ModelProbe:
    return ModelProbe(model, config, build_rotary_table(rotary_settings(config), torch.device("cpu")))


@FORMATS
def test_linears_and_experts_of_the_built_in_model_stay_close(
    tiny: LoadedModel, prompts: list[list[int]], quantization: CheckpointQuantization
) -> None:
    twin = build_quantized_twin(tiny.model, tiny.config, quantization)
    # Twice the first: more tokens than plain experts take unsorted.
    cosines = compare_modules(tiny.model, twin, lambda: tiny.probe.hidden_states([prompts[0] * 2], 2048))
    assert "model.layers.0.self_attn.o_proj" in cosines
    worst = min(cosines, key=lambda name: cosines[name])
    assert cosines[worst] >= MODULE_COSINE[quantization.kind], worst


@FORMATS
def test_final_hidden_states_of_the_built_in_model_stay_close(
    tiny: LoadedModel, prompts: list[list[int]], quantization: CheckpointQuantization
) -> None:
    twin = build_quantized_twin(tiny.model, tiny.config, quantization)
    hidden = probe_of(twin, tiny.config).hidden_states(prompts, 2048)
    expected = tiny.probe.hidden_states(prompts, 2048)
    assert cosine(torch.cat(hidden), torch.cat(expected)) >= QUANTIZED_FINAL_COSINE


def test_what_is_quantised_in_the_built_in_model(tiny: LoadedModel) -> None:
    twin = build_quantized_twin(tiny.model, tiny.config, W8A8)
    int8 = {name.split(".", 3)[3] for name, tensor in twin.state_dict().items() if tensor.dtype == torch.int8}
    assert int8 == {
        "self_attn.q_a_proj.weight",
        "self_attn.q_b_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
        "self_attn.o_proj.weight",
        "self_attn.indexer.wq_b.weight",
        "self_attn.indexer.wk.weight",
        "mlp.gate_up_proj.weight",
        "mlp.down_proj.weight",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
        "mlp.shared_experts.gate_up_proj.weight",
        "mlp.shared_experts.down_proj.weight",
    }


@pytest.mark.parametrize("chunk_size", [1, 5, 2048])
def test_w8a8_tokens_do_not_depend_on_how_a_prompt_is_cut(
    tiny: LoadedModel, prompts: list[list[int]], chunk_size: int
) -> None:
    """Linears and experts are exact, so what remains is what float32 attention differs by, and what roundings to 8 bits
    make of that: a tie may turn."""
    twin = build_quantized_twin(tiny.model, tiny.config, W8A8)
    probe = probe_of(twin, tiny.config)
    for whole, cut in zip(probe.logits(prompts, 2048), probe.logits(prompts, chunk_size), strict=True):
        chosen = cut.argmax(dim=1, keepdim=True)
        gaps = whole.amax(dim=1) - whole.gather(1, chosen).squeeze(1)
        assert gaps.max() <= W8A8_TIE
        assert (gaps > 0).sum() <= 1


@pytest.mark.parametrize(
    "quantization",
    [
        pytest.param(W8A8, id="w8a8"),
        pytest.param(FP8, id="fp8_block", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def test_one_layer_at_real_widths_stays_close(tmp_path: Path, quantization: CheckpointQuantization) -> None:
    save_real_width_config(tmp_path)
    config = load_real_width_config(tmp_path)
    plain = DeepseekV32Model(config, torch.bfloat16)
    _draw_weights(plain)
    twin = build_quantized_twin(plain, config, quantization)
    hidden_in = torch.randn(NUM_TOKENS, 7168, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected: list[torch.Tensor] = []
    plain_probe = probe_of(plain, config)
    cosines = compare_modules(plain, twin, lambda: expected.append(plain_probe.layer_output(0, hidden_in)))
    out = probe_of(twin, config).layer_output(0, hidden_in)
    worst = min(cosines, key=lambda name: cosines[name])
    assert cosines[worst] >= MODULE_COSINE[quantization.kind], worst
    assert cosine(out - hidden_in, expected[0] - hidden_in) >= QUANTIZED_FINAL_COSINE


def _draw_weights(model: DeepseekV32Model) -> None:
    """Normal, of variance 1 / in_features, from one pool of numbers: drawing each would take minutes. Norms are 1."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2**22 + 1, generator=generator)
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if "bias" in name else 1.0)
                continue
            for matrix in parameter if parameter.dim() == 3 else [parameter]:
                _fill_matrix(matrix, pool, generator)


def _fill_matrix(matrix: torch.Tensor, pool: torch.Tensor, generator: torch.Generator) -> None:
    for rows in matrix.split(128):
        start = int(torch.randint(len(pool) - rows.numel(), (1,), generator=generator))
        rows.copy_(pool[start : start + rows.numel()].view(rows.shape) * matrix.shape[1] ** -0.5)
