"""``argosy generate``: one prompt, files of JSON lines, bad lines, order, interruption."""

import json
from pathlib import Path

import msgspec
import pytest

from argosy.cli.main import main
from argosy.cli.prompt_lines import parse_prompt_line
from argosy.cli.result_lines import build_result_line
from argosy.config import EngineConfig
from argosy.messages import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprobs
from argosy.sampling_params import SamplingParams
from tests.helpers.fake_language_model import FakeLanguageModel, fake_terminal, written

FLAGS = SamplingParams(temperature=0.0, max_tokens=256)


def run_lines(
    lines: list[object] | bytes, llm: FakeLanguageModel, *arguments: str
) -> tuple[int, list[dict[str, object]], str]:
    """Exit code, output records and stderr of ``argosy generate --input -``."""
    raw = lines if isinstance(lines, bytes) else "".join(f"{_as_line(line)}\n" for line in lines).encode()
    terminal = fake_terminal(raw)
    code = main(["generate", "--input", "-", *arguments], build_llm=llm.build, terminal=terminal)
    records = [json.loads(line) for line in written(terminal.stdout).splitlines()]
    return code, records, written(terminal.stderr)


def _as_line(line: object) -> str:
    return line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)


def test_prompt_prints_its_completion_only() -> None:
    llm, terminal = FakeLanguageModel(str.upper), fake_terminal()
    assert main(["generate", "hello 你好"], build_llm=llm.build, terminal=terminal) == 0
    assert written(terminal.stdout) == "HELLO 你好\n"
    assert written(terminal.stderr) == ""


def test_prompt_with_chat_goes_through_the_encoding() -> None:
    llm = FakeLanguageModel(str.upper)
    assert main(["generate", "hi", "--chat"], build_llm=llm.build, terminal=fake_terminal()) == 0
    assert llm.seen_prompts == ["<user>hi"]


def test_several_completions_of_a_prompt_are_separated() -> None:
    llm, terminal = FakeLanguageModel(str.upper), fake_terminal()
    assert main(["generate", "hi", "--n", "2"], build_llm=llm.build, terminal=terminal) == 0
    assert written(terminal.stdout) == "HI\n---\nHI\n"


def test_refused_prompt_is_a_user_error() -> None:
    def refuse(prompt: str) -> str:
        raise ValueError("the prompt has 9 tokens, but max_model_len is 4")

    llm, terminal = FakeLanguageModel(refuse), fake_terminal()
    assert main(["generate", "hi"], build_llm=llm.build, terminal=terminal) == 2
    assert written(terminal.stderr) == "argosy: error: the prompt has 9 tokens, but max_model_len is 4\n"


@pytest.mark.parametrize("arguments", [["generate"], ["generate", "hi", "--input", "-"]])
def test_prompt_and_input_exclude_each_other(arguments: list[str]) -> None:
    terminal = fake_terminal()
    assert main(arguments, build_llm=FakeLanguageModel(str.upper).build, terminal=terminal) == 2
    assert "give either a PROMPT or --input" in written(terminal.stderr)


def test_lines_of_every_kind_give_records_in_input_order() -> None:
    llm = FakeLanguageModel(str.upper, finish_order=lambda count: list(reversed(range(count))))
    lines = [
        {"prompt": "一 a"},
        {"messages": [{"role": "user", "content": "b"}]},
        "",
        {"prompt_token_ids": [99, 100]},
    ]
    code, records, stderr = run_lines(lines, llm)
    assert code == 0
    assert [record["index"] for record in records] == [0, 1, 2]
    assert [record["text"] for record in records] == ["一 A", "<USER>B", "CD"]
    assert records[2] == {
        "index": 2,
        "text": "CD",
        "token_ids": [67, 68],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4},
    }
    assert stderr == ""


def test_sampling_fields_of_a_line_replace_the_flags() -> None:
    llm = FakeLanguageModel(str.upper)
    lines = [{"prompt": "a", "max_tokens": 1, "stop": "x", "seed": 7, "logit_bias": {"5": 1}}, {"prompt": "b"}]
    code, _, _ = run_lines(lines, llm, "--top-k", "3", "--max-tokens", "9")
    assert code == 0
    flags = SamplingParams(temperature=0.0, top_k=3, max_tokens=9)
    own = SamplingParams(temperature=0.0, top_k=3, max_tokens=1, stop=("x",), seed=7, logit_bias={5: 1})
    assert llm.seen_params == [own, flags]


def test_several_completions_of_a_line_are_one_record() -> None:
    code, records, _ = run_lines([{"prompt": "ab", "n": 2}], FakeLanguageModel(str.upper))
    assert code == 0
    completion = {"text": "AB", "token_ids": [65, 66], "finish_reason": "stop"}
    usage = {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}
    assert records == [{"index": 0, "outputs": [completion, completion], "usage": usage}]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("not json", "not valid JSON"),
        ('{"prompt": "a"', "not valid JSON"),
        ("[1]", "a line must be a JSON object, got [1]"),
        ('{"prompt": "\\ud800"}', "not valid JSON"),
        ("[" * 100000, "not valid JSON"),
        ({}, "exactly one of prompt, messages, prompt_token_ids; found none"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "found prompt and prompt_token_ids"),
        ({"prompt": 5}, "prompt must be a string, got 5"),
        ({"prompt": "a", "warmth": 1}, "unknown field 'warmth'"),
        ({"prompt": "a", "temperature": -1}, "temperature must be in [0, 100], got -1"),
        ({"prompt": "a", "temperature": "hot"}, "temperature must be in [0, 100], got 'hot'"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens must be an integer"),
        ({"prompt": "a", "ignore_eos": "yes"}, "ignore_eos must be true or false, got 'yes'"),
        ({"prompt": "a", "stop": 5}, "stop must be a list, got 5"),
        ({"prompt": "a", "stop_token_ids": "5"}, "stop_token_ids must be a list, got '5'"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias has the key 'x'"),
        ({"prompt": "a", "logit_bias": [1]}, "logit_bias must be an object"),
        ({"prompt": "a", "logit_bias": {"1": "much"}}, "logit_bias[1] must be in [-100, 100], got 'much'"),
        ({"prompt": "a", "thinking": True}, "thinking goes with messages, not with prompt"),
        ({"prompt_token_ids": [1, "2"]}, "prompt_token_ids must be a list of integers"),
        ({"prompt_token_ids": [True]}, "prompt_token_ids must be a list of integers"),
        ({"messages": []}, "messages must be a non-empty list of objects"),
        ({"messages": [{"role": "user", "content": "a"}], "thinking": 1}, "thinking must be true or false, got 1"),
        ({"messages": [{"role": "nobody", "content": "a"}]}, "role must be one of"),
        ({"prompt": "too long"}, "too long"),
    ],
)
def test_bad_line_fails_alone_with_its_line_number(line: object, complaint: str) -> None:
    def answer(prompt: str) -> str:
        if "too long" in prompt:
            raise ValueError("too long")
        return prompt.upper()

    code, records, stderr = run_lines(["", {"prompt": "a"}, line, {"prompt": "b"}], FakeLanguageModel(answer))
    assert code == 1
    assert [record["index"] for record in records] == [0, 1, 2]
    assert [records[0]["text"], records[2]["text"]] == ["A", "B"]
    assert set(records[1]) == {"index", "error"}
    assert records[1]["error"].startswith("line 3: ")
    assert complaint in records[1]["error"]
    assert "1 of 3 lines failed" in stderr


def test_line_that_is_not_utf8_fails_alone() -> None:
    raw = b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "\xff"}\n{"prompt": "b"}'
    code, records, _ = run_lines(raw, FakeLanguageModel(str.upper))
    assert code == 1
    assert [record.get("text") for record in records] == ["A", None, "B"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_input_without_lines_is_a_user_error(content: bytes) -> None:
    code, records, stderr = run_lines(content, FakeLanguageModel(str.upper))
    assert (code, records) == (2, [])
    assert stderr.startswith("argosy: error: --input - has no lines")


@pytest.mark.parametrize("command", [["generate", "hi"], ["eval"]])
def test_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    command: list[str], tmp_path: Path
) -> None:
    def load(config: EngineConfig) -> FakeLanguageModel:
        raise AssertionError("loaded")

    for path, complaint in ((tmp_path / "absent" / "x", "there is no directory"), (tmp_path, "it is a directory")):
        terminal = fake_terminal()
        assert main([*command, "--output", str(path)], build_llm=load, terminal=terminal) == 2
        assert complaint in written(terminal.stderr)


def test_interruption_keeps_what_was_finished() -> None:
    llm = FakeLanguageModel(str.upper, finish_order=lambda count: [0, 3, 1, 2], interrupt_after=2)
    code, records, stderr = run_lines([{"prompt": name} for name in "abcd"], llm)
    assert code == 130
    assert [(record["index"], record["text"]) for record in records] == [(0, "A"), (3, "D")]
    assert "interrupted: 2 of 4 results written" in stderr


def test_results_are_written_while_others_still_run(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    num_lines_seen = []

    def answer(prompt: str) -> str:
        num_lines_seen.append(len(output.read_bytes().splitlines()))
        return prompt

    input_file = tmp_path / "in.jsonl"
    input_file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n', encoding="utf-8")
    arguments = ["generate", "--input", str(input_file), "--output", str(output)]
    assert main(arguments, build_llm=FakeLanguageModel(answer).build, terminal=fake_terminal()) == 0
    assert num_lines_seen == [0, 1, 2]


def test_prompt_with_output_writes_a_record(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    arguments = ["generate", "hi", "--output", str(output)]
    assert main(arguments, build_llm=FakeLanguageModel(str.upper).build, terminal=fake_terminal()) == 0
    assert json.loads(output.read_text(encoding="utf-8"))["text"] == "HI"


def test_output_may_not_be_the_input(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n', encoding="utf-8")
    terminal = fake_terminal()
    arguments = ["generate", "--input", str(path), "--output", str(tmp_path / "." / "in.jsonl")]
    assert main(arguments, build_llm=FakeLanguageModel(str.upper).build, terminal=terminal) == 2
    assert "is the input file" in written(terminal.stderr)
    assert path.read_text(encoding="utf-8") == '{"prompt": "a"}\n'


@pytest.mark.parametrize("flag", ["--input", "--output"])
def test_file_that_cannot_be_opened_is_a_user_error(flag: str, tmp_path: Path) -> None:
    terminal = fake_terminal('{"prompt": "a"}')
    path = str(tmp_path / "absent" / "file.jsonl")
    arguments = ["generate", "--input", "-", "--output", path] if flag == "--output" else ["generate", "--input", path]
    assert main(arguments, build_llm=FakeLanguageModel(str.upper).build, terminal=terminal) == 2
    assert written(terminal.stderr).startswith(f"argosy: error: {flag} {path} cannot be ")


def test_null_clears_an_optional_setting() -> None:
    line = parse_prompt_line(b'{"prompt": "a", "max_tokens": null, "stop": null}', FLAGS)
    assert line.sampling_params == SamplingParams(temperature=0.0, max_tokens=None)


@pytest.mark.parametrize("num_completions", [1, 2])
def test_prompt_logprobs_are_in_the_line_and_nothing_where_nobody_asked(num_completions: int) -> None:
    assert parse_prompt_line(b'{"prompt": "a", "prompt_logprobs": 2}', FLAGS).sampling_params.prompt_logprobs == 2
    told = [None, TokenLogprobs(7, -0.5, 2, [9], [-0.25])]
    completions = [CompletionOutput(i, "a", [5], "length") for i in range(num_completions)]
    output = RequestOutput("r", None, [6, 7], completions, True, RequestMetrics(0.0), prompt_logprobs=told)
    line = json.loads(msgspec.json.encode(build_result_line(3, output)))
    entry = {"token_id": 7, "logprob": -0.5, "rank": 2, "top_token_ids": [9], "top_logprobs": [-0.25]}
    assert line["prompt_logprobs"] == [None, entry]
    output.prompt_logprobs = None
    assert "prompt_logprobs" not in json.loads(msgspec.json.encode(build_result_line(3, output)))
