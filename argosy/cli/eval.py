"""``argosy eval``: exact match on a file of questions, greedy, through the chat encoding.

One JSON object a line: ``prompt``, ``answer``, and optionally ``category`` and ``language``. The completion's text
after its last ``####``, or all of it, trimmed, must equal the answer; with ``--thinking`` only what follows the last
``</think>`` counts, or all of it where there is none. A question that the engine refuses (too long) counts as wrong.
Invariant: the score's denominator is the number of questions in the file.
"""

import os
from contextlib import closing
from dataclasses import dataclass
from importlib import resources

import msgspec
from rich.table import Table

from argosy.cli.files import check_writable, open_for_writing, read_lines
from argosy.cli.invocation import EXIT_FAILED, EXIT_OK, Invocation
from argosy.cli.language_model import LanguageModel, Prompt
from argosy.cli.reasoning import strip_reasoning
from argosy.cli.result_lines import OrderedLineWriter
from argosy.cli.score import Score, group_scores, wilson_interval
from argosy.cli.terminal import Terminal, show_progress
from argosy.messages import RequestOutput
from argosy.sampling_params import SamplingParams

ANSWER_MARK = "####"
BUILT_IN_QUESTIONS = "questions.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalOptions:
    """Score a model on questions with exact answers."""

    questions: str | None = None  # JSON lines with prompt, answer, category, language; None = the built-in held-out set
    output: str | None = None  # write every completion as a JSON line to this file
    max_tokens: int = 512  # at most this many output tokens a question
    max_questions: int | None = None  # ask only this many, from the start of the file
    thinking: bool = False  # let the model reason before it answers
    fail_under: float | None = None  # exit with 1 if the score, in [0, 1], is below this
    debug: bool = False  # show tracebacks

    def __post_init__(self) -> None:
        if self.fail_under is not None and not 0.0 <= self.fail_under <= 1.0:
            raise ValueError(f"fail_under must be in [0, 1], got {self.fail_under}; set --fail-under to 0.93, say")
        if self.max_questions is not None and self.max_questions < 1:
            raise ValueError(f"max_questions must be at least 1, got {self.max_questions}; set --max-questions")


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prompt: str
    answer: str
    category: str = "all"
    language: str = "-"


class Answer(msgspec.Struct, frozen=True):
    """One line of ``--output``."""

    index: int
    prompt: str
    answer: str
    category: str
    language: str
    completion: str
    extracted: str
    is_correct: bool
    finish_reason: str | None = None
    error: str | None = None


def run_eval(options: EvalOptions, invocation: Invocation) -> int:
    questions = load_questions(options.questions)[: options.max_questions]
    sampling_params = SamplingParams(temperature=0.0, max_tokens=options.max_tokens)
    check_writable("--output", options.output)
    llm = invocation.load_llm()
    with open_for_writing("--output", options.output or os.devnull) as stream:
        writer = OrderedLineWriter(stream)
        try:
            answers = ask_questions(
                llm, questions, sampling_params, invocation.terminal, writer, thinking=options.thinking
            )
        except KeyboardInterrupt:
            writer.write_rest()
            raise
    score = Score.of(answer.is_correct for answer in answers)
    _print_report(answers, score, invocation.terminal)
    return EXIT_FAILED if options.fail_under is not None and score.share < options.fail_under else EXIT_OK


def load_questions(path: str | None) -> list[Question]:
    """From a file, or the held-out questions that come with the package.

    Raises:
        ValueError: naming the file, the line and what is wrong with it.
    """
    name = path or f"the built-in {BUILT_IN_QUESTIONS}"
    lines = _read_built_in() if path is None else read_lines("--questions", path)
    questions = []
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            questions.append(msgspec.json.decode(line, type=Question))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{name}, line {line_number}: {error}; a line has prompt and answer") from error
    if not questions:
        raise ValueError(f"{name} has no questions; a line is {{'prompt': ..., 'answer': ...}}")
    return questions


def extract_answer(completion: str, *, thinking: bool = False) -> str:
    # The reasoning goes first: its worked steps hold answer marks of their own.
    answer = strip_reasoning(completion) if thinking else completion
    return answer.rsplit(ANSWER_MARK, 1)[-1].strip()


def ask_questions(
    llm: LanguageModel,
    questions: list[Question],
    sampling_params: SamplingParams,
    terminal: Terminal,
    writer: OrderedLineWriter,
    *,
    thinking: bool = False,
) -> list[Answer]:
    """All questions as one batch; answers in the order of the questions, also written as they come."""
    prompts: list[Prompt] = [
        llm.encode_chat([{"role": "user", "content": question.prompt}], thinking=thinking) for question in questions
    ]
    answers: dict[int, Answer] = {}
    with (
        show_progress(terminal, "eval", len(questions)) as progress,
        closing(llm.generate_as_finished(prompts, [sampling_params] * len(prompts))) as results,
    ):
        for index, result in results:
            answers[index] = _judge(index, questions[index], result, thinking=thinking)
            writer.add(answers[index])
            progress.advance()
    return [answers[index] for index in range(len(questions))]


def _judge(index: int, question: Question, result: RequestOutput | ValueError, *, thinking: bool) -> Answer:
    if isinstance(result, ValueError):
        completion, finish_reason, error = "", None, str(result)
    else:
        completion, finish_reason, error = result.outputs[0].text, result.outputs[0].finish_reason, None
    extracted = extract_answer(completion, thinking=thinking)
    return Answer(
        index=index,
        prompt=question.prompt,
        answer=question.answer,
        category=question.category,
        language=question.language,
        completion=completion,
        extracted=extracted,
        is_correct=error is None and extracted == question.answer.strip(),
        finish_reason=finish_reason,
        error=error,
    )


def _print_report(answers: list[Answer], score: Score, terminal: Terminal) -> None:
    console = terminal.table_console()
    for title in ("category", "language"):
        table = Table(title, "questions", "correct", "score", "95 % interval")
        for name, group in group_scores((getattr(answer, title), answer.is_correct) for answer in answers):
            table.add_row(name, str(group.num_questions), str(group.num_correct), *_format_score(group))
        console.print(table)
    num_refused = sum(answer.error is not None for answer in answers)
    if num_refused:
        console.print(f"{num_refused} questions were refused by the engine and count as wrong")
    share, interval = _format_score(score)
    console.print(f"score {share} ({score.num_correct} of {score.num_questions}), 95 % interval {interval}")


def _format_score(score: Score) -> tuple[str, str]:
    low, high = wilson_interval(score)
    return f"{score.share:.4f}", f"{low:.3f} to {high:.3f}"


def _read_built_in() -> list[bytes]:
    return resources.files("argosy").joinpath("assets", BUILT_IN_QUESTIONS).read_bytes().splitlines()
