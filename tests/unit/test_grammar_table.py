"""Grammars by row: whatever is drawn from the masks parses, obeys its schema, and ends."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from argosy.engine.tokenizer import Tokenizer
from argosy.grammar.compiler import Vocabulary
from argosy.grammar.grammar_table import GrammarTable
from argosy.messages import AdmittedRequest
from argosy.models.deepseek.encoding_parser import parse_completion
from argosy.models.deepseek.tool_grammar import write_tool_grammar
from argosy.runner.row_table import RowTable
from argosy.runner.sampler import Sampler
from argosy.sampling_params import SamplingParams, StructuredOutputsParams
from tests.helpers.tiny_tokenizer import write_tiny_tokenizer

MAX_TOKENS = 250
PADDING = 13  # rows of the vocabulary behind the tokenizer's


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_directory(write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


class Writer:
    """A model of random logits, a sampler and rows, one of which is free."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = tokenizer.vocab_size + PADDING
        self._table = RowTable(max_num_seqs=4, max_model_len=MAX_TOKENS + 8, block_size=16)
        self._sampler = Sampler(
            vocab_size=self._vocab_size,
            num_valid_tokens=tokenizer.vocab_size,
            max_num_seqs=4,
            device=torch.device("cpu"),
            engine_seed=0,
            grammars=GrammarTable(tokenizer.vocabulary),
        )

    def admit(self, row: int, params: SamplingParams, token_ids: list[int] | None = None) -> None:
        tokens = [5, 6, *(token_ids or ())]
        request = AdmittedRequest(row, f"r{row}", tokens, 2, 0, [], params)
        self._table._admit(request)
        self._sampler.admit(row, request, self._tokenizer.eos_token_ids)

    def write(self, rows: list[int], seed: int, max_tokens: int = MAX_TOKENS) -> dict[int, list[int]]:
        """Until all but row 0, the free one, have said the end."""
        generator = torch.Generator().manual_seed(seed)
        written: dict[int, list[int]] = {row: [] for row in rows}
        running = list(rows)
        for _ in range(max_tokens):
            logits = 3 * torch.randn(len(running), self._vocab_size, generator=generator)
            logits[:, self._tokenizer.vocab_size :] = 100.0
            # Random writers of text never come to its end.
            logits[:, [self._tokenizer.encode(mark)[0] for mark in ('"', "}", "]")]] += 4.0
            sampled = self._sampler.sample(logits, np.array(running), self._table)
            assert not sampled.failures
            ids = sampled.token_ids.numpy()
            positions = self._table.count_sampled(np.array(running))
            self._table.learn(np.array(running), positions, ids)
            for row, token_id in zip(running, ids.tolist(), strict=True):
                written[row].append(token_id)
            running = [row for row in running if row == 0 or written[row][-1] not in self._tokenizer.eos_token_ids]
            if running in ([], [0]):
                break
        return written


leaves = st.one_of(
    st.fixed_dictionaries({"type": st.just("integer"), "minimum": st.just(-3), "maximum": st.integers(0, 200)}),
    st.fixed_dictionaries({"type": st.just("string"), "maxLength": st.integers(0, 5)}),
    st.fixed_dictionaries(
        {"enum": st.lists(st.sampled_from(["a", "b\n", 5, None, True, '"']), min_size=1, unique_by=repr)}
    ),
    st.just({"type": "boolean"}),
)
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.fixed_dictionaries({"type": st.just("array"), "items": inner, "maxItems": st.integers(0, 3)}),
        st.dictionaries(st.sampled_from(["a", "b", "c d"]), inner, min_size=1).map(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:1],
                "additionalProperties": False,
            }
        ),
    ),
    max_leaves=4,
)


def obeys(value: object, schema: dict) -> bool:
    if "enum" in schema:
        return any(value == each and type(value) is type(each) for each in schema["enum"])
    match schema["type"]:
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            return isinstance(value, str) and len(value) <= schema["maxLength"]
        case "boolean":
            return isinstance(value, bool)
        case "array":
            assert isinstance(value, list)
            return len(value) <= schema["maxItems"] and all(obeys(each, schema["items"]) for each in value)
    assert isinstance(value, dict)
    properties = schema["properties"]
    return set(schema["required"]) <= set(value) <= set(properties) and all(
        obeys(each, properties[name]) for name, each in value.items()
    )


@settings(max_examples=6, deadline=None, derandomize=True)
@given(first=schemas, second=schemas, seed=st.integers(0, 1000))
def test_what_is_written_parses_and_obeys(tokenizer: Tokenizer, first: dict, second: dict, seed: int) -> None:
    writer = Writer(tokenizer)
    drawn = {"temperature": 1.0, "seed": seed, "max_tokens": MAX_TOKENS}
    writer.admit(0, SamplingParams(**drawn))
    for row, (schema, greedy) in enumerate(((first, {}), (second, {"temperature": 0.0, "min_tokens": 3})), start=1):
        structured = StructuredOutputsParams(json=schema)
        writer.admit(row, SamplingParams(**(drawn | greedy), structured_outputs=structured))
    written = writer.write([0, 1, 2], seed)
    assert all(token_id < tokenizer.vocab_size for tokens in written.values() for token_id in tokens)
    for row, schema in ((1, first), (2, second)):
        if written[row][-1] in tokenizer.eos_token_ids:
            assert obeys(json.loads(tokenizer.decode(written[row])), schema)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(properties=st.dictionaries(st.sampled_from(["a", "b", "名"]), leaves, max_size=3), seed=st.integers(0, 1000))
def test_calls_that_are_written_are_read_and_obey(tokenizer: Tokenizer, properties: dict, seed: int) -> None:
    parameters = {"type": "object", "properties": properties, "required": sorted(properties)[:1]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    grammar = StructuredOutputsParams(grammar=write_tool_grammar(tools, is_parallel=False))
    writer = Writer(tokenizer)
    writer.admit(1, SamplingParams(seed=seed, structured_outputs=grammar, max_tokens=MAX_TOKENS))
    (tokens,) = writer.write([1], seed).values()
    assert tokens[-1] in tokenizer.eos_token_ids
    parsed = parse_completion(tokenizer.decode(tokens, skip_special_tokens=False), thinking=False)
    (call,) = parsed.tool_calls
    assert call.name == "f" and obeys(json.loads(call.arguments), parameters)


def test_a_row_goes_on_behind_its_tokens_and_is_free_again(tokenizer: Tokenizer) -> None:
    writer = Writer(tokenizer)
    params = SamplingParams(temperature=1.0, seed=1, structured_outputs=StructuredOutputsParams(regex="[a-z]{30}X"))
    writer.admit(1, params, tokenizer.encode("abc" * 9))
    (tokens,) = writer.write([1], seed=0).values()
    text = tokenizer.decode(tokens)
    assert len(text) == 4 and text.endswith("X")
    writer.admit(1, SamplingParams(temperature=1.0, seed=1))
    (tokens,) = writer.write([1], seed=0, max_tokens=20).values()
    assert len(set(tokens)) > 10


def test_a_grammar_begins_behind_its_token(tokenizer: Tokenizer) -> None:
    (start_id,) = tokenizer.encode("</think>")
    structured = StructuredOutputsParams(choice=("yes",), starts_after_token_id=start_id)
    writer = Writer(tokenizer)
    writer.admit(1, SamplingParams(temperature=1.0, seed=1, structured_outputs=structured, logit_bias={start_id: 6.0}))
    (tokens,) = writer.write([1], seed=2).values()
    reasoning, _, answer = tokenizer.decode(tokens, skip_special_tokens=False).partition("</think>")
    assert reasoning and answer.startswith("yes") and tokens[-1] in tokenizer.eos_token_ids


def test_the_vocabulary_is_loaded_by_the_first_grammar() -> None:
    def fail() -> Vocabulary:
        raise AssertionError("loaded")

    table = GrammarTable(fail)
    table.forget(0)
    with pytest.raises(AssertionError, match="loaded"):
        table.admit(0, SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")), np.zeros(0, np.int64))


@pytest.mark.parametrize(
    "fields", [{}, {"regex": "a", "choice": ("b",)}, {"choice": ()}, {"regex": ""}, {"json": {1: {2}}}]
)
def test_what_is_no_grammar_is_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match="structured_outputs"):
        StructuredOutputsParams(**fields)
