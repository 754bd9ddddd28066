"""``argosy eval`` and ``argosy demo``: exact match, the report, the questions' file; the interval's arithmetic."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argosy.cli.eval import extract_answer, load_questions
from argosy.cli.main import main
from argosy.cli.score import Score, wilson_interval
from tests.helpers.fake_language_model import FakeLanguageModel, fake_terminal, written

QUESTIONS = [
    {"prompt": "1+1", "answer": "2", "category": "sum", "language": "en"},
    {"prompt": "2+2", "answer": "4", "category": "sum", "language": "zh"},
    {"prompt": "capital", "answer": "北京", "category": "fact", "language": "zh"},
    {"prompt": "bare", "answer": "yes"},
]
ANSWERS = {"1+1": "1+1 is\n#### 2", "2+2": "#### 5", "capital": " 北京\n", "bare": "#### no #### yes "}


def write_questions(path: Path, questions: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n\n" for item in questions), encoding="utf-8")
    return str(path)


def answer(prompt: str) -> str:
    return ANSWERS[prompt.removeprefix("<user>")]


def run_eval(tmp_path: Path, *arguments: str) -> tuple[int, str, FakeLanguageModel]:
    llm, terminal = FakeLanguageModel(answer, finish_order=lambda count: list(reversed(range(count)))), fake_terminal()
    questions = write_questions(tmp_path / "questions.jsonl", QUESTIONS)
    code = main(["eval", "--questions", questions, *arguments], build_llm=llm.build, terminal=terminal)
    return code, written(terminal.stdout), llm


def test_score_counts_exact_matches_after_the_last_mark(tmp_path: Path) -> None:
    code, stdout, llm = run_eval(tmp_path)
    assert code == 0
    assert stdout.splitlines()[-1] == "score 0.7500 (3 of 4), 95 % interval 0.301 to 0.954"
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in stdout.splitlines() if line.startswith("│")]
    assert rows == [
        ["all", "1", "1"],
        ["fact", "1", "1"],
        ["sum", "2", "1"],
        ["-", "1", "1"],
        ["en", "1", "1"],
        ["zh", "2", "1"],
    ]
    assert all(params.temperature == 0.0 for params in llm.seen_params)
    assert llm.seen_prompts[0] == "<user>1+1"


def test_completions_are_kept_in_the_order_of_the_questions(tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    run_eval(tmp_path, "--output", str(output))
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [record["index"] for record in records] == [0, 1, 2, 3]
    assert [record["is_correct"] for record in records] == [True, False, True, True]
    assert records[1]["completion"] == "#### 5"
    assert records[1]["extracted"] == "5"


@pytest.mark.parametrize(("fail_under", "code"), [("0.75", 0), ("0.76", 1)])
def test_fail_under_sets_the_exit_code(fail_under: str, code: int, tmp_path: Path) -> None:
    assert run_eval(tmp_path, "--fail-under", fail_under)[0] == code


def test_max_questions_asks_the_first_ones_only(tmp_path: Path) -> None:
    _, stdout, llm = run_eval(tmp_path, "--max-questions", "2")
    assert llm.seen_prompts == ["<user>1+1", "<user>2+2"]
    assert "(1 of 2)" in stdout


def test_refused_question_counts_as_wrong(tmp_path: Path) -> None:
    def refuse(prompt: str) -> str:
        raise ValueError("too long")

    terminal = fake_terminal()
    questions = write_questions(tmp_path / "q.jsonl", [{"prompt": "a", "answer": ""}])
    assert main(["eval", "--questions", questions], build_llm=FakeLanguageModel(refuse).build, terminal=terminal) == 0
    assert "1 questions were refused" in written(terminal.stdout)
    assert "score 0.0000 (0 of 1)" in written(terminal.stdout)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"prompt": "a"}', "line 1: Object missing required field `answer`"),
        ('\n{"prompt": "a", "answer": 5}', "line 2: Expected `str`, got `int`"),
        ('{"prompt": "a", "answer": "b", "reply": "c"}', "unknown field `reply`"),
        ("nonsense", "line 1: JSON is malformed"),
        ("\n", "has no questions"),
    ],
)
def test_broken_questions_are_refused_with_their_line(content: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="q.jsonl") as error:
        load_questions(str(path))
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    "arguments", [["--fail-under", "93"], ["--max-questions", "0"], ["--questions", "absent.jsonl"]]
)
def test_bad_eval_setting_is_a_user_error(arguments: list[str]) -> None:
    terminal = fake_terminal()
    assert main(["eval", *arguments], build_llm=FakeLanguageModel(answer).build, terminal=terminal) == 2


def test_answer_is_after_the_last_mark_or_everything() -> None:
    assert extract_answer("3+4=7\n#### 7") == "7"
    assert extract_answer("#### 1\n####2 ") == "2"
    assert extract_answer(" 孤舟蓑笠翁\n") == "孤舟蓑笠翁"


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("1+1=2\n#### 2</think>42", "42"),
        ("#### 9</think>steps\n#### 42", "42"),
        ("a</think>b</think> 42\n", "42"),
        ("no reasoning\n#### 42", "42"),
    ],
)
def test_reasoning_is_cut_off_before_the_answer_is_looked_for(completion: str, answer: str) -> None:
    assert extract_answer(completion, thinking=True) == answer


def test_thinking_judges_the_answer_and_not_the_reasoning(tmp_path: Path) -> None:
    llm, terminal = FakeLanguageModel(lambda prompt: "1+1=2\n#### 3</think>2"), fake_terminal()
    questions = write_questions(tmp_path / "q.jsonl", QUESTIONS[:1])
    assert main(["eval", "--questions", questions, "--thinking"], build_llm=llm.build, terminal=terminal) == 0
    assert llm.seen_prompts == ["<user>1+1<think>"]
    assert "(1 of 1)" in written(terminal.stdout)


def test_interrupted_eval_keeps_the_answers_it_has(tmp_path: Path) -> None:
    llm, terminal = (
        FakeLanguageModel(answer, finish_order=lambda count: [2, 0, 1, 3], interrupt_after=2),
        fake_terminal(),
    )
    questions, output = write_questions(tmp_path / "q.jsonl", QUESTIONS), tmp_path / "answers.jsonl"
    arguments = ["eval", "--questions", questions, "--output", str(output)]
    assert main(arguments, build_llm=llm.build, terminal=terminal) == 130
    assert [json.loads(line)["index"] for line in output.read_text(encoding="utf-8").splitlines()] == [0, 2]


@pytest.mark.parametrize(("num_correct", "num_questions"), [(187, 200), (1, 2), (3, 4), (40, 88)])
def test_wilson_bounds_are_the_shares_that_just_explain_the_score(num_correct: int, num_questions: int) -> None:
    """The definition: a true share p is in the interval if the score is within z standard errors, taken at p."""
    score = Score(num_correct, num_questions)
    for bound in wilson_interval(score):
        assert abs(score.share - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / num_questions))


def test_wilson_interval_is_closed_at_the_ends() -> None:
    assert wilson_interval(Score(0, 10)) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(Score(10, 10)) == pytest.approx((0.7225, 1.0), abs=1e-4)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_contains_the_share(counts: tuple[int, int]) -> None:
    score = Score(*counts)
    low, high = wilson_interval(score)
    assert 0.0 <= low <= score.share + 1e-12
    assert score.share - 1e-12 <= high <= 1.0


def test_demo_asks_shows_and_judges() -> None:
    built_in = {question.prompt: question.answer for question in load_questions(None)}

    def answer_well(prompt: str) -> str:
        return built_in.get(prompt.removeprefix("<user>"), "hello")

    terminal = fake_terminal()
    assert main(["demo"], build_llm=FakeLanguageModel(answer_well).build, terminal=terminal) == 0
    stdout = written(terminal.stdout)
    assert stdout.count("[right; prefill ") == 7
    assert "7 of 7 answers are right" in stdout
    for kind in ("gsm", "word_problems", "dates", "capitals", "translation", "poems", "needle"):
        assert f"Q ({kind}, " in stdout


def test_demo_of_a_broken_model_fails() -> None:
    terminal = fake_terminal()
    assert main(["demo"], build_llm=FakeLanguageModel(lambda prompt: "?").build, terminal=terminal) == 1
    assert "0 of 7 answers are right" in written(terminal.stdout)
