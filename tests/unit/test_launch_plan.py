"""Which engines a server starts: one a replica where no expert is shared between replicas, else one."""

import pytest

from argosy.config import EngineConfig
from argosy.server.launch_plan import plan_engines


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(),
        EngineConfig(tp_size=4),
        EngineConfig(dp_size=4),  # all ranks share the experts
        EngineConfig(dp_size=4, tp_size=2, ep_size=8),
        EngineConfig(dp_size=4, tp_size=2, ep_size=4),  # two replicas do
        EngineConfig(dp_size=2, ep_size=1, nnodes=2, master_addr="10.0.0.1", master_port=4000),
    ],
)
def test_replicas_that_share_experts_or_nodes_are_one_engine(config: EngineConfig) -> None:
    assert plan_engines(config) == (config,)


@pytest.mark.parametrize(("tp_size", "ep_size"), [(1, 1), (2, 2), (2, 1)])
def test_independent_replicas_are_engines_with_devices_of_their_own(tp_size: int, ep_size: int) -> None:
    plan = plan_engines(EngineConfig(dp_size=3, tp_size=tp_size, ep_size=ep_size, first_device=1, seed=4))
    assert [each.first_device for each in plan] == [1, 1 + tp_size, 1 + 2 * tp_size]
    assert {(each.dp_size, each.tp_size, each.ep_size, each.seed) for each in plan} == {(1, tp_size, ep_size, 4)}


def test_independent_engines_share_no_port_and_no_directory() -> None:
    config = EngineConfig(dp_size=2, tp_size=2, ep_size=2, master_port=4000, flight_recorder_dir="/var/log/argosy")
    plan = plan_engines(config)
    assert [each.master_port for each in plan] == [4000, 4001]
    assert [each.flight_recorder_dir for each in plan] == ["/var/log/argosy/engine-0", "/var/log/argosy/engine-1"]
    assert [each.master_port for each in plan_engines(EngineConfig(dp_size=2, ep_size=1))] == [None, None]


@pytest.mark.parametrize(("num_cores", "num_threads"), [(8, 2), (3, 1), (1, 1)])
def test_independent_engines_share_the_cores_as_ranks_of_one_do(num_cores: int, num_threads: int) -> None:
    config = EngineConfig(dp_size=2, tp_size=2, ep_size=2)
    assert {each.num_threads for each in plan_engines(config, num_cores)} == {num_threads}
    chosen = EngineConfig(dp_size=2, ep_size=1, num_threads=5)
    assert {each.num_threads for each in plan_engines(chosen, num_cores)} == {5}
