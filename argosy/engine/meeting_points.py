"""Where the processes of an engine find each other's sockets: addresses and keys in the store.

It opens and connects; what is said is ``replica_messages.py``. Invariant: every address is written once, by the process
that listens there, and every wait for one has a deadline and says whose it is.
"""

import msgspec

from argosy.distributed.rendezvous import KeyValueStore, RankStore
from argosy.engine.replica_messages import Command, FollowerReport, PlanMessage, Report
from argosy.engine.wire import Hub, Spoke, WireAddress, own_address_towards

DriverHub = Hub[Command, Report]
LeaderSpoke = Spoke[Report, Command]
PlanHub = Hub[PlanMessage, FollowerReport]
PlanSpoke = Spoke[FollowerReport, PlanMessage]
_DRIVER_KEY = "engine/driver"


def open_driver_hub(store: RankStore, *, is_one_node: bool) -> DriverHub:
    """The driver listens for the leaders."""
    decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)
    hub: DriverHub = Hub(decoder, _host(store, is_one_node))
    _publish(store, _DRIVER_KEY, hub.address)
    return hub


def connect_to_driver(store: KeyValueStore, dp_rank: int, timeout_s: float) -> LeaderSpoke:
    """A leader connects to the driver."""
    decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
    return Spoke(decoder, _look_up(store, _DRIVER_KEY, "the driver", timeout_s), dp_rank)


def open_plan_hub(store: RankStore, dp_rank: int, *, is_one_node: bool) -> PlanHub:
    """A leader listens for the other ranks of its replica."""
    decoder: msgspec.msgpack.Decoder[FollowerReport] = msgspec.msgpack.Decoder(FollowerReport)
    hub: PlanHub = Hub(decoder, _host(store, is_one_node))
    _publish(store, _plan_key(dp_rank), hub.address)
    return hub


def connect_to_leader(store: KeyValueStore, dp_rank: int, rank: int, timeout_s: float) -> PlanSpoke:
    """A rank connects to the leader of its replica."""
    decoder: msgspec.msgpack.Decoder[PlanMessage] = msgspec.msgpack.Decoder(PlanMessage)
    address = _look_up(store, _plan_key(dp_rank), f"the leader of replica {dp_rank}", timeout_s)
    return Spoke(decoder, address, rank)


def _plan_key(dp_rank: int) -> str:
    return f"engine/plans/{dp_rank}"


def _host(store: RankStore, is_one_node: bool) -> str | None:
    return None if is_one_node else own_address_towards(store.address.host)


def _publish(store: KeyValueStore, key: str, address: WireAddress) -> None:
    store.set(key, msgspec.json.encode(address).decode())


def _look_up(store: KeyValueStore, key: str, whose: str, timeout_s: float) -> WireAddress:
    text = store.try_get(key) if store.wait_for(key, timeout_s) else None
    if text is None:
        raise RuntimeError(f"{whose} did not open its socket within {timeout_s:g} s")
    return msgspec.json.decode(text, type=WireAddress)
