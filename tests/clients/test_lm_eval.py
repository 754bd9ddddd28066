"""lm-evaluation-harness against the real server: the scores and log probabilities that the engine has offline.

The tasks are in ``tasks/``; nothing is downloaded. lm-eval is no part of the extra ``test``: it brings half a gigabyte
(pyarrow, scipy, pandas). ``make clients`` installs the extra ``clients`` and runs this file.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from argosy import LLM, RequestOutput, SamplingParams
from tests.server.test_serve import Served, start

ROOT = Path(__file__).parents[2]
QUESTIONS = Path("tests/clients/tasks/questions.jsonl")
CHOICES = Path("tests/clients/tasks/choices.jsonl")

pytestmark = [
    pytest.mark.processes,
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed; run `make clients`"),
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = start()
    yield server
    assert server.stop() == 0, "".join(server.lines[-20:])


@pytest.fixture(scope="module")
def report(served: Served, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What lm-eval says of both tasks: ``results``, and ``samples`` by task."""
    directory = tmp_path_factory.mktemp("lm_eval")
    model_args = f"model=argosy-tiny,base_url={served.url}/v1/completions,num_concurrent=8,max_length=1024"
    arguments = ["--model", "local-completions", "--model_args", model_args, "--log_samples"]
    arguments += ["--include_path", "tests/clients/tasks", "--tasks", "argosy_questions,argosy_choices"]
    arguments += ["--output_path", str(directory)]
    cache = {"HF_HOME": str(directory / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", "lm_eval", "run", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | cache, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Using remote tokenizer" in done.stderr + done.stdout  # /tokenize and /tokenizer_info are what it expects
    (results,) = directory.rglob("results_*.json")
    samples = {}
    for task in ("argosy_questions", "argosy_choices"):
        (path,) = directory.rglob(f"samples_{task}_*.jsonl")
        samples[task] = sorted(map(json.loads, path.read_text().splitlines()), key=lambda each: each["doc_id"])
    return json.loads(results.read_text()) | {"samples": samples}


def test_questions_have_the_score_of_argosy_eval(report: dict, tmp_path: Path) -> None:
    answers_path = tmp_path / "answers.jsonl"
    command = [sys.executable, "-m", "argosy", "eval", "--questions", str(QUESTIONS), "--max-tokens", "96"]
    command += ["--output", str(answers_path), "--num-threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"score (\S+) \((\d+) of 24\)", done.stdout)
    assert found, done.stdout
    assert report["results"]["argosy_questions"]["exact_match,last"] == pytest.approx(int(found[2]) / 24)
    assert 0 < int(found[2]) < 24  # some answers are wrong, so the score tells of more than that everything is right
    answers = [json.loads(line) for line in answers_path.read_text().splitlines()]
    samples = report["samples"]["argosy_questions"]
    assert [sample["resps"][0][0] for sample in samples] == [answer["completion"] for answer in answers]
    assert [sample["filtered_resps"][0] for sample in samples] == [answer["extracted"] for answer in answers]


def test_choices_have_the_log_probabilities_of_the_engine(report: dict) -> None:
    questions = [json.loads(line) for line in (ROOT / CHOICES).read_text().splitlines()]
    num_right = 0
    with LLM(num_threads=1) as llm:
        for question, sample in zip(questions, report["samples"]["argosy_choices"], strict=True):
            expected = judge_choices(llm, question["prompt"], question["choices"])
            told = [(float(score), is_greedy in (True, "True")) for ((score, is_greedy),) in sample["resps"]]
            assert [score for score, _ in told] == pytest.approx([score for score, _ in expected], abs=1e-3)
            assert [is_greedy for _, is_greedy in told] == [is_greedy for _, is_greedy in expected]
            scores = [score for score, _ in expected]
            num_right += scores.index(max(scores)) == question["answer"]
    assert report["results"]["argosy_choices"]["acc,none"] == pytest.approx(num_right / len(questions))


def judge_choices(llm: LLM, question: str, choices: list[str]) -> list[tuple[float, bool]]:
    """Of each choice, the sum of its tokens' log probabilities, and whether each is the likeliest."""
    context = llm.encode_chat([{"role": "user", "content": question}])
    prompts = [context + llm.tokenizer.encode(choice) for choice in choices]
    judged = []
    for result in llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)):
        assert isinstance(result, RequestOutput) and result.prompt_logprobs is not None
        entries = [entry for entry in result.prompt_logprobs[len(context) :] if entry is not None]
        judged.append((sum(entry.logprob for entry in entries), all(entry.rank == 1 for entry in entries)))
    return judged
