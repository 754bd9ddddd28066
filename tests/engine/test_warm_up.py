"""After the warm-up no step compiles a kernel.

On a card that is pretended: the host's side of all launches, with Triton's own keys, at sizes at which a CPU is quick.
Needs Triton, and no card; on a card the engine itself is asked (``test_nothing_is_compiled_while_serving``).
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from argosy import LLM, SamplingParams
from argosy.assets import builtin_model_directory
from argosy.cache.cache_format import build_cache_format
from argosy.cache.rope import build_rotary_table
from argosy.config import choose_cache_dtypes
from argosy.distributed.ep_types import SINGLE_RANK_PLAN, ExchangePlan
from argosy.engine.build_rank import cache_dims, rotary_settings
from argosy.models.deepseek.config import ModelConfig, load_model_config
from argosy.models.deepseek.model import DeepseekV32Model
from argosy.quantization.checkpoint_format import CheckpointQuantization
from argosy.quantization.scheme import UNQUANTIZED
from argosy.runner.warm_up import Trial, WarmUpSizes, plan_warm_up, warm_up
from benchmarks.steps.loopback import loopback_mesh
from tests.helpers.pretended_card import Launches, pretend_card

# Heads of the real sizes, so that the kernels for Hopper are chosen; all else is small.
SETTINGS: dict[str, int] = {
    **{"num_hidden_layers": 2, "num_nextn_predict_layers": 0, "hidden_size": 256, "intermediate_size": 512},
    **{"moe_intermediate_size": 128, "num_attention_heads": 32, "num_key_value_heads": 32, "q_lora_rank": 128},
    **{"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    **{"index_n_heads": 32, "index_head_dim": 128, "index_topk": 256, "max_position_embeddings": 8192},
}
SIZES = WarmUpSizes(max_num_seqs=48, max_num_batched_tokens=600, max_model_len=5000, index_topk=256)
BLOCK_SIZE = 64
# Of weights, of the cache, and among how many ranks the experts are shared.
FORMATS = (
    ("w8a8", "auto", 4),
    *(pytest.param(each, marks=pytest.mark.slow) for each in (("w8a8", "auto", 1), ("fp8_block", "fp8", 1))),
    pytest.param(("none", "int8", 1), marks=pytest.mark.slow),
)
LOW_LATENCY_TOKENS = 64


@dataclass(frozen=True)
class Trials:
    """A model on a card that is not there."""

    model: DeepseekV32Model
    config: ModelConfig
    launches: Launches
    kv_cache_dtype: str

    def run(self, *trials: Trial) -> set[tuple[str, str]]:
        """What the steps ask for."""
        device = torch.device("cpu")
        self.launches.keys.clear()
        warm_up(
            self.model,
            build_cache_format(
                choose_cache_dtypes(self.kv_cache_dtype), cache_dims(self.config), torch.bfloat16, device
            ),
            build_rotary_table(rotary_settings(self.config), device),
            trials,
            block_size=BLOCK_SIZE,
            vocab_size=self.config.vocab_size,
            exchange_of=plan_exchange,
        )
        return set(self.launches.keys)


def plan_exchange(num_tokens: int) -> ExchangePlan:
    return ExchangePlan("low_latency" if num_tokens <= LOW_LATENCY_TOKENS else "high_throughput", num_tokens)


@pytest.fixture(scope="module", params=FORMATS, ids=lambda param: "-".join(map(str, param)))
def pretended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret or torch.cuda.is_available():
        pytest.skip("needs a Triton that compiles, and no card")
    kind, kv_cache_dtype, num_ranks = request.param
    published = json.loads((builtin_model_directory("argosy-tiny") / "config.json").read_text(encoding="utf-8"))
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(published | SETTINGS), encoding="utf-8")
    config = load_model_config(directory)
    quantization = UNQUANTIZED
    if kind != "none":
        quantization = CheckpointQuantization(kind=kind, has_ue8m0_scales=True)
    with pretend_card() as launches:
        mesh = loopback_mesh(num_ranks, config, torch.bfloat16, kind) if num_ranks > 1 else None
        model = DeepseekV32Model(config, torch.bfloat16, mesh, quantization=quantization).eval()
        yield Trials(model, config, launches, kv_cache_dtype)


@pytest.fixture(scope="module")
def warm(pretended: Trials) -> set[tuple[str, str]]:
    return pretended.run(*plan_warm_up(SIZES))


def draw_steps(seed: int, count: int) -> list[Trial]:
    """Steps that a server could meet: chunks of any length behind contexts of any length, decodes beside them."""
    rng = random.Random(seed)

    def draw_length(limit: int) -> int:
        return min(limit, int(2 ** rng.uniform(0, limit.bit_length())))

    steps = []
    for _ in range(count):
        num_decodes = rng.choice((0, draw_length(SIZES.max_num_seqs - 1)))
        decodes = [(draw_length(SIZES.max_model_len - 1), 1) for _ in range(num_decodes)]
        left, chunks = SIZES.max_num_batched_tokens - num_decodes, []
        for _ in range(rng.choice((1, 1, 2) if num_decodes == 0 else (0, 1, 2))):
            scheduled = 1 + draw_length(left - 1)
            if 1 < scheduled <= left and len(chunks) + num_decodes < SIZES.max_num_seqs:
                chunks.append((rng.choice((0, draw_length(SIZES.max_model_len - scheduled))), scheduled))
                left -= scheduled
        steps.append((*decodes, *chunks))
    return [step for step in steps if step]


def test_numbers_of_tokens_were_met(pretended: Trials, warm: set[tuple[str, str]]) -> None:
    for num_tokens in (*range(1, 70), *range(71, SIZES.max_num_batched_tokens + 1, 12)):
        assert pretended.run(((0, num_tokens),)) <= warm, num_tokens


def test_numbers_of_decodes_were_met(pretended: Trials, warm: set[tuple[str, str]]) -> None:
    for num_requests in range(1, SIZES.max_num_seqs + 1, 3):
        for computed in (40, SIZES.index_topk + 3):
            assert pretended.run(((computed, 1),) * num_requests) <= warm, (num_requests, computed)


def test_odd_steps_were_met(pretended: Trials, warm: set[tuple[str, str]]) -> None:
    for step in draw_steps(0, 40):
        assert pretended.run(step) <= warm, step


def test_the_pretended_card_tells_kernels_apart(pretended: Trials, warm: set[tuple[str, str]]) -> None:
    """Or the tests above would show nothing."""
    few, many = pretended.run(((0, 17),)), pretended.run(((0, 512),))
    assert few - many and many - few
    assert len({name for name, _ in warm}) >= 15


def test_the_warm_up_runs_every_trial_on_a_cpu_too() -> None:
    """Where nothing is compiled nobody asks for it, but it must run: with the progress that is shown."""
    llm = LLM(device="cpu", num_threads=1, dtype="float32", max_model_len=200, max_num_seqs=3, enforce_eager=True)
    runner, seen = llm.engine.runner, []
    trials = plan_warm_up(WarmUpSizes(max_num_seqs=3, max_num_batched_tokens=20, max_model_len=200, index_topk=64))
    warm_up(
        runner.model,
        runner.cache.format,
        runner.rotary,
        trials,
        block_size=64,
        vocab_size=100,
        exchange_of=lambda _: SINGLE_RANK_PLAN,
        on_trial=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i + 1, len(trials)) for i in range(len(trials))]
    assert not runner.cache.latent.any()
    assert llm.summarize_deployment().num_late_compilations == 0


@pytest.mark.cuda
@pytest.mark.timeout(900)
def test_nothing_is_compiled_while_serving() -> None:
    """Prompts and outputs of odd lengths, alone and together, below and above ``index_topk``."""
    llm = LLM(device="cuda", max_num_seqs=24, max_num_batched_tokens=1024, max_model_len=3000)
    rng = random.Random(0)
    for num_prompts in (1, 3, 24, 40):
        prompts = [[rng.randrange(10, 3000) for _ in range(rng.randrange(1, 2500))] for _ in range(num_prompts)]
        params = [SamplingParams(max_tokens=rng.randrange(1, 60), ignore_eos=True) for _ in prompts]
        llm.generate(prompts, params, use_tqdm=False)
    assert llm.summarize_deployment().num_late_compilations == 0
