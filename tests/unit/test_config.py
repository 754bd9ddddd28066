"""What ``EngineConfig`` refuses about ranks, nodes and waits: each message with its numbers and the flag to change."""

import re

import pytest

from argosy.config import EngineConfig

TWO_NODES: dict[str, object] = {"nnodes": 2, "master_addr": "10.0.0.1", "master_port": 29500}


def build(settings: dict[str, object]) -> EngineConfig:
    return EngineConfig(**settings)  # type: ignore[arg-type]


def test_default_is_one_rank_on_one_node() -> None:
    config = EngineConfig()
    assert (config.world_size, config.nnodes, config.ep_size) == (1, 1, None)


def test_sixteen_cards_on_two_nodes() -> None:
    for node_rank in range(2):
        config = build({"tp_size": 8, "dp_size": 2, "ep_size": 16, "node_rank": node_rank, **TWO_NODES})
        assert config.world_size == 16


@pytest.mark.parametrize("name", ["tp_size", "dp_size", "ep_size", "nnodes"])
@pytest.mark.parametrize("value", [0, -2, True, 1.0])
def test_size_that_is_no_positive_integer_is_refused(name: str, value: object) -> None:
    message = f"{name} must be an integer >= 1, got {value!r}; set --{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build({name: value})


def test_nodes_must_hold_equal_shares() -> None:
    message = "world_size (8 = dp_size 2 x tp_size 4) must be divisible by nnodes (3)"
    with pytest.raises(ValueError, match=re.escape(message) + ".*set --nnodes, --dp-size or --tp-size$"):
        build({"tp_size": 4, "dp_size": 2} | TWO_NODES | {"nnodes": 3})


@pytest.mark.parametrize("node_rank", [2, 7])
def test_node_rank_must_be_below_nnodes(node_rank: int) -> None:
    message = f"node_rank ({node_rank}) must be below nnodes (2); set --node-rank to 0 .. 1, or raise --nnodes"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build({"tp_size": 2, "node_rank": node_rank} | TWO_NODES)


def test_node_rank_without_nnodes_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("node_rank (1) must be below nnodes (1)")):
        build({"node_rank": 1})


@pytest.mark.parametrize("missing", ["master_addr", "master_port"])
def test_several_nodes_need_a_place_to_meet(missing: str) -> None:
    with pytest.raises(ValueError, match=rf"nnodes \(2\) .*{missing} None.*set --master-addr and --master-port"):
        build({"tp_size": 2} | TWO_NODES | {missing: None})


@pytest.mark.parametrize(
    ("port", "rule"), [(0, "must be an integer >= 1"), (65536, "must be at most 65535"), (True, "must be an integer")]
)
def test_impossible_port_is_refused(port: object, rule: str) -> None:
    with pytest.raises(ValueError, match=f"^master_port .*{rule}.*set --master-port$"):
        build({"master_port": port})


def test_port_of_a_single_node_may_be_chosen() -> None:
    assert EngineConfig(master_port=65535).master_port == 65535


@pytest.mark.parametrize("name", ["collective_timeout_s", "startup_timeout_s", "weights_timeout_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan"), True, "30"])
def test_every_wait_is_bounded(name: str, value: object) -> None:
    message = f"{name} must be a number of seconds > 0, got {value!r}; set --{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build({name: value})


def test_whole_seconds_are_seconds() -> None:
    assert EngineConfig(collective_timeout_s=5).collective_timeout_s == 5


@pytest.mark.parametrize("value", [0, -2, True])
def test_low_latency_limit_is_minus_one_or_positive(value: object) -> None:
    with pytest.raises(ValueError, match="^ll_max_tokens_per_rank must be .*set --ll-max-tokens-per-rank"):
        build({"ll_max_tokens_per_rank": value})


def test_low_latency_never_contradicts_low_latency_always() -> None:
    assert EngineConfig(ll_max_tokens_per_rank=-1).ep_mode == "auto"
    with pytest.raises(ValueError, match="set one of --ep-mode high_throughput and --ll-max-tokens-per-rank 64$"):
        EngineConfig(ll_max_tokens_per_rank=-1, ep_mode="low_latency")


@pytest.mark.parametrize(
    "place", [{"device": "cpu"}, {"nnodes": 2, "dp_size": 2, "master_addr": "host", "master_port": 5000}]
)
def test_shared_memory_needs_cards_of_one_node(place: dict[str, object]) -> None:
    build({"ll_transport": "collective"} | place)
    assert build({"ll_transport": "symmetric", "dp_size": 2}).ll_transport == "symmetric"
    with pytest.raises(ValueError, match="^ll_transport symmetric needs NVIDIA cards of one node.*--ll-transport coll"):
        build({"ll_transport": "symmetric"} | place)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("ep_mode", "auto, low_latency, high_throughput, all_gather"),
        ("ep_payload", "model, int8, fp8"),
        ("ll_transport", "collective, symmetric"),
    ],
)
def test_unknown_choice_is_refused(name: str, known: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"^{name} must be one of {known}, got 'fast'; set {flag}$"):
        build({name: "fast"})
