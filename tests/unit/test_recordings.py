"""Which recording a step replays: all replicas the same one, or none; and what collectives in recordings count."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argosy.config import EPMode
from argosy.distributed.communicator import Communicator
from argosy.distributed.dp_coord import ExchangePolicy, StepAgreement, StepProposal, agree, plan_recordings
from argosy.distributed.flight_recorder import FlightRecorder
from argosy.distributed.recordings import NO_RECORDINGS, RecordingKey, RecordingTable
from argosy.messages import ScheduledBatch

SIZES, LENGTHS = (1, 2, 4, 8, 12), (100, 800, 1000)
LOW_LATENCY = ExchangePolicy("low_latency", 64, 1)


def with_recordings(policy: ExchangePolicy, ep_size: int = 4) -> ExchangePolicy:
    table = plan_recordings(SIZES, LENGTHS, policy, ep_size=ep_size)
    return msgspec.structs.replace(policy, recordings=table)


def agree_on(steps: Sequence[tuple[int, int]], policy: ExchangePolicy | None = None) -> StepAgreement:
    """``steps``: tokens and the decode length of every replica."""
    policy = with_recordings(LOW_LATENCY) if policy is None else policy
    return agree([StepProposal(3, *step) for step in steps], policy)


IDLE, PREFILL = (0, 0), (90, 0)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([(1, 5)], (1, 100)),
        ([(3, 5)], (4, 100)),
        ([(12, 1000)], (12, 1000)),
        ([(13, 5)], None),  # too many
        ([(2, 1001)], None),  # too long
        ([(3, 100), (1, 101)], (4, 800)),  # the largest size, and the longest length, of any
        ([(1, 5), (9, 5)], (12, 100)),
        ([(3, 5), IDLE], (4, 100)),  # who has nothing to do replays it too
        ([IDLE, IDLE, (8, 900), IDLE], (8, 1000)),
        ([(3, 5), PREFILL], None),
        ([PREFILL, IDLE], None),
        ([(1, 5), (13, 5)], None),
        ([IDLE, IDLE], None),
    ],
)
def test_all_replay_the_smallest_recording_that_holds_every_step_or_none(
    steps: list[tuple[int, int]], expected: tuple[int, int] | None
) -> None:
    agreement = agree_on(steps)
    assert agreement.recording == (None if expected is None else RecordingKey(*expected))
    assert agreement.num_tokens == tuple(n or int(agreement.has_work) for n, _ in steps)  # padding is nobody's work
    most = max(agreement.num_tokens) if expected is None else expected[0]
    assert (agreement.max_tokens_per_rank, agreement.mode) == (most, "low_latency")


def test_padding_is_shared_by_the_ranks_of_a_replica() -> None:
    agreement = agree_on([(9, 5), (1, 5)], with_recordings(ExchangePolicy("low_latency", 64, 8)))
    assert agreement.recording == RecordingKey(12, 100) and agreement.max_tokens_per_rank == 2


@pytest.mark.parametrize(
    ("policy", "ep_size", "sizes"),
    [
        (ExchangePolicy("auto", 3, 1), 4, (1, 2)),  # 4 requests are 4 tokens a rank: high throughput
        (ExchangePolicy("auto", 3, 4), 4, SIZES),
        (ExchangePolicy("auto", -1, 1), 4, ()),
        (ExchangePolicy("high_throughput", 64, 1), 4, ()),
        (ExchangePolicy("high_throughput", 64, 1), 1, SIZES),  # nobody to exchange with
        (ExchangePolicy("all_gather", 64, 1), 4, SIZES),
    ],
)
def test_only_what_never_waits_for_counts_is_recorded(
    policy: ExchangePolicy, ep_size: int, sizes: tuple[int, ...]
) -> None:
    table = plan_recordings(SIZES, LENGTHS, policy, ep_size=ep_size)
    assert table.sizes == sizes and len(table.modes) == len(sizes)
    replayed = [agree_on([(n, 5)], msgspec.structs.replace(policy, recordings=table)).recording for n in SIZES]
    assert [key.size for key in replayed if key is not None] == list(sizes)


@pytest.mark.parametrize("mode", ["auto", "high_throughput", "all_gather"])
def test_what_was_recorded_in_another_mode_is_not_replayed(mode: EPMode) -> None:
    policy = msgspec.structs.replace(with_recordings(LOW_LATENCY), ep_mode=mode)
    assert agree_on([(3, 5)], policy).recording == (RecordingKey(4, 100) if mode == "auto" else None)
    fewer = msgspec.structs.replace(policy, ll_max_tokens_per_rank=3)
    assert agree_on([(2, 5)], fewer).recording == (RecordingKey(2, 100) if mode == "auto" else None)
    assert agree_on([(3, 5)], fewer).recording is None  # padded to 4, it would be high throughput


steps = st.tuples(st.integers(0, 14), st.integers(0, 1100)).map(lambda step: step if step[0] else IDLE)
modes = st.sampled_from(["auto", "low_latency", "high_throughput", "all_gather"])


@given(
    st.lists(steps, min_size=1, max_size=5), modes, modes, st.integers(-1, 14), st.integers(-1, 14), st.integers(1, 4)
)
def test_an_agreed_recording_holds_every_step_and_no_smaller_one_does(
    replicas: list[tuple[int, int]], recorded_mode: EPMode, mode: EPMode, recorded_max: int, ll_max: int, ranks: int
) -> None:
    recorded = with_recordings(ExchangePolicy(recorded_mode, recorded_max or 1, ranks))
    policy = msgspec.structs.replace(recorded, ep_mode=mode, ll_max_tokens_per_rank=ll_max or 1)
    agreement = agree_on(replicas, policy)
    eager = agree_on(replicas, msgspec.structs.replace(policy, recordings=NO_RECORDINGS))
    assert agreement.num_tokens == eager.num_tokens
    busy = [step for step in replicas if step[0]]
    key = agreement.recording
    if key is None:
        assert agreement == eager
        return
    assert busy and all(0 < length <= key.length and count <= key.size for count, length in busy)
    assert key.size in policy.recordings.sizes and key.length in LENGTHS
    assert not any(max(n for n, _ in busy) <= size < key.size for size in policy.recordings.sizes)
    assert not any(max(length for _, length in busy) <= length < key.length for length in LENGTHS)
    assert agreement.max_tokens_per_rank == -(-key.size // ranks)
    assert agreement.mode == policy.recordings.mode(key.size) != "high_throughput"


def test_the_largest_recording_is_made_first() -> None:
    keys = RecordingTable((1, 4), (10, 20)).keys()
    assert keys == [RecordingKey(4, 20), RecordingKey(4, 10), RecordingKey(1, 20), RecordingKey(1, 10)]


@pytest.mark.parametrize(
    ("computed", "scheduled", "length"),
    [([], [], 0), ([7], [1], 8), ([7, 30, 2], [1, 1, 1], 31), ([7, 0], [1, 2], 0), ([0], [5], 0), ([0], [1], 1)],
)
def test_a_decode_step_computes_one_token_of_every_request(
    computed: list[int], scheduled: list[int], length: int
) -> None:
    batch = ScheduledBatch(0, list(range(len(computed))), computed, scheduled, num_tokens=sum(scheduled))
    assert batch.decode_length == length


# --- what is counted and watched --------------------------------------------------------------------------------------


@dataclass
class Switch:
    """A device that comes past a mark when it is told to."""

    is_on: bool = False

    def is_completed(self) -> bool:
        return self.is_on


def build_world(recorder: FlightRecorder) -> Communicator:
    """Of two ranks of a card, without a group: a replay sends nothing itself."""
    return Communicator("world", (0, 1), 1, group=None, host_group=None, recorder=recorder, is_host=False)


def test_every_replay_counts_what_its_collectives_send() -> None:
    recorder, tp, ep = FlightRecorder(), {"all_gather": 1000}, dict[str, int]()
    world = build_world(recorder)
    with world.taping() as tape:
        assert recorder.tape is tape
        for _ in range(3):
            tape.add(tp, "all_gather", 10)
            tape.add(ep, "all_gather", 2)
        tape.add(ep, "all_to_all", 5)
    assert recorder.tape is None and (tp, ep) == ({"all_gather": 1000}, {})  # nothing was sent yet
    assert tape.num_collectives == 7 and tape.num_bytes == 41
    for _ in range(2):
        world.replay(tape, lambda: None, lambda: Switch(True))
    assert (tp, ep) == ({"all_gather": 1060}, {"all_gather": 12, "all_to_all": 10})
    ep.clear()  # counters may start anew
    world.replay(tape, lambda: None, lambda: Switch(True))
    assert ep == {"all_gather": 6, "all_to_all": 5}


def test_a_replay_is_one_record_until_the_device_has_come_past_it() -> None:
    recorder, switch = FlightRecorder(), Switch()
    world = build_world(recorder).named("decode steps of up to 8 x 100 tokens")
    with world.taping() as tape:
        tape.add({}, "all_gather", 10)

    def launch() -> str:
        (record,) = recorder.open_records()  # a launch that never returns is seen too
        inner = recorder.start("tp", (0, 1), "all_reduce", "layer 3", (4,), "float32", 16)
        assert record.op == "replay" and inner not in recorder.open_records()
        return "launched"

    assert world.replay(tape, launch, lambda: switch) == "launched"
    (record,) = recorder.open_records()
    assert (record.axis, record.ranks, record.seq, record.num_bytes) == ("world", (0, 1), 1, 10)
    assert record.label == world.label and list(recorder.progress()) == ["world"]
    switch.is_on = True
    assert not recorder.open_records()
    world.replay(tape, lambda: None, lambda: switch)
    assert recorder.progress()["world"].seq == 2


def test_collectives_are_watched_again_after_a_recording_that_failed() -> None:
    recorder = FlightRecorder()
    with pytest.raises(RuntimeError, match="planted"), recorder.taping():
        raise RuntimeError("planted")
    recorder.start("tp", (0, 1), "all_reduce", "", (4,), "float32", 16)
    assert len(recorder.open_records()) == 1
