"""Random traffic against the scheduler: whatever happens, no rule breaks and no token changes.

What is checked at every step is in ``tests/helpers/scheduler_simulation.py``. Here is what happens: arrivals with
shared prefixes and salts, aborts before, between and inside steps, failed steps, drafts, caches too small for comfort;
with one step at a time, and with the next step planned while one is in flight.
"""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from argosy.engine.request import Request, RequestStatus
from argosy.messages import FinishReason
from tests.helpers.scheduler_simulation import VOCAB_SIZE, Simulation

SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck))
STEMS = [[(7 * i + 3 * j * j) % VOCAB_SIZE for i in range(24)] for j in range(2)]

prompts = st.builds(
    lambda stem, length, tail: STEMS[stem][:length] + tail,
    st.sampled_from([0, 0, 1]),
    st.sampled_from([0, 4, 8, 13, 16]),
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=6),
)
arrivals = st.fixed_dictionaries(
    {
        "prompt_token_ids": prompts,
        "priority": st.sampled_from([0, 0, 0, -1, 1]),
        "cache_salt": st.sampled_from([None, None, None, "", "a"]),
        "max_tokens": st.sampled_from([12, 20, None, 1, 3]),
        "min_tokens": st.sampled_from([0, 0, 1]),
        "ignore_eos": st.sampled_from([True, True, False]),
        "stop_token_ids": st.sampled_from([(), (), (3,), (5, 0)]),
        "prompt_logprobs": st.sampled_from([None, None, 0]),
    }
)
crowds = st.lists(arrivals, min_size=2, max_size=5)


@st.composite
def sizes(draw: st.DrawFn, is_overlapped: bool | None = None) -> dict[str, int]:
    """A cache with room for one long request and a little more, so that requests compete."""
    block_size = draw(st.sampled_from([2, 4, 1]))
    max_model_len = draw(st.sampled_from([40, 24, 12]))
    num_blocks = max_model_len // block_size + draw(st.sampled_from([1, 2, 3, 5, 9, -1]))  # -1: some are refused
    return {
        "num_blocks": max(num_blocks, 2),
        "block_size": block_size,
        "max_num_seqs": draw(st.sampled_from([5, 4, 3, 2, 1])),
        "max_num_batched_tokens": draw(st.sampled_from([24, 8, 5, 3, 2, 1])),
        "max_model_len": max_model_len,
        "enable_prefix_caching": draw(st.sampled_from([True, True, False])),
        "num_drafts": draw(st.sampled_from([0, 0, 1, 3])),
        "is_overlapped": draw(st.booleans()) if is_overlapped is None else is_overlapped,
    }


def try_add(simulation: Simulation, arrival: dict[str, object]) -> Request | None:
    """None where the request is refused; then it must really not fit."""
    try:
        return simulation.add(**arrival)  # type: ignore[arg-type]
    except ValueError:
        prompt_token_ids, max_tokens = arrival["prompt_token_ids"], arrival["max_tokens"]
        limit = simulation.scheduler.max_model_len
        longest = min(len(prompt_token_ids) + (max_tokens or limit), limit)  # type: ignore[arg-type,operator]
        num_slots = simulation.manager.num_usable_blocks * simulation.manager.block_size
        assert len(prompt_token_ids) >= limit or longest - 1 > num_slots  # type: ignore[arg-type]
        return None


class SchedulerMachine(RuleBasedStateMachine):
    is_overlapped = False

    def __init__(self) -> None:
        super().__init__()
        self.simulation = Simulation()

    @initialize(chosen=sizes(is_overlapped=False), together=crowds)
    def build(self, chosen: dict[str, int], together: list[dict[str, object]]) -> None:
        self.simulation = Simulation(**{**chosen, "is_overlapped": self.is_overlapped})
        self.add(together)

    @rule(together=crowds)
    def arrive(self, together: list[dict[str, object]]) -> None:
        self.add(together)

    @rule(num_steps=st.integers(1, 8))
    def run_steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.simulation.step()

    @rule(pick=st.integers(0, 1000), silently=st.booleans())
    def end_between_steps(self, pick: int, silently: bool) -> None:
        self._end(pick, silently)
        self.simulation.scheduler.check_integrity()

    @rule(picks=st.lists(st.integers(0, 1000), min_size=1, max_size=3), silently=st.booleans(), arrival=arrivals)
    def end_in_flight(self, picks: list[int], silently: bool, arrival: dict[str, object]) -> None:
        batch = self.simulation.schedule()
        for pick in picks:
            self._end(pick, silently)
        try_add(self.simulation, arrival)
        self.simulation.scheduler.check_integrity()
        self.simulation.complete(batch)

    @rule(pick=st.integers(0, 1000), is_executed=st.booleans())
    def fail_step(self, pick: int, is_executed: bool) -> None:
        batch = self.simulation.schedule()
        self._end(pick, False)
        if is_executed:  # some of what it wrote is in the cache, and nobody may rely on it
            self.simulation.start(batch)
        self.simulation.cancel()

    def add(self, together: list[dict[str, object]]) -> None:
        for arrival in together:
            try_add(self.simulation, arrival)

    def teardown(self) -> None:
        self.simulation.run()

    def _end(self, pick: int, silently: bool) -> None:
        simulation = self.simulation
        live = simulation.live(RequestStatus.WAITING, RequestStatus.RUNNING, RequestStatus.PREEMPTED)
        if not live:
            return
        name = live[pick % len(live)].request_id
        if silently:
            simulation.silent_ends.add(name)
            assert simulation.scheduler.finish_request(name, FinishReason.STOP)
        else:
            assert simulation.scheduler.abort(name)
        assert not simulation.scheduler.abort(name)


class OverlappedSchedulerMachine(SchedulerMachine):
    is_overlapped = True


TestRandomTraffic = SchedulerMachine.TestCase
TestRandomTraffic.settings = settings(SETTINGS, max_examples=120, stateful_step_count=16)
TestOverlappedTraffic = OverlappedSchedulerMachine.TestCase
TestOverlappedTraffic.settings = settings(SETTINGS, max_examples=120, stateful_step_count=16)


@settings(SETTINGS, max_examples=150)
@given(chosen=sizes(), together=crowds)
def test_everyone_gets_the_tokens_it_would_get_alone(chosen: dict[str, int], together: list[dict[str, object]]) -> None:
    simulation = Simulation(**chosen)
    for arrival in together:
        try_add(simulation, arrival)
    simulation.run()


@settings(SETTINGS, max_examples=60)
@given(
    tails=st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=9), min_size=3, max_size=6),
    is_overlapped=st.booleans(),
)
def test_preemption_and_prefix_hits_change_no_token(tails: list[list[int]], is_overlapped: bool) -> None:
    simulation = Simulation(
        num_blocks=13, block_size=2, max_num_batched_tokens=9, max_model_len=24, is_overlapped=is_overlapped
    )
    for tail in tails:
        simulation.add(STEMS[0][:4] + tail, max_tokens=11)
    simulation.run()
    again = simulation.add(STEMS[0][:4] + tails[0], max_tokens=11)
    simulation.run()
    assert simulation.scheduler.num_preemptions > 0
    assert again.num_cached_tokens > 0
