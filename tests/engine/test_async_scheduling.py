"""Asynchronous scheduling: the next step is planned while one runs, and no token differs from those of one at a time.

What the scheduler may do is in ``tests/unit/test_scheduler*.py``; here the real runner fills in what the host does not
know yet.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch

from argosy import LLM, RequestOutput, SamplingParams
from argosy.config import EngineConfig
from argosy.engine.build import build_engine, prepare
from argosy.engine.engine_core import EngineCore
from argosy.engine.generation import Result
from argosy.engine.replica_messages import UpdateSettings
from argosy.engine.request import Request
from argosy.messages import FinishReason, TokenDelta

SETTINGS: dict[str, object] = {"dtype": "float32", "num_threads": 1, "max_model_len": 256, "block_size": 16}
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
# What the host must know of earlier tokens, or of their number, to sample the next one.
NEEDY = SamplingParams(
    temperature=0.8,
    top_p=0.9,
    seed=11,
    max_tokens=18,
    repetition_penalty=1.3,
    presence_penalty=0.7,
    frequency_penalty=0.4,
    min_tokens=9,
    stop_token_ids=tuple(range(3, 1500)),
    logprobs=3,
)


def _build(device: str, *, is_async: bool, **settings: object) -> LLM:
    config = EngineConfig(device=device, async_scheduling=is_async, **{**SETTINGS, **settings})  # type: ignore[arg-type]
    return LLM.from_config(config)


@pytest.fixture(scope="module")
def llms(device: str) -> tuple[LLM, LLM]:
    """One step at a time; overlapped."""
    return _build(device, is_async=False), _build(device, is_async=True)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llms: tuple[LLM, LLM]) -> Iterator[None]:
    yield
    for llm in llms:
        assert not llm.engine.has_unfinished() and not llm.engine._in_flight
        llm.engine.scheduler.check_integrity()
        manager = llm.engine.scheduler.block_manager
        assert manager.num_free_blocks == manager.num_usable_blocks


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(10, 3000, (n,), generator=generator).tolist() for n in (1, 5, 63, 64, 130, 100)]
    prompts[-1] = prompts[-2][:96] + [77]
    return prompts


def _settings_of_all() -> list[SamplingParams]:
    stop_id = 100
    return [
        dataclasses.replace(GREEDY, max_tokens=1),
        dataclasses.replace(GREEDY, max_tokens=2),
        dataclasses.replace(GREEDY, ignore_eos=False),
        dataclasses.replace(NEEDY, stop_token_ids=()),
        NEEDY,
        SamplingParams(temperature=1.0, seed=3, max_tokens=25, stop_token_ids=(stop_id,)),
    ]


def _longer_settings() -> list[SamplingParams]:
    return [dataclasses.replace(each, max_tokens=3 * (each.max_tokens or 1)) for each in _settings_of_all() * 2]


def _facts(results: list[Result]) -> list[object]:
    outputs = [result.outputs[0] for result in results if isinstance(result, RequestOutput)]
    return [(each.token_ids, each.finish_reason, each.stop_reason, each.text) for each in outputs]


def _logprobs(results: list[Result]) -> list[float]:
    outputs = [result.outputs[0] for result in results if isinstance(result, RequestOutput)]
    entries = itertools.chain.from_iterable(output.logprobs or [] for output in outputs)
    return [value for entry in entries for value in (entry.logprob, float(entry.rank), *entry.top_logprobs)]


def test_every_kind_of_request_gets_the_same_answer(llms: tuple[LLM, LLM]) -> None:
    expected, got = (llm.generate(_prompts(), _settings_of_all()) for llm in llms)
    assert _facts(got) == _facts(expected)
    assert {reason for _, reason, _, _ in _facts(expected)} == {"length", "stop"}  # type: ignore[misc]
    assert len(_logprobs(expected)) > 60
    assert _logprobs(got) == pytest.approx(_logprobs(expected), abs=1e-4)


def test_steps_overlap_and_only_then(llms: tuple[LLM, LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    for llm, expected in zip(llms, ("SFSFSF", "SSFSFF"), strict=True):
        events: list[str] = []
        runner = llm.engine.runner
        start, finish = runner.start, runner.finish
        with monkeypatch.context() as patch:
            patch.setattr(runner, "start", lambda batch, recording, f=start, e=events: (e.append("S"), f(batch))[1])
            patch.setattr(runner, "finish", lambda step, f=finish, e=events: (e.append("F"), f(step))[1])
            llm.generate([[5, 6, 7]], dataclasses.replace(GREEDY, max_tokens=3))
        assert "".join(events) == expected


@pytest.fixture(scope="module")
def expected_of_many(llms: tuple[LLM, LLM]) -> list[object]:
    return _facts(llms[0].generate(_prompts() * 2, _longer_settings()))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 17, "max_num_seqs": 4},
        {"max_num_seqs": 2},
        {"num_blocks": 20},
        {"num_blocks": 20, "enable_prefix_caching": False},
    ],
    ids=str,
)
def test_chunks_queues_and_a_cache_too_small_change_no_token(
    device: str, expected_of_many: list[object], settings: dict[str, object]
) -> None:
    llm = _build(device, is_async=True, **settings)
    assert _facts(llm.generate(_prompts() * 2, _longer_settings())) == expected_of_many
    if "num_blocks" in settings:
        assert llm.engine.scheduler.num_preemptions > 0
    llm.engine.scheduler.check_integrity()


def test_a_prefix_hit_changes_no_token(device: str, llms: tuple[LLM, LLM]) -> None:
    llm = _build(device, is_async=True)
    first, again = (llm.generate([_prompts()[4]], GREEDY)[0] for _ in range(2))
    assert isinstance(first, RequestOutput) and isinstance(again, RequestOutput)
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 128)
    assert _facts([first]) == _facts([again]) == _facts(llms[0].generate([_prompts()[4]], GREEDY))


def test_a_stop_string_ends_the_text_before_it(llms: tuple[LLM, LLM]) -> None:
    params = dataclasses.replace(GREEDY, max_tokens=60)
    (whole,) = llms[0].generate(["12 + 30 ="], params)
    assert isinstance(whole, RequestOutput)
    text = whole.outputs[0].text
    params = dataclasses.replace(params, stop=(text[len(text) // 2 :][:3],))
    expected, got = (llm.generate(["12 + 30 ="], params) for llm in llms)
    assert _facts(got) == _facts(expected)


def test_a_stop_leaves_nothing_in_flight_and_no_token_behind_it(llms: tuple[LLM, LLM]) -> None:
    (whole,) = llms[0].generate([[5, 6, 7]], GREEDY)
    assert isinstance(whole, RequestOutput)
    tokens = whole.outputs[0].token_ids
    params = dataclasses.replace(GREEDY, stop_token_ids=(tokens[6],))
    deltas = _run(llms[1].engine, [Request("a", [5, 6, 7], params, ())])
    assert _tokens_of(deltas, "a") == tokens[: tokens.index(tokens[6]) + 1]
    assert not llms[1].engine._in_flight  # where a step had been planned behind the stop


def test_leaving_a_stream_early_leaves_nothing_in_flight(llms: tuple[LLM, LLM]) -> None:
    stream = llms[1].stream([5, 6, 7], GREEDY)
    next(stream)
    assert llms[1].engine._in_flight
    stream.close()
    assert not llms[1].engine._in_flight


@pytest.mark.parametrize("half", ["start", "finish"])
def test_an_interrupt_in_either_half_cancels_both_steps(
    llms: tuple[LLM, LLM], monkeypatch: pytest.MonkeyPatch, half: str
) -> None:
    """Another request of the same engine goes on, with the tokens that it has."""
    core = llms[1].engine
    expected = _tokens_of(_run(llms[0].engine, [_request("other", 4)]), "other")
    core.add(_request("other", 4))
    deltas = core.step() + core.step()
    real, calls = getattr(core.runner, half), []

    def interrupted(argument: object, **options: object) -> object:
        calls.append(argument)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(argument, **options)

    with monkeypatch.context() as patch:
        patch.setattr(core.runner, half, interrupted)
        with pytest.raises(KeyboardInterrupt):
            while True:
                deltas += core.step()
    core.scheduler.check_integrity()
    assert not core._in_flight and core.scheduler.num_running == 0
    assert _tokens_of(deltas + _run(core, []), "other") == expected


@pytest.mark.parametrize("when", range(6))
@pytest.mark.parametrize("is_silent", [False, True])
def test_an_end_from_outside_at_any_moment_is_the_last_news(llms: tuple[LLM, LLM], when: int, is_silent: bool) -> None:
    sequential, core = (llm.engine for llm in llms)
    expected = {name: _tokens_of(_run(sequential, [_request(name, i)]), name) for i, name in ((1, "a"), (4, "b"))}
    for i, name in ((1, "a"), (4, "b")):
        core.add(_request(name, i))
    deltas = list(itertools.chain.from_iterable(core.step() for _ in range(when)))
    assert core.finish("a", FinishReason.STOP) if is_silent else core.abort("a")
    core.add(_request("a", 1))  # the name is free, and the news is of another request
    before = _tokens_of(deltas, "a")
    assert before == expected["a"][: len(before)]
    later = _run(core, [])
    if not is_silent:
        ends = [delta for delta in later if delta.finish_reason is FinishReason.ABORT]
        assert [(delta.request_id, delta.new_token_ids) for delta in ends] == [("a", [])]
    assert _tokens_of(later, "a") == expected["a"]
    assert _tokens_of(deltas + later, "b") == expected["b"]


def test_settings_change_between_requests(llms: tuple[LLM, LLM]) -> None:
    core = llms[1].engine
    core.add(_request("a", 1))
    core.step()
    with pytest.raises(RuntimeError, match="between requests"):
        core.update_settings(UpdateSettings(async_scheduling=False))
    _run(core, [])
    for is_async in (False, True):
        llms[1].update_settings(async_scheduling=is_async)
        assert core.scheduler.max_steps_in_flight == 1 + is_async
        assert llms[1].config.async_scheduling is is_async
        assert _facts(llms[1].generate(_prompts()[:3], GREEDY)) == _facts(llms[0].generate(_prompts()[:3], GREEDY))


def test_what_is_on_by_default_is_what_can_overlap() -> None:
    config = EngineConfig(device="cpu", **SETTINGS)  # type: ignore[arg-type]
    assert prepare(config).config.async_scheduling is False
    assert prepare(dataclasses.replace(config, async_scheduling=True)).config.async_scheduling is True
    assert build_engine(config).core.scheduler.max_steps_in_flight == 1


def _request(name: str, index: int) -> Request:
    return Request(name, _prompts()[index], GREEDY, ())


def _run(core: EngineCore, requests: list[Request]) -> list[TokenDelta]:
    for request in requests:
        core.add(request)
    deltas: list[TokenDelta] = []
    while core.has_unfinished():
        deltas += core.step()
    return deltas


def _tokens_of(deltas: list[TokenDelta], name: str) -> list[int]:
    return [token_id for delta in deltas if delta.request_id == name for token_id in delta.new_token_ids]
