"""The output processor joins children, cuts at stop strings, and gives every request one last output."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from argosy.engine.output_processor import OutputProcessor, split_request
from argosy.engine.tokenizer import Tokenizer
from argosy.messages import FinishReason, RequestMetrics, TokenDelta, TokenLogprobs
from argosy.sampling_params import MAX_SEED, SamplingParams
from tests.helpers.tiny_tokenizer import EOS, build_tiny_backend

TINY = Tokenizer(build_tiny_backend(), bos_token_id=0, eos_token_ids=(1,), adds_bos=True)
EOS_ID = 1
STOP, LENGTH, ABORT = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT


def ids(text):
    return TINY.encode(text)


def logprobs(*values):
    return [TokenLogprobs(token_id=5, logprob=value, rank=1) for value in values]


def started(request_id="r", *, is_streamed=True, **params):
    processor = OutputProcessor(TINY)
    processor.add_request(request_id, "Q", [0, 7, 8], SamplingParams(**params), 10.0, is_streamed=is_streamed)
    return processor


def only(processed):
    [output] = processed.outputs
    return output


def test_outputs_are_cumulative_and_carry_the_times():
    processor = started()
    first = only(processor.process([TokenDelta("r", ids("Paris"), num_cached_tokens=2)], 11.0))
    assert (first.request_id, first.prompt, first.prompt_token_ids, first.finished) == ("r", "Q", [0, 7, 8], False)
    assert (first.outputs[0].text, first.outputs[0].token_ids) == ("Paris", ids("Paris"))
    assert (first.outputs[0].index, first.outputs[0].finish_reason, first.num_cached_tokens) == (0, None, 2)
    assert first.outputs[0].logprobs is None and first.outputs[0].cumulative_logprob is None
    assert first.metrics == RequestMetrics(10.0, 11.0, None)
    last = only(processor.process([TokenDelta("r", ids(" is"), LENGTH, num_cached_tokens=2)], 12.0))
    assert (last.outputs[0].text, last.outputs[0].token_ids) == ("Paris is", ids("Paris") + ids(" is"))
    assert (last.finished, last.outputs[0].finish_reason, last.outputs[0].stop_reason) == (True, "length", None)
    assert last.metrics == RequestMetrics(10.0, 11.0, 12.0)
    assert first.outputs[0].token_ids == ids("Paris")  # an earlier output does not change under its reader
    assert processor.num_unfinished == 0


@pytest.mark.parametrize(("reason", "stop_reason"), [(STOP, None), (STOP, 77), (LENGTH, None), (ABORT, None)])
def test_the_engines_finish_reason_is_passed_on(reason, stop_reason):
    delta = TokenDelta("r", [*ids("42"), EOS_ID], reason, stop_reason)
    processed = started().process([delta], 11.0)
    completion = only(processed).outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == (reason.value, stop_reason)
    assert (completion.text, completion.token_ids) == ("42", [*ids("42"), EOS_ID])
    assert processed.finish_request_ids == []


def test_a_stop_token_is_in_the_ids_and_in_the_text_only_on_request():
    delta = TokenDelta("r", ids("4 2"), STOP, ids("4 2")[-1])
    hidden = only(started().process([delta], 11.0)).outputs[0]
    assert (hidden.text, hidden.token_ids) == (TINY.decode(ids("4 2")[:-1]), ids("4 2"))
    shown = only(started(include_stop_str_in_output=True).process([delta], 11.0)).outputs[0]
    assert (shown.text, shown.token_ids) == ("4 2", ids("4 2"))
    ended = TokenDelta("r", [*ids("42"), EOS_ID], STOP)
    assert only(started(skip_special_tokens=False).process([ended], 11.0)).outputs[0].text == "42"


def test_special_tokens_show_on_request():
    delta = TokenDelta("r", [*ids("4"), EOS_ID, *ids("2")], LENGTH)
    assert only(started(ignore_eos=True).process([delta], 11.0)).outputs[0].text == "42"
    shown = started(ignore_eos=True, skip_special_tokens=False).process([delta], 11.0)
    assert only(shown).outputs[0].text == f"4{EOS}2"


@pytest.mark.parametrize(("include", "text"), [(False, "The "), (True, "The answer")])
def test_a_stop_string_ends_the_request_and_cuts_what_follows(include, text):
    processor = started(stop=("answer",), include_stop_str_in_output=include, logprobs=0)
    tokens = ids("The answer is 42. Stop here")
    num_kept = next(n for n in range(len(tokens)) if "answer" in TINY.decode(tokens[:n]))
    assert 3 < num_kept < len(tokens) - 2
    early = processor.process([TokenDelta("r", tokens[:3], new_logprobs=logprobs(-1.0, -2.0, -3.0))], 11.0)
    assert early.finish_request_ids == [] and only(early).outputs[0].cumulative_logprob == -6.0
    rest = TokenDelta("r", tokens[3:], new_logprobs=logprobs(*[-4.0] * (len(tokens) - 3)))
    processed = processor.process([rest], 12.0)
    assert processed.finish_request_ids == [("r", STOP)]
    output = only(processed)
    assert output.finished and output.metrics.finished_s == 12.0
    completion = output.outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (text, "stop", "answer")
    assert completion.token_ids == tokens[:num_kept]
    assert [each.logprob for each in completion.logprobs] == [-1.0, -2.0, -3.0] + [-4.0] * (num_kept - 3)
    assert completion.cumulative_logprob == -6.0 - 4.0 * (num_kept - 3)
    late = processor.process([TokenDelta("r", ids("42"), LENGTH)], 13.0)  # the engine was a step ahead
    assert late.outputs == [] and late.finish_request_ids == []


def test_a_stop_string_wins_over_the_engines_own_end_in_the_same_step():
    processed = started(stop=("Paris",)).process([TokenDelta("r", ids("Paris!!"), LENGTH)], 11.0)
    completion = only(processed).outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("", "stop", "Paris")
    assert completion.token_ids == ids("Paris!!")[: len(completion.token_ids)] != ids("Paris!!")
    assert processed.finish_request_ids == []  # it has ended already


def test_min_tokens_keeps_stop_strings_from_ending_a_request():
    processor = started(stop=("a",), min_tokens=3, max_tokens=9)
    processed = processor.process([TokenDelta("r", ids("a") * 4)], 11.0)
    assert only(processed).outputs[0].token_ids == ids("a") * 3
    assert only(processed).outputs[0].text == "aa"


class EndBehind:
    """A ``TextEnd`` behind a word."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.text = ""

    def is_reached(self, text: str) -> bool:
        self.text += text
        return self.word in self.text


@pytest.mark.parametrize("reason", [None, STOP, LENGTH])
def test_a_text_end_ends_a_request_and_drops_the_tokens_behind_it(reason):
    processor = OutputProcessor(TINY)
    params = SamplingParams(n=2, min_tokens=50, max_tokens=99, logprobs=0, stop="ok")
    processor.add_request("r", "Q", [0], params, 10.0, is_streamed=False, build_text_end=lambda: EndBehind("Paris"))
    kept = [*ids("42 "), *ids("Paris")]
    delta = TokenDelta("r#0", [*kept, *ids(" is ok"), EOS_ID], reason, None, logprobs(*[-1.0] * (len(kept) + 8)))
    first = processor.process([delta], 11.0)
    assert first.finish_request_ids == ([("r#0", STOP)] if reason is None else []) and not first.outputs
    second = processor.process([TokenDelta("r#1", ids("42"), LENGTH, None, logprobs(*[-1.0] * 9))], 12.0)
    ended, other = only(second).outputs
    assert (ended.text, ended.token_ids, len(ended.logprobs)) == ("42 Paris", kept, len(kept))
    assert (ended.finish_reason, ended.stop_reason, ended.cumulative_logprob) == ("stop", None, -len(kept))
    assert (other.text, other.finish_reason) == ("42", "length")


def test_held_back_text_is_shown_when_the_request_ends():
    processor = started(stop=("####",))
    tokens = ids("42 ##")
    assert only(processor.process([TokenDelta("r", tokens)], 11.0)).outputs[0].text == "42 "
    assert only(processor.process([TokenDelta("r", [], ABORT)], 11.0)).outputs[0].text == "42 ##"
    broken = only(started().process([TokenDelta("r", ids("😀")[:2], LENGTH)], 11.0)).outputs[0]
    assert broken.text == "\ufffd"


def test_n_children_run_apart_and_are_joined():
    processor = OutputProcessor(TINY)
    children = processor.add_request("r", None, [0], SamplingParams(n=3, seed=5, stop=("x",)), 1.0)
    assert [(each.request_id, each.index) for each in children] == [("r#0", 0), ("r#1", 1), ("r#2", 2)]
    assert [(each.sampling_params.n, each.sampling_params.seed) for each in children] == [(1, 5), (1, 6), (1, 7)]
    first = TokenDelta("r#1", ids("b"), num_cached_tokens=1)
    output = only(processor.process([first, TokenDelta("r#0", ids("ax"), num_cached_tokens=2)], 2.0))
    assert [each.text for each in output.outputs] == ["a", "b", ""]
    assert [each.finish_reason for each in output.outputs] == ["stop", None, None]
    assert not output.finished and output.num_cached_tokens == 2
    processor.process([TokenDelta("r#2", ids("c"), LENGTH)], 3.0)
    assert processor.num_unfinished == 1
    output = only(processor.process([TokenDelta("r#1", ids("b"), LENGTH)], 4.0))
    assert output.finished and [each.text for each in output.outputs] == ["a", "bb", "c"]
    assert [each.index for each in output.outputs] == [0, 1, 2]
    assert output.metrics == RequestMetrics(1.0, 2.0, 4.0)
    assert processor.num_unfinished == 0


def test_one_completion_keeps_its_id_and_settings():
    params = SamplingParams(seed=MAX_SEED)
    [child] = split_request("r", params)
    assert (child.request_id, child.sampling_params) == ("r", params)
    assert [each.sampling_params.seed for each in split_request("r", SamplingParams(n=2))] == [None, None]
    assert [each.sampling_params.seed for each in split_request("r", SamplingParams(n=2, seed=MAX_SEED))] == [
        MAX_SEED,
        0,
    ]


def test_only_requests_with_news_get_an_output():
    processor = started("a")
    processor.add_request("b", None, [0], SamplingParams(), 1.0)
    assert only(processor.process([TokenDelta("b", ids("x"))], 2.0)).request_id == "b"
    assert processor.process([], 3.0).outputs == []
    assert processor.process([TokenDelta("unknown", ids("x"))], 3.0).outputs == []


def test_a_request_that_is_not_streamed_gets_its_last_output_only():
    processor = started(is_streamed=False, n=2)
    assert processor.process([TokenDelta("r#0", ids("a"), LENGTH), TokenDelta("r#1", ids("b"))], 2.0).outputs == []
    output = only(processor.process([TokenDelta("r#1", ids("b"), LENGTH)], 3.0))
    assert output.finished and [each.text for each in output.outputs] == ["a", "bb"]


def test_a_removed_request_names_its_running_children_and_is_forgotten():
    processor = started(n=3)
    processor.process([TokenDelta("r#1", ids("a"), LENGTH)], 2.0)
    assert processor.remove("r") == ["r#0", "r#2"]
    assert processor.process([TokenDelta("r#0", ids("a"), ABORT)], 3.0).outputs == []
    assert processor.remove("r") == [] and processor.num_unfinished == 0
    processor.add_request("r", None, [0], SamplingParams(), 4.0)  # the id is free again


@pytest.mark.parametrize(
    ("first", "n", "second", "m"),
    [("r", 1, "r", 1), ("r#1", 1, "r", 2), ("r", 2, "r#0", 1), ("r", 2, "r", 1), ("r", 1, "r", 2)],
)
def test_an_id_in_use_is_refused_and_changes_nothing(first, n, second, m):
    processor = started(first, n=n)
    with pytest.raises(ValueError, match="is in use by an unfinished request"):
        processor.add_request(second, None, [0], SamplingParams(n=m), 2.0)
    assert processor.num_unfinished == 1
    assert len(processor.remove(first)) == n


def test_missing_logprobs_are_our_mistake():
    with pytest.raises(AssertionError, match="logprobs are missing"):
        started(logprobs=1).process([TokenDelta("r", ids("a"))], 2.0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_every_request_ends_once_with_all_its_tokens(child_counts, random):
    processor = OutputProcessor(TINY)
    pending = {}
    for number, n in enumerate(child_counts):
        for child in processor.add_request(f"r{number}", None, [0], SamplingParams(n=n), 0.0):
            pending[child.request_id] = [random.randrange(2, TINY.vocab_size) for _ in range(random.randint(1, 6))]
    given_ids = {request_id: list(tokens) for request_id, tokens in pending.items()}
    last = {}
    while pending:
        deltas = []
        for request_id in random.sample(sorted(pending), random.randint(1, len(pending))):
            size = random.randint(1, 3)
            new, pending[request_id] = pending[request_id][:size], pending[request_id][size:]
            deltas.append(TokenDelta(request_id, new, None if pending[request_id] else LENGTH))
            if not pending[request_id]:
                del pending[request_id]
        for output in processor.process(deltas, 1.0).outputs:
            assert output.request_id not in last
            if output.finished:
                last[output.request_id] = output
    assert set(last) == {f"r{number}" for number in range(len(child_counts))}
    for output in last.values():
        for completion in output.outputs:
            child_id = output.request_id if len(output.outputs) == 1 else f"{output.request_id}#{completion.index}"
            assert completion.token_ids == given_ids[child_id]
            assert completion.text == TINY.decode(given_ids[child_id])


def test_prompt_logprobs_come_first_and_in_a_stream_once():
    """Other completions wait for those of the first, which alone is asked about the prompt."""
    processor = OutputProcessor(TINY)
    params = SamplingParams(n=2, prompt_logprobs=1)
    children = processor.add_request("r", None, [0, 7, 8], params, 10.0, is_delta=True)
    assert [child.sampling_params.prompt_logprobs for child in children] == [1, None]
    assert processor.process([TokenDelta("r#1", ids("a"))], 11.0).outputs == []
    assert processor.process([TokenDelta("r#1", ids("b"), LENGTH)], 12.0).outputs == []
    told = logprobs(-1.0, -2.0)
    first = only(processor.process([TokenDelta("r#0", ids("c"), prompt_logprobs=told)], 13.0))
    assert first.prompt_logprobs == [None, *told]
    assert [(each.index, each.text) for each in first.outputs] == [(0, "c"), (1, "ab")]
    last = only(processor.process([TokenDelta("r#0", ids("d"), LENGTH)], 14.0))
    assert last.finished and last.prompt_logprobs is None


def test_prompt_logprobs_are_in_every_cumulative_output():
    processor = started(prompt_logprobs=0)
    for tokens, told in ((ids("a"), logprobs(-1.0, -2.0)), (ids("b"), None)):
        output = only(processor.process([TokenDelta("r", tokens, prompt_logprobs=told)], 11.0))
        assert output.prompt_logprobs == [None, *logprobs(-1.0, -2.0)]
    assert only(started().process([TokenDelta("r", ids("a"))], 11.0)).prompt_logprobs is None
