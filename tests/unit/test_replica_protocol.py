"""Driver and leaders in every order of events: nothing hangs, and every request gets the tokens of one rank."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from argosy.distributed.dp_coord import ExchangePolicy
from argosy.distributed.recordings import RecordingTable
from argosy.engine.replica_client import ReplicasClient
from argosy.engine.replica_messages import AddRequest, UpdateSettings, Wake
from argosy.messages import FinishReason
from argosy.sampling_params import SamplingParams
from tests.helpers.replica_simulation import BLOCK_SIZE, MAX_MODEL_LEN, NUM_BLOCKS, SimulatedLink
from tests.helpers.scheduler_simulation import generate_alone

RECORDINGS = RecordingTable((1, 2, 3), (8, 30), ("low_latency",) * 3)
POLICY = ExchangePolicy("auto", 4, 1, RECORDINGS)
seeds = st.integers(0, 2**32 - 1)


def _build(
    num_replicas: int, rng: random.Random, async_scheduling: bool = False
) -> tuple[ReplicasClient, SimulatedLink]:
    link = SimulatedLink(num_replicas, rng, POLICY, async_scheduling=async_scheduling)
    client = ReplicasClient(link, max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS)
    return client, link


class _Interrupt:
    """A spoke for whom the link decides when it has something."""

    socket = None  # type: ignore[var-annotated]

    def wait(self, timeout_s: float) -> bool:
        return True


class _User:
    """Adds, aborts and finishes requests, and keeps what it was told of each."""

    def __init__(self, client: ReplicasClient, rng: random.Random, interrupt: _Interrupt | None = None) -> None:
        self.client = client
        self.interrupt = interrupt
        self.rng = rng
        self.prompts: dict[str, list[int]] = {}
        self.received: dict[str, list[int]] = {}
        self.ended_here: set[str] = set()
        self.finished: set[str] = set()

    @property
    def unfinished(self) -> list[str]:
        return [name for name in self.prompts if name not in self.ended_here | self.finished]

    def add(self, dp_rank: int | None) -> None:
        name = f"r{len(self.prompts)}"
        prompt = [self.rng.randrange(16) for _ in range(self.rng.randint(1, 20))]
        self.client.add(AddRequest(name, prompt, _params(len(self.prompts))), dp_rank)
        self.prompts[name], self.received[name] = prompt, []

    def act(self, num_replicas: int) -> None:
        match self.rng.randrange(6):
            case 0 | 1:
                self.add(None)
            case 2:
                self.add(self.rng.randrange(num_replicas))
            case 3 if self.unfinished:
                name = self.rng.choice(self.unfinished)
                self.ended_here.add(name)
                if self.rng.random() < 0.5:
                    self.client.abort(name)
                else:
                    self.client.finish(name, FinishReason.STOP)
            case _:
                self.step()

    def step(self) -> None:
        for delta in self.client.step(self.interrupt, 1.0):  # type: ignore[arg-type]
            assert delta.request_id in self.unfinished, f"news of {delta.request_id}, which is over"
            self.received[delta.request_id] += delta.new_token_ids
            if delta.finish_reason is not None:
                self.finished.add(delta.request_id)

    def run_to_the_end(self) -> None:
        while self.client.has_unfinished():
            self.step()


def _params(index: int) -> SamplingParams:
    return SamplingParams(max_tokens=1 + index % 7, temperature=0.0)


@settings(max_examples=150, deadline=None)
@given(seed=seeds, num_replicas=st.integers(1, 4), num_actions=st.integers(1, 40), async_scheduling=st.booleans())
def test_no_order_of_messages_hangs_or_loses_a_request(
    seed: int, num_replicas: int, num_actions: int, async_scheduling: bool
) -> None:
    rng = random.Random(seed)
    client, link = _build(num_replicas, rng, async_scheduling)
    user = _User(client, rng)
    for _ in range(num_actions):
        user.act(num_replicas)
    user.run_to_the_end()
    for i, (name, prompt) in enumerate(user.prompts.items()):
        expected, _, _ = generate_alone(prompt, _params(i), MAX_MODEL_LEN)
        received = user.received[name]
        assert received == expected[: len(received)] and (name in user.ended_here or received == expected), name
    client.close()
    assert link.is_closed_orderly and all(ranks.is_shut_down for ranks in link.ranks)
    assert len({loop.step for loop in link.loops}) == 1, "the leaders ended at different steps"


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_leader_starts_a_step_before_it_asks_for_the_last_only_if_told_to(async_scheduling: bool) -> None:
    client, link = _build(2, random.Random(7), async_scheduling)
    user = _User(client, random.Random(8))
    for _ in range(3):
        user.add(0)
    user.run_to_the_end()
    assert [ranks.most_in_flight for ranks in link.ranks] == [1 + async_scheduling, 0]


@settings(max_examples=100, deadline=None)
@given(seed=seeds, num_replicas=st.integers(1, 4), async_scheduling=st.booleans())
def test_interrupted_waits_and_questions_about_counters_lose_nothing(
    seed: int, num_replicas: int, async_scheduling: bool
) -> None:
    rng = random.Random(seed)
    client, link = _build(num_replicas, rng, async_scheduling)
    user = _User(client, rng, _Interrupt())
    assert client.poll_stats(has_ranks=True) == []  # asked for, not there yet
    for _ in range(30):
        user.act(num_replicas)
        if rng.random() < 0.3:
            stats = client.poll_stats(has_ranks=rng.random() < 0.5)
            assert len(stats) in (0, num_replicas)
            assert max(link.num_questions_waiting()) <= 1  # no leader is asked again before it has answered
    user.run_to_the_end()
    for i, (name, prompt) in enumerate(user.prompts.items()):
        expected, _, _ = generate_alone(prompt, _params(i), MAX_MODEL_LEN)
        assert name in user.ended_here or user.received[name] == expected
    stats = client.collect_stats()
    assert [each.num_scheduled_tokens for each in stats] == [loop.scheduler.num_scheduled_tokens for loop in link.loops]
    assert all(each.ranks and each.blocks_used == each.num_running == each.num_waiting == 0 for each in stats)
    client.poll_stats(has_ranks=False)
    while client.poll_stats(has_ranks=False)[0].ranks:
        client.step(user.interrupt)  # type: ignore[arg-type]
    client.close()
    assert link.is_closed_orderly


@settings(max_examples=60, deadline=None)
@given(seed=seeds, num_replicas=st.integers(1, 4))
def test_settings_change_for_all_replicas_at_once_between_requests(seed: int, num_replicas: int) -> None:
    rng = random.Random(seed)
    client, link = _build(num_replicas, rng)
    user = _User(client, rng)
    modes = ("high_throughput", "low_latency", "all_gather")
    starts = []
    for mode in modes:
        client.update_settings(UpdateSettings(ep_mode=mode, max_num_batched_tokens=7))  # type: ignore[arg-type]
        starts.append(len(link.ranks[0].agreements))  # all leaders slept, so what follows is of this mode
        for _ in range(rng.randint(1, 3)):
            user.add(None)
        user.run_to_the_end()
    client.close()
    agreements = link.ranks[0].agreements
    for mode, start, stop in zip(modes, starts, [*starts[1:], len(agreements)], strict=True):
        assert start < stop and all(each.mode == mode for each in agreements[start:stop])
    assert max(max(each.num_tokens) for each in agreements) <= 7
    assert all(ranks.agreements == agreements for ranks in link.ranks)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, async_scheduling=st.booleans())
def test_decode_steps_are_replayed_until_they_are_to_be_eager(seed: int, async_scheduling: bool) -> None:
    rng = random.Random(seed)
    client, link = _build(2, rng, async_scheduling)
    user = _User(client, rng)
    num_replayed = []
    for is_eager in (None, True, False):
        client.update_settings(UpdateSettings(enforce_eager=is_eager, ep_mode="low_latency"))
        start = len(link.ranks[0].agreements)
        for _ in range(4):
            user.add(None)
        user.run_to_the_end()
        num_replayed.append(sum(each.recording is not None for each in link.ranks[0].agreements[start:]))
    client.close()
    assert num_replayed[0] > 0 and num_replayed[1] == 0 and num_replayed[2] > 0
    assert link.ranks[0].agreements == link.ranks[1].agreements


def test_idle_replicas_take_dummy_steps_with_the_busy_one() -> None:
    client, link = _build(3, random.Random(0))
    client.add(AddRequest("a", [1] * 20, SamplingParams(max_tokens=10, ignore_eos=True)), 1)
    while client.has_unfinished():
        client.step()
    stats = client.collect_stats()
    assert [each.num_steps for each in stats] == [0, 11, 0]  # 16 + 4 tokens of the prompt, then 9 decodes
    assert [each.num_dummy_steps for each in stats] == [11, 0, 11]


def test_settings_do_not_change_under_a_request() -> None:
    client, _ = _build(2, random.Random(0))
    client.add(AddRequest("a", [1, 2], SamplingParams()))
    with pytest.raises(RuntimeError, match="1 are unfinished"):
        client.update_settings(UpdateSettings(ep_mode="all_gather"))


def test_a_leader_refuses_to_wake_at_another_step() -> None:
    _, link = _build(2, random.Random(0))
    with pytest.raises(RuntimeError, match="woken for step 3, but this leader sleeps before step 0"):
        link.loops[0].receive(Wake(3))
    link.loops[0].receive(Wake(0))
    with pytest.raises(RuntimeError, match="is awake at step 0"):
        link.loops[0].receive(Wake(0))


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "dp_rank", "message"),
    [
        ([], 1, None, "the prompt is empty"),
        ([1] * 40, 1, None, "40 tokens, but max_model_len is 40"),
        ([1], 1, 2, r"data_parallel_rank \(2\) must be in \[0, dp_size = 2\)"),
        ([1], 1, -1, r"data_parallel_rank \(-1\)"),
    ],
)
def test_a_request_that_cannot_run_is_refused_before_it_is_sent(
    prompt: list[int], max_tokens: int, dp_rank: int | None, message: str
) -> None:
    client, _ = _build(2, random.Random(0))
    with pytest.raises(ValueError, match=message):
        client.add(AddRequest("a", prompt, SamplingParams(max_tokens=max_tokens)), dp_rank)
    assert not client.has_unfinished()


def test_a_request_larger_than_the_cache_is_refused_before_it_is_sent() -> None:
    link = SimulatedLink(1, random.Random(0), POLICY)
    client = ReplicasClient(link, max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE, num_blocks=4)
    with pytest.raises(ValueError, match="need 4 cache blocks of 4 tokens, but the cache has 3"):
        client.add(AddRequest("a", [1] * 10, SamplingParams(max_tokens=5)))


def test_requests_spread_over_replicas_by_tokens() -> None:
    client, link = _build(2, random.Random(0))
    for i, length in enumerate((12, 3, 4, 4, 2)):
        client.add(AddRequest(str(i), [1] * length, SamplingParams(max_tokens=1, ignore_eos=True)))
    assert client.load_balancer.tokens_in_flight == (12, 13)
    client.step()
    assert client.largest_imbalance == pytest.approx(13 * 2 / 25)
    assert link.num_replicas == 2
