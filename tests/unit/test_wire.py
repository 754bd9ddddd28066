"""Messages between processes: complete, in order, for those who know the key; a peer that is not there is an error."""

import asyncio
import contextlib
import time

import msgspec
import pytest
import zmq

from argosy.config import EngineConfig
from argosy.distributed.dp_coord import StepAgreement
from argosy.distributed.recordings import RecordingKey
from argosy.engine import wire
from argosy.engine.meeting_points import DriverHub, LeaderSpoke
from argosy.engine.replica_messages import AddRequest, Command, Idle, PlanMessage, Report, StepPlan, Wake
from argosy.engine.wire import Hub, Spoke
from argosy.messages import AdmittedRequest, ScheduledBatch
from argosy.sampling_params import SamplingParams

PARAMS = SamplingParams(logit_bias={3: 1.5}, stop=("x", "yy"), seed=2**63 - 1, stop_token_ids=(1, 2))


def _hub(host: str | None) -> DriverHub:
    return Hub(msgspec.msgpack.Decoder(Report), host)


def _spoke(hub: DriverHub, peer: int) -> LeaderSpoke:
    return Spoke(msgspec.msgpack.Decoder(Command), hub.address, peer)


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
def test_messages_keep_their_order_both_ways(host: str | None) -> None:
    hub = _hub(host)
    spokes = [_spoke(hub, peer) for peer in range(3)]
    for spoke in spokes:
        for step in range(50):
            spoke.send(Idle(step))
    received: dict[int, list[Report]] = {0: [], 1: [], 2: []}
    while sum(map(len, received.values())) < 150:
        for peer, report in hub.receive(5.0):
            received[peer].append(report)
    assert all(reports == [Idle(step) for step in range(50)] for reports in received.values())
    for step in range(50):
        hub.send_to_all((0, 2), Wake(step))
    for spoke in (spokes[0], spokes[2]):
        commands: list[Command] = []
        while len(commands) < 50:
            commands += spoke.receive(waits=True)
        assert commands == [Wake(step) for step in range(50)]
    assert spokes[1].receive(waits=False) == []
    for end in (*spokes, hub):
        end.close()


def test_every_message_equals_itself_on_the_other_side() -> None:
    add = AddRequest("r#1", list(range(300)), PARAMS, priority=-1, cache_salt="salt")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(add), type=Command) == add  # type: ignore[arg-type]
    admitted = AdmittedRequest(0, "r", [1, 2], 2, 0, [5], PARAMS)
    batch = ScheduledBatch(3, [0, 1], [0, 4], [2, 1], [admitted], [(1, [7])], 3)
    plan = StepPlan(StepAgreement(3, True, (3, 1), 2, "low_latency", RecordingKey(4, 2048)), batch)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=PlanMessage) == plan  # type: ignore[arg-type]
    config = EngineConfig(dp_size=2, tp_size=4, ep_mode="all_gather")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config


def test_a_peer_that_is_not_there_is_an_error() -> None:
    hub = _hub(None)
    with pytest.raises(RuntimeError, match="cannot send to process 7"):
        hub.send(7, Wake(0))
    with pytest.raises(RuntimeError, match=r"ranks \[1, 4\] said nothing within 0.1 s"):
        hub.receive_from((1, 4), 0.1)
    hub.close()


def test_who_does_not_know_the_key_is_not_heard() -> None:
    hub = _hub("127.0.0.1")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.routing_id = b"0"
    stranger.connect(hub.address.endpoint)
    stranger.send(msgspec.msgpack.encode(Idle(0)))
    wrong_key = msgspec.structs.replace(hub.address, public_key=zmq.curve_keypair()[0].decode())
    impostor: LeaderSpoke = Spoke(msgspec.msgpack.Decoder(Command), wrong_key, 1)
    impostor.send(Idle(0))
    assert hub.receive(0.3) == []
    context.destroy(linger=0)
    impostor.close()
    hub.close()


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
def test_the_longest_message_arrives_and_a_longer_one_is_never_sent(
    host: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wire._MAX_MESSAGE_BYTES == 256 * 2**20  # as docs/security.md says; here less, for speed
    monkeypatch.setattr(wire, "_MAX_MESSAGE_BYTES", 4096)
    longest = "x" * (4096 - 3)  # behind a head of three bytes
    with (
        contextlib.closing(Hub[str, str](msgspec.msgpack.Decoder(str), host)) as hub,
        contextlib.closing(Spoke[str, str](msgspec.msgpack.Decoder(str), hub.address, 7)) as spoke,
    ):
        spoke.send(longest)
        assert hub.receive(5.0) == [(7, longest)]
        hub.send(7, longest)
        assert spoke.wait(5.0) and spoke.receive(waits=False) == [longest]
        for send in (spoke.send, lambda text: hub.send(7, text)):
            with pytest.raises(AssertionError, match="a str of 4097 bytes would never arrive"):
                send(longest + "x")


def test_who_sends_more_than_the_limit_is_cut_off_and_others_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_MAX_MESSAGE_BYTES", 4096)
    with (
        contextlib.closing(Hub[str, str](msgspec.msgpack.Decoder(str), None)) as hub,
        contextlib.closing(Spoke[str, str](msgspec.msgpack.Decoder(str), hub.address, 1)) as rude,
        contextlib.closing(Spoke[str, str](msgspec.msgpack.Decoder(str), hub.address, 2)) as polite,
    ):
        for spoke in (rude, polite):
            spoke.send("hello")
        assert hub.receive_from((1, 2), 5.0) == {1: "hello", 2: "hello"}
        events = rude.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        monkeypatch.setattr(wire, "_MAX_MESSAGE_BYTES", 2**20)  # of the sender alone: the hub was built before
        rude.send("x" * 4100)
        assert events.poll(5000), "the connection of who sent too much was not closed"
        polite.send("I am still here")
        assert hub.receive(5.0) == [(2, "I am still here")]
        rude.socket.disable_monitor()


def test_a_spoke_interrupts_the_wait_of_a_hub() -> None:
    """Whichever has something first ends the wait, though they belong to different contexts."""
    waiting, other = _hub(None), _hub(None)
    spoke, interrupt = _spoke(waiting, 0), _spoke(other, 0)
    spoke.send(Idle(1))
    interrupt.send(Idle(2))  # so that the other hub knows it
    assert waiting.receive(5.0) == [(0, Idle(1))]
    assert other.receive(5.0) == [(0, Idle(2))]
    started_s = time.monotonic()
    assert waiting.receive(0.2, interrupt) == [] and time.monotonic() - started_s >= 0.19
    other.send(0, Wake(3))
    assert interrupt.wait(5.0)
    started_s = time.monotonic()
    assert waiting.receive(5.0, interrupt) == [] and time.monotonic() - started_s < 1.0
    assert interrupt.receive(waits=False) == [Wake(3)]
    assert not interrupt.wait(0.0)
    spoke.send(Idle(4))
    assert waiting.receive(5.0, interrupt) == [(0, Idle(4))]
    for end in (spoke, interrupt, waiting, other):
        end.close()
    assert waiting.is_closed


def test_an_event_loop_hears_everything_though_it_is_told_once() -> None:
    """While it sends too, which may use the signal up."""
    hub = _hub(None)
    spokes = [_spoke(hub, peer) for peer in range(4)]
    for spoke in spokes:
        spoke.send(Idle(-1))
    assert len(hub.receive_from((0, 1, 2, 3), 5.0)) == 4
    heard: list[tuple[int, Report]] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(hub.fileno(), lambda: heard.extend(hub.receive(0.0)))
        for step in range(200):
            for spoke in spokes:
                spoke.send(Idle(step))
            hub.send(step % 4, Wake(step))
            loop.call_soon(lambda: heard.extend(hub.receive(0.0)))
            if step % 7 == 0:
                await asyncio.sleep(0)
        async with asyncio.timeout(10.0):
            while len(heard) < 800:
                await asyncio.sleep(0.001)
        loop.remove_reader(hub.fileno())

    asyncio.run(run())
    for peer in range(4):
        assert [report for sender, report in heard if sender == peer] == [Idle(step) for step in range(200)]
    for end in (*spokes, hub):
        end.close()
