"""Messages between processes: complete, in order, for those who know the key; a peer that is not there is an error."""

import msgspec
import pytest
import zmq

from argosy.config import EngineConfig
from argosy.distributed.dp_coord import StepAgreement
from argosy.distributed.recordings import RecordingKey
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
