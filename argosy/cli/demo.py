"""``argosy demo``: asks a model a handful of English and Chinese questions and shows its answers and its speed.

The questions are the first of each kind in the held-out set, and one needle question over about a thousand tokens, far
past ``index_topk`` of the built-in model. One request runs at a time, so that each speed is its own. Invariant: exits
with 1 if fewer than half of the answers are right: a demonstration of a broken engine must not look fine.
"""

from dataclasses import dataclass

from argosy.cli.eval import Question, extract_answer, load_questions
from argosy.cli.invocation import EXIT_FAILED, EXIT_OK, Invocation
from argosy.cli.language_model import LanguageModel
from argosy.cli.speed import RequestSpeed, add_speeds, describe_speed, measure_speed
from argosy.cli.terminal import Terminal
from argosy.sampling_params import SamplingParams

KINDS = (
    ("gsm", "en"),
    ("word_problems", "zh"),
    ("dates", "en"),
    ("capitals", "zh"),
    ("translation", "en"),
    ("poems", "zh"),
)
NEEDLE = "needle"
NEEDLE_TOKENS = 1000
SHOWN_CHARACTERS = 240  # of a question; a needle's haystack is longer than a screen
WARM_UP_PROMPT = "Hello"


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions:
    """Ask the model a few English and Chinese questions and show answers and speed."""

    max_tokens: int = 512  # at most this many output tokens a question
    debug: bool = False  # show tracebacks


def run_demo(options: DemoOptions, invocation: Invocation) -> int:
    terminal = invocation.terminal
    questions = load_questions(None)
    llm = invocation.load_llm()
    print(f"{invocation.engine_config.model}, {llm.number_format} on {llm.device_name}\n", file=terminal.stdout)
    params = SamplingParams(temperature=0.0, max_tokens=options.max_tokens)
    _warm_up(llm)
    speeds = []
    num_correct = 0
    chosen = choose_questions(questions, llm)
    for question in chosen:
        is_correct, speed = _ask(llm, question, params, terminal)
        num_correct += is_correct
        speeds.append(speed)
    print(f"{num_correct} of {len(chosen)} answers are right", file=terminal.stdout)
    total = describe_speed(add_speeds(speeds), invocation.engine_config.world_size)
    print(f"all together: {total}", file=terminal.stdout, flush=True)
    return EXIT_OK if 2 * num_correct >= len(chosen) else EXIT_FAILED


def choose_questions(questions: list[Question], llm: LanguageModel) -> list[Question]:
    """The first question of each kind, and the needle question nearest to ``NEEDLE_TOKENS``."""
    chosen = []
    for category, language in KINDS:
        chosen += [item for item in questions if (item.category, item.language) == (category, language)][:1]
    needles = [item for item in questions if item.category == NEEDLE]
    chosen += sorted(needles, key=lambda item: abs(len(_encode(llm, item.prompt)) - NEEDLE_TOKENS))[:1]
    return chosen


def _ask(
    llm: LanguageModel, question: Question, params: SamplingParams, terminal: Terminal
) -> tuple[bool, RequestSpeed]:
    """Prints question and answer as they come; whether it was right, and how fast it was."""
    prompt = _encode(llm, question.prompt)
    out = terminal.stdout
    print(f"Q ({question.category}, {len(prompt)} tokens): {_shorten(question.prompt)}", file=out)
    out.write("A: ")
    shown, speed = "", RequestSpeed()
    for output in llm.stream(prompt, params):
        text = output.outputs[0].text
        out.write(text[len(shown) :])
        out.flush()
        shown, speed = text, measure_speed(output)
    is_correct = extract_answer(shown) == question.answer
    verdict = "right" if is_correct else f"wrong, expected {question.answer}"
    print(f"\n[{verdict}; {describe_speed(speed)}]\n", file=out, flush=True)
    return is_correct, speed


def _encode(llm: LanguageModel, text: str) -> list[int]:
    return llm.encode_chat([{"role": "user", "content": text}])


def _warm_up(llm: LanguageModel) -> None:
    """The first request also pays for allocations; it is not one of those measured."""
    for _ in llm.stream(_encode(llm, WARM_UP_PROMPT), SamplingParams(temperature=0.0, max_tokens=4)):
        pass


def _shorten(text: str) -> str:
    """Both ends of a long text: a needle's question is at the end."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} [...] {text[-half:]}"
