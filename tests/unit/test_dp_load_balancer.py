"""The load balancer equalises tokens in flight."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argosy.engine.dp_load_balancer import DPLoadBalancer


def test_ties_go_to_the_lowest_rank() -> None:
    balancer = DPLoadBalancer(3)
    assert [balancer.add(str(i), 5) for i in range(4)] == [0, 1, 2, 0]


def test_tokens_count_and_not_requests() -> None:
    balancer = DPLoadBalancer(2)
    balancer.add("long", 100)
    assert [balancer.add(str(i), 10) for i in range(10)] == [1] * 10
    assert balancer.add("next", 10) == 0  # 100 and 100


def test_output_counts_until_the_request_ends() -> None:
    balancer = DPLoadBalancer(2)
    balancer.add("a", 5)
    balancer.add("b", 6)
    balancer.grow("a", 4)
    balancer.grow("over", 4)
    assert balancer.tokens_in_flight == (9, 6) and balancer.imbalance == pytest.approx(9 / 7.5)
    assert balancer.remove("a") == 0 and balancer.remove("a") is None
    assert balancer.tokens_in_flight == (0, 6) and balancer.imbalance == 2.0
    assert balancer.remove("b") == 1 and balancer.imbalance == 1.0


def test_a_named_replica_gets_the_request_and_a_strange_one_is_refused() -> None:
    balancer = DPLoadBalancer(2)
    assert balancer.add("a", 50, 1) == 1 and balancer.add("b", 50, 1) == 1
    with pytest.raises(ValueError, match=r"data_parallel_rank \(2\).*dp_size = 2.*--dp-size"):
        balancer.add("c", 1, 2)
    with pytest.raises(ValueError, match="'a' is already in use"):
        balancer.add("a", 1)
    assert balancer.num_requests == 2 and balancer.tokens_in_flight == (0, 100)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=50), st.integers(1, 8))
def test_loads_differ_by_less_than_the_largest_request(sizes: list[int], num_replicas: int) -> None:
    balancer = DPLoadBalancer(num_replicas)
    for i, size in enumerate(sizes):
        balancer.add(str(i), size)
    loads = balancer.tokens_in_flight
    assert sum(loads) == sum(sizes) and max(loads) - min(loads) <= max(sizes)
