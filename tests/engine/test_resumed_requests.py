"""A request that goes on behind tokens of another engine says what it would have said there."""

import dataclasses
from collections.abc import Iterator

import pytest

from argosy import LLM, SamplingParams
from argosy.config import EngineConfig
from argosy.engine.engine_core import EngineCore
from argosy.engine.replica_loop import build_request
from argosy.engine.replica_messages import AddRequest
from argosy.messages import FinishReason, TokenDelta

PROMPT = list(range(200, 219))
NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, top_p=0.95, seed=3, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2)
PENALISED = SamplingParams(
    temperature=0.9,
    seed=11,
    max_tokens=NUM_TOKENS,
    repetition_penalty=1.3,
    presence_penalty=0.7,
    frequency_penalty=0.4,
    ignore_eos=True,
)
# Without min_tokens it would end at once; it ends by a stop id soon after them.
LATE_STOP = SamplingParams(
    temperature=0.9, seed=2, max_tokens=NUM_TOKENS, min_tokens=9, stop_token_ids=tuple(range(3, 1500))
)
UNSEEDED = SamplingParams(temperature=1.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module", params=[False, True], ids=["one step at a time", "overlapped"])
def core(request: pytest.FixtureRequest) -> EngineCore:
    config = EngineConfig(
        device="cpu", num_threads=1, max_model_len=256, block_size=16, async_scheduling=request.param, max_num_seqs=32
    )
    return LLM.from_config(config).engine


@pytest.fixture(autouse=True)
def nothing_is_left_behind(core: EngineCore) -> Iterator[None]:
    yield
    core.scheduler.check_integrity()
    assert not core.has_unfinished()


def run(core: EngineCore, requests: list[AddRequest]) -> list[list[TokenDelta]]:
    """The deltas of each request."""
    eos_token_ids = (1,)
    for request in requests:
        core.add(build_request(request, eos_token_ids))
    deltas: dict[str, list[TokenDelta]] = {request.request_id: [] for request in requests}
    while core.has_unfinished():
        for delta in core.step():
            deltas[delta.request_id].append(delta)
    return list(deltas.values())


@pytest.mark.parametrize(
    "params", [GREEDY, SEEDED, PENALISED, LATE_STOP], ids=["greedy", "seeded", "penalised", "stop"]
)
def test_a_run_split_anywhere_has_the_tokens_and_the_end_of_the_whole(core: EngineCore, params: SamplingParams) -> None:
    (whole,) = run(core, [AddRequest("whole", PROMPT, params)])
    tokens = [token for delta in whole for token in delta.new_token_ids]
    assert len(tokens) >= 9
    parts = [AddRequest(f"part {i}", PROMPT, params, output_token_ids=tokens[:i]) for i in range(len(tokens))]
    for i, deltas in enumerate(run(core, parts)):
        assert [token for delta in deltas for token in delta.new_token_ids] == tokens[i:], f"split at {i}"
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (whole[-1].finish_reason, whole[-1].stop_reason)
        if params.logprobs is not None:
            ranks = [each.rank for delta in deltas for each in delta.new_logprobs or []]
            assert ranks == [each.rank for delta in whole for each in delta.new_logprobs or []][i:]


def test_a_request_without_a_seed_goes_on_in_its_random_stream(core: EngineCore) -> None:
    (whole,) = run(core, [AddRequest("r", PROMPT, UNSEEDED)])
    tokens = [token for delta in whole for token in delta.new_token_ids]
    for i in (1, 7, NUM_TOKENS - 1):
        (rest,) = run(core, [AddRequest("r", PROMPT, UNSEEDED, output_token_ids=tokens[:i])])
        assert [token for delta in rest for token in delta.new_token_ids] == tokens[i:]


def test_late_stop_needs_what_it_tests(core: EngineCore) -> None:
    """The stop ids would end it before min_tokens, and end it before max_tokens."""
    early, late = run(
        core,
        [AddRequest("early", PROMPT, dataclasses.replace(LATE_STOP, min_tokens=0)), AddRequest("r", PROMPT, LATE_STOP)],
    )
    assert sum(len(delta.new_token_ids) for delta in early) < 9
    assert 9 < sum(len(delta.new_token_ids) for delta in late) < NUM_TOKENS
    assert late[-1].finish_reason is FinishReason.STOP


def test_a_request_with_all_its_tokens_is_refused(core: EngineCore) -> None:
    request = AddRequest("r", PROMPT, GREEDY, output_token_ids=[5] * NUM_TOKENS)
    with pytest.raises(ValueError, match="the request has 24 output tokens already, and its limit is 24: it is over"):
        core.add(build_request(request, ()))
