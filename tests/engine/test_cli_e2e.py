"""The command line on the built-in model: every command gives what the Python interface gives, and Ctrl-C is clean.

The model is loaded once for all commands that run in this process.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from argosy import LLM, EngineConfig, SamplingParams
from argosy.cli.eval import load_questions
from argosy.cli.main import main
from tests.helpers.fake_language_model import fake_terminal, written

pytestmark = pytest.mark.e2e
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
QUESTIONS = ["印度尼西亚的首都是哪里？", "Calculate 19427-3078."]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("argosy-tiny")


def run(llm: LLM, arguments: list[str], stdin: str = "") -> tuple[int, str, str]:
    terminal = fake_terminal(stdin)
    code = main(arguments, build_llm=lambda config: llm, terminal=terminal)
    return code, written(terminal.stdout), written(terminal.stderr)


def ask(llm: LLM, question: str) -> str:
    (output,) = llm.chat([{"role": "user", "content": question}], GREEDY)
    return output.outputs[0].text


def test_generate_equals_the_python_interface(llm: LLM) -> None:
    code, stdout, _ = run(llm, ["generate", QUESTIONS[1], "--chat", "--max-tokens", "24"])
    assert (code, stdout) == (0, ask(llm, QUESTIONS[1]) + "\n")


def test_bad_lines_fail_alone_and_the_rest_is_right(llm: LLM) -> None:
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    lines = [
        {"messages": messages[0]},
        {"prompt_token_ids": [llm.vocab_size]},
        {"prompt": ""},
        {"prompt": "a", "stop_token_ids": [10**6]},
        {"prompt_token_ids": [5] * 5000},
        {"messages": [{"role": "wizard", "content": "?"}]},
        {"messages": messages[1]},
    ]
    stdin = "".join(json.dumps(line) + "\n" for line in lines)
    code, stdout, stderr = run(llm, ["generate", "--input", "-", "--max-tokens", "24"], stdin)
    records = [json.loads(line) for line in stdout.splitlines()]
    assert code == 1
    assert "5 of 7 lines failed" in stderr
    assert [record["index"] for record in records] == list(range(7))
    assert [records[0]["text"], records[6]["text"]] == [ask(llm, question) for question in QUESTIONS]
    for number, complaint in (
        (1, "prompt_token_ids[0]"),
        (2, "empty"),
        (3, "stop_token_ids[0]"),
        (4, "5000 tokens"),
        (5, "wizard"),
    ):
        assert records[number]["error"].startswith(f"line {number + 1}: ")
        assert complaint in records[number]["error"]
    usage = records[0]["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + len(records[0]["token_ids"])


def test_chat_in_a_pipe_continues_the_conversation(llm: LLM) -> None:
    code, stdout, stderr = run(llm, ["chat", "--max-tokens", "24"], "\n".join(QUESTIONS))
    first = ask(llm, QUESTIONS[0])
    conversation = [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    (second,) = llm.chat(conversation, GREEDY)
    assert (code, stdout) == (0, f"{first}\n{second.outputs[0].text}\n")
    assert stderr.count("tok/s]") == 2


def test_eval_judges_the_completions_of_the_model(llm: LLM, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    arguments = ["eval", "--max-questions", "3", "--max-tokens", "256", "--output", str(output)]
    code, stdout, _ = run(llm, arguments)
    answers = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert code == 0
    assert f"({sum(answer['is_correct'] for answer in answers)} of 3)" in stdout
    for question, answer in zip(load_questions(None), answers, strict=False):
        (alone,) = llm.chat(
            [{"role": "user", "content": question.prompt}], SamplingParams(temperature=0.0, max_tokens=256)
        )
        assert answer["completion"] == alone.outputs[0].text


def test_bench_measures_a_correct_engine(llm: LLM) -> None:
    small = ["--batch-sizes", "1", "3", "--input-tokens", "96", "--output-tokens", "4", "--repeats", "1"]
    code, stdout, stderr = run(llm, ["bench", *small])
    assert (code, stderr) == (0, "")
    report = json.loads(stdout.splitlines()[-1])
    assert report["agreement"] == 1.0
    assert all(item["median_tok_s"] > 0 for item in report["measurements"])


def test_thinking_shows_the_answer_apart_from_its_reasoning(llm: LLM) -> None:
    arguments = ["chat", "--thinking", "--max-tokens", "64"]
    code, stdout, stderr = run(llm, arguments, "Calculate 17+25.")
    (output,) = llm.chat(
        [{"role": "user", "content": "Calculate 17+25."}], SamplingParams(temperature=0.0, max_tokens=64), thinking=True
    )
    reasoning, mark, answer = output.outputs[0].text.partition("</think>")
    assert mark, "the model should reason before it answers"
    assert (code, stdout) == (0, answer + "\n")
    assert stderr.startswith(reasoning + "\n[prefill ")


def test_reader_that_leaves_ends_the_command_quietly(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "x", "max_tokens": 2}\n' * 3, encoding="utf-8")
    command = [sys.executable, "-m", "argosy", "generate", "--input", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1
    process.stderr.close()


def test_settings_that_cannot_work_are_one_line(tmp_path: Path) -> None:
    for arguments, complaint in (
        (["--model", str(tmp_path / "absent")], "no such model"),
        (["--max-model-len", "100000"], "max_model_len (100000)"),
        (["--model", str(tmp_path)], "config.json"),
    ):
        terminal = fake_terminal()
        code = main(["generate", "hi", *arguments], build_llm=_load, terminal=terminal)
        assert code == 2, written(terminal.stderr)
        assert complaint in written(terminal.stderr)
        assert written(terminal.stderr).count("\n") == 1


def _load(config: EngineConfig) -> LLM:
    return LLM.from_config(config)


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_keeps_what_was_finished(signal_number: int, code: int, tmp_path: Path) -> None:
    lines = [{"prompt": "x", "max_tokens": 2 if number == 0 else 3000, "ignore_eos": True} for number in range(8)]
    input_path, output_path = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    input_path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    command = [sys.executable, "-m", "argosy", "generate", "--input", str(input_path), "--output", str(output_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline_s = time.monotonic() + 90
    while not (output_path.exists() and output_path.read_bytes()) and time.monotonic() < deadline_s:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal_number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert stderr == "argosy: interrupted: 1 of 8 results written\n"
    (record,) = [json.loads(line) for line in output_path.read_text(encoding="utf-8").splitlines()]
    assert (record["index"], len(record["token_ids"])) == (0, 2)
