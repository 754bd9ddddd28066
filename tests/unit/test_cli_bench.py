"""``argosy bench`` and ``argosy validate``: what is printed, and when nothing may be."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from argosy.cli.bench import _required_agreement
from argosy.cli.code_version import read_commit
from argosy.cli.invocation import Invocation
from argosy.cli.main import main
from argosy.cli.speed import RequestSpeed, add_speeds, describe_speed
from argosy.cli.validate import ValidateOptions, run_validate
from argosy.config import EngineConfig
from argosy.sampling_params import SamplingParams
from tests.helpers.fake_language_model import FakeLanguageModel, fake_terminal, written

SMALL = ("--batch-sizes", "1", "3", "--input-tokens", "20", "--context-tokens", "10", "--output-tokens", "5")


def long_answer(prompt: str) -> str:
    return (prompt * 100)[:100]


def run_bench(llm: FakeLanguageModel, *arguments: str) -> tuple[int, str, str]:
    terminal = fake_terminal()
    code = main(["bench", *SMALL, "--repeats", "3", *arguments], build_llm=llm.build, terminal=terminal)
    return code, written(terminal.stdout), written(terminal.stderr)


@dataclass
class BatchDependentModel(FakeLanguageModel):
    """Wrong in the way that matters: a prompt's tokens depend on what runs beside it."""

    batch_size: int = field(default=0)

    def generate_as_finished(self, prompts, sampling_params):  # type: ignore[no-untyped-def]
        self.answer = long_answer if len(prompts) == 1 else (lambda prompt: prompt[:4] + "x" * 100)
        return super().generate_as_finished(prompts, sampling_params)


def test_bench_ends_with_one_json_line() -> None:
    code, stdout, _ = run_bench(FakeLanguageModel(long_answer))
    assert code == 0
    report = json.loads(stdout.splitlines()[-1])
    assert report["agreement"] == 1.0
    assert report["hardware"] == "a fake device"
    assert report["command"].startswith("argosy bench --batch-sizes 1 3")
    assert report["commit"]
    points = [(item["phase"], item["batch_size"]) for item in report["measurements"]]
    assert points == [("prefill", 1), ("prefill", 3), ("decode", 1), ("decode", 3)]
    # The fake's first token comes after 0.5 s and every later one takes 0.1 s.
    assert report["measurements"][3]["median_tok_s"] == pytest.approx(30.0)
    assert report["measurements"][3]["min_tok_s"] == pytest.approx(30.0)


def test_bench_shows_what_the_ranks_counted() -> None:
    _, shown, _ = run_bench(FakeLanguageModel(long_answer))
    text = " ".join(shown.split())
    assert "4 ranks sent tp 2.0 MB, ep 1.5 MB; agreeing on a step 250 us; dummy steps 20" in text
    assert "busiest replica 1.50 x the mean; busiest expert 4.00 x the mean in the worst layer" in text
    assert "busiest rank 2.00 x" in text


def test_bench_prompts_are_new_in_every_run_and_ordinary() -> None:
    llm = FakeLanguageModel(long_answer)
    run_bench(llm)
    measured = llm.seen_prompts[-(1 + 3) * 4 * 2 :]
    assert len(set(measured)) == len(measured)
    assert not any(chr(token) in prompt for token in llm.special_token_ids for prompt in measured)


def test_bench_prints_no_number_for_a_wrong_model() -> None:
    code, stdout, stderr = run_bench(BatchDependentModel(long_answer))
    assert code == 1
    assert stdout == ""
    # 1 + 3 rows of 16 tokens; the row alone agrees on all, the three in a batch on 4 each.
    assert "agree with those run alone on 0.438 of tokens; float32 needs 1" in stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--batch-sizes", "100"], "batch size 100 exceeds max_num_seqs (64)"),
        (["--batch-sizes", "0"], "batch_sizes must be positive"),
        (["--context-tokens", "1000"], "batch size 3 x context_tokens (1000) exceeds max_num_batched_tokens (2048)"),
        (["--repeats", "0"], "repeats must be at least 1, got 0; set --repeats"),
    ],
)
def test_impossible_bench_is_a_user_error(arguments: list[str], complaint: str) -> None:
    code, _, stderr = run_bench(FakeLanguageModel(long_answer), *arguments)
    assert code == 2
    assert complaint in stderr


@dataclass(frozen=True)
class Gate:
    name: str
    measured: float
    threshold: float | None
    passed: bool
    detail: str = "a detail"


@pytest.mark.parametrize(
    ("gates", "code", "last_line"),
    [
        ([Gate("cosine", 0.9995, 0.999, True), Gate("drift", 0.2, None, True)], 0, "2 of 2 gates passed"),
        ([Gate("cosine", 0.9, 0.999, False), Gate("drift", 0.2, None, True)], 1, "1 of 2 gates passed"),
        ([], 1, "0 of 0 gates passed"),
    ],
)
def test_validate_passes_only_if_every_gate_does(gates: Sequence[Gate], code: int, last_line: str) -> None:
    terminal = fake_terminal()
    invocation = Invocation(
        engine_config=EngineConfig(),
        sampling_params=SamplingParams(),
        terminal=terminal,
        build_llm=FakeLanguageModel(str.upper).build,
    )
    assert run_validate(ValidateOptions(), invocation, lambda config, options: gates) == code
    lines = written(terminal.stdout).splitlines()
    assert lines[-1] == last_line
    for gate in gates:
        row = next(line for line in lines if gate.name in line)
        assert f"{gate.measured:.6g}" in row
        assert ("yes" if gate.passed else "NO") in row
        assert ("reported" if gate.threshold is None else f"{gate.threshold:g}") in row


def test_impossible_validate_is_a_user_error() -> None:
    terminal = fake_terminal()
    assert main(["validate", "--prompt-tokens", "0"], terminal=terminal) == 2
    assert "prompt_tokens must be positive, got (0,); set --prompt-tokens" in written(terminal.stderr)


def test_speeds_are_sums_and_nothing_without_time() -> None:
    one = RequestSpeed(num_prefill_tokens=1000, prefill_s=0.5, num_decode_tokens=10, decode_s=1.0)
    two = RequestSpeed(num_prefill_tokens=1000, prefill_s=1.5, num_decode_tokens=50, decode_s=1.0)
    expected = "prefill 2,000 tokens, 1,000 tok/s; decode 60 tokens, 30 tok/s"
    assert describe_speed(add_speeds([one, two])) == expected
    assert describe_speed(one, 4).startswith(describe_speed(one).split(";")[0]) and "a rank" in describe_speed(one, 4)
    assert describe_speed(RequestSpeed()) == "prefill 0 tokens, - tok/s; decode 0 tokens, - tok/s"


def test_commit_outside_a_checkout_is_the_version(tmp_path: Path) -> None:
    assert read_commit(tmp_path).startswith("version ")


@pytest.mark.parametrize(
    ("number_format", "load_format", "expected"),
    (("float32", "auto", 1.0), ("float32, w8a8", "auto", 0.5), ("bfloat16", "auto", 0.5), ("bfloat16", "dummy", 0.0)),
)
def test_agreement_is_judged_by_what_is_rounded(
    number_format: str, load_format: Literal["auto", "dummy"], expected: float
) -> None:
    llm = FakeLanguageModel(long_answer, number_format=number_format)
    assert _required_agreement(llm, EngineConfig(load_format=load_format)) == expected
