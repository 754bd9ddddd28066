"""The parts of the training data that need the `train` extra: GSM problems, facts, questions, the mixture."""

import re
from decimal import Decimal
from random import Random

import pytest

pytest.importorskip("reasoning_gym", reason="needs the extra: pip install argosy[train]")
pytest.importorskip("babel", reason="needs the extra: pip install argosy[train]")

from argosy.assets import builtin_model_directory, builtin_questions_file  # noqa: E402
from tools.train_tiny import questions  # noqa: E402
from tools.train_tiny.data import facts, gsm, mixture  # noqa: E402
from tools.train_tiny.data.conversation import MixtureConfig, polish_mixture  # noqa: E402
from tools.train_tiny.tokenizer import load_tokenizer, token_counter  # noqa: E402

PLAIN_EQUATION = re.compile(r"(\d[\d.]*)([+*/-])(\d[\d.]*)=(\d[\d.]*)")
SEED = 20261122  # of the published checkpoint


def apply_operator(left: Decimal, operator: str, right: Decimal) -> Decimal:
    return {"+": left + right, "-": left - right, "*": left * right, "/": left / (right or Decimal(1))}[operator]


def test_long_hand_lines_of_gsm_are_true():
    rng, checked = Random(1), 0
    for _ in range(600):
        for line in gsm.sample(rng).steps.split("\n"):
            if found := PLAIN_EQUATION.fullmatch(line):
                left, operator, right, result = found.groups()
                assert apply_operator(Decimal(left), operator, Decimal(right)) == Decimal(result), line
                checked += 1
    assert checked > 300


def test_training_never_draws_a_held_out_seed():
    drawn = []
    original = Random(5)

    class Recorder(Random):
        def randrange(self, *arguments):
            drawn.append(arguments)
            return original.randrange(*arguments)

    gsm.sample(Recorder())
    assert drawn[0] == (gsm.HELD_OUT_SEED,)


def test_training_examples_avoid_held_out_prompts():
    asked = questions.read_questions(builtin_questions_file())
    held_out = questions.held_out_prompts(asked)
    for config in (MixtureConfig(), polish_mixture()):
        rng = Random(2)
        assert not any(mixture.sample_example(rng, config, held_out).prompt in held_out for _ in range(1500))


def test_a_held_out_prompt_is_drawn_again():
    rng = Random(4)
    first = mixture.sample_example(Random(4), MixtureConfig(), frozenset())
    assert mixture.sample_example(rng, MixtureConfig(), frozenset({first.prompt})).prompt != first.prompt


def test_committed_questions_are_what_the_seed_gives():
    counter = token_counter(load_tokenizer(builtin_model_directory("argosy-tiny")))
    built = questions.build_questions(SEED, counter)
    kept = questions.read_questions(builtin_questions_file())
    assert [(q.prompt, q.answer) for q in built] == [(q.prompt, q.answer) for q in kept]


def test_facts_have_one_answer():
    pairs = facts.name_pairs()
    assert len({p[0] for p in pairs}) == len({p[1] for p in pairs}) == len(pairs) > 400
    for column in range(4):
        assert len({row[column] for row in facts.CAPITALS}) == len(facts.CAPITALS)
