"""Ranks, groups and owners of experts: against the plan's table, against counting by hand, and what is refused."""

import itertools
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argosy.distributed.layout import Axis, Coords, ModelSizes, ParallelLayout

PLAN = ParallelLayout(dp_size=2, tp_size=8)
DEEPSEEK = ModelSizes(
    num_attention_heads=128,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    vocab_size=129280,
    n_routed_experts=256,
)
PARTITIONS: tuple[Axis, ...] = ("tp", "cp", "dp", "ep", "replica")


@st.composite
def layouts(draw: st.DrawFn) -> ParallelLayout:
    dp_size, cp_size, tp_size = (draw(st.integers(1, high)) for high in (5, 4, 8))
    world_size = dp_size * cp_size * tp_size
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    ep_size = draw(st.none() | st.sampled_from(divisors))
    return ParallelLayout(dp_size=dp_size, cp_size=cp_size, tp_size=tp_size, ep_size=ep_size)


# --- the plan's table -----------------------------------------------------------------------------------------------


def test_two_nodes_of_eight_have_the_groups_of_the_plan() -> None:
    assert PLAN.world_size == 16
    assert PLAN.groups("tp") == (tuple(range(8)), tuple(range(8, 16)))
    assert PLAN.groups("dp") == ((0, 8), (1, 9), (2, 10), (3, 11), (4, 12), (5, 13), (6, 14), (7, 15))
    assert PLAN.groups("ep") == (tuple(range(16)),)
    assert PLAN.groups("cp") == tuple((rank,) for rank in range(16))
    assert PLAN.groups("replica") == PLAN.groups("tp")
    assert PLAN.groups("leaders") == ((0, 8),)


def test_two_nodes_of_eight_share_the_experts_of_deepseek() -> None:
    assert PLAN.num_ep_ranks == 16
    assert PLAN.local_expert_ids(0, 256) == range(0, 16)
    assert PLAN.local_expert_ids(15, 256) == range(240, 256)
    assert PLAN.owner_of_expert(17, 256) == 1
    PLAN.check_model(DEEPSEEK)


def test_each_node_of_the_plan_holds_one_replica() -> None:
    assert PLAN.ranks_of_node(0, 2) == range(0, 8)
    assert PLAN.ranks_of_node(1, 2) == range(8, 16)
    assert PLAN.coords(9) == Coords(dp=1, cp=0, tp=1, ep=9)


def test_context_parallel_ranks_lie_between_replicas_and_tensor_parallel_ones() -> None:
    layout = ParallelLayout(dp_size=2, cp_size=2, tp_size=2, ep_size=4)
    assert layout.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.groups("cp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert layout.groups("dp") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert layout.groups("ep") == layout.groups("replica") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert layout.coords(6) == Coords(dp=1, cp=1, tp=0, ep=2)


def test_one_rank_is_every_group() -> None:
    layout = ParallelLayout()
    assert all(layout.groups(axis) == ((0,),) for axis in (*PARTITIONS, "leaders"))
    assert layout.local_expert_ids(0, 256) == range(256)
    assert layout.is_leader(0)


# --- for every layout -----------------------------------------------------------------------------------------------


@given(layouts())
def test_ranks_count_through_tp_then_cp_then_dp(layout: ParallelLayout) -> None:
    counted = itertools.product(range(layout.dp_size), range(layout.cp_size), range(layout.tp_size))
    for rank, (dp_rank, cp_rank, tp_rank) in enumerate(counted):
        coords = layout.coords(rank)
        assert (coords.dp, coords.cp, coords.tp) == (dp_rank, cp_rank, tp_rank)
    assert rank == layout.world_size - 1


@given(layouts(), st.sampled_from(PARTITIONS))
def test_groups_of_an_axis_partition_the_ranks(layout: ParallelLayout, axis: Axis) -> None:
    groups = layout.groups(axis)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    assert len({len(group) for group in groups}) == 1
    assert all(layout.group_of(axis, rank) == group for group in groups for rank in group)


@given(layouts(), st.sampled_from(("tp", "cp", "dp", "ep")))
def test_place_in_a_group_is_the_coordinate(layout: ParallelLayout, axis: Axis) -> None:
    for group in layout.groups(axis):
        assert [getattr(layout.coords(rank), axis) for rank in group] == list(range(len(group)))


@given(layouts())
def test_ranks_of_a_group_differ_in_its_axis_only(layout: ParallelLayout) -> None:
    for axis, others in (("tp", ("dp", "cp")), ("cp", ("dp", "tp")), ("dp", ("cp", "tp"))):
        for group in layout.groups(axis):
            assert len({tuple(getattr(layout.coords(rank), name) for name in others) for rank in group}) == 1


@given(layouts())
def test_every_replica_has_one_leader_its_first_rank(layout: ParallelLayout) -> None:
    leaders = [rank for rank in range(layout.world_size) if layout.is_leader(rank)]
    assert layout.groups("leaders") == (tuple(leaders),)
    assert leaders == [min(group) for group in layout.groups("replica")]
    assert leaders == [layout.leader_of(dp_rank) for dp_rank in range(layout.dp_size)]


@given(layouts(), st.integers(1, 16))
def test_every_expert_has_one_owner(layout: ParallelLayout, experts_per_rank: int) -> None:
    num_experts = layout.num_ep_ranks * experts_per_rank
    owned = [layout.local_expert_ids(ep_rank, num_experts) for ep_rank in range(layout.num_ep_ranks)]
    assert [expert_id for expert_ids in owned for expert_id in expert_ids] == list(range(num_experts))
    owners = [layout.owner_of_expert(expert_id, num_experts) for expert_id in range(num_experts)]
    assert all(expert_id in owned[owner] for expert_id, owner in enumerate(owners))
    assert set(Counter(owners).values()) == {experts_per_rank}


@given(layouts(), st.data())
def test_nodes_hold_equal_blocks_of_ranks(layout: ParallelLayout, data: st.DataObject) -> None:
    divisors = [size for size in range(1, layout.world_size + 1) if layout.world_size % size == 0]
    nnodes = data.draw(st.sampled_from(divisors))
    ranks = [rank for node_rank in range(nnodes) for rank in layout.ranks_of_node(node_rank, nnodes)]
    assert ranks == list(range(layout.world_size))
    assert len(layout.ranks_of_node(0, nnodes)) == layout.world_size // nnodes


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dp_size", "cp_size", "tp_size", "ep_size"])
@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2"])
def test_size_that_is_no_positive_integer_is_refused(name: str, value: object) -> None:
    message = f"{name} must be an integer >= 1, got {value!r}; set --{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ParallelLayout(**{name: value})  # type: ignore[arg-type]


def test_ep_size_must_divide_the_ranks() -> None:
    message = "world_size (8 = dp_size 2 x tp_size 4) must be divisible by ep_size (3); set --ep-size to 1, 2, 4, 8"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ParallelLayout(dp_size=2, tp_size=4, ep_size=3)


def test_experts_must_be_divisible_by_ep_size() -> None:
    layout = ParallelLayout(tp_size=12, ep_size=6)
    message = "num_experts (256) must be divisible by ep_size (6); set --ep-size to 1, 2, 4"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        layout.local_expert_ids(0, 256)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        layout.owner_of_expert(0, 256)


def test_default_ep_size_says_where_it_comes_from() -> None:
    message = "ep_size (12, which is the world_size 12 = dp_size 3 x tp_size 4); set --ep-size to 1, 2, 4"
    with pytest.raises(ValueError, match=re.escape(message)):
        ParallelLayout(dp_size=3, tp_size=4).check_model(DEEPSEEK)


@pytest.mark.parametrize(
    ("sizes", "start"),
    [
        (
            {"num_attention_heads": 12},
            "num_attention_heads (12) must be divisible by tp_size (8); set --tp-size to 1, 2, 4",
        ),
        (
            {"intermediate_size": 20},
            "intermediate_size (20) must be divisible by tp_size (8); set --tp-size to 1, 2, 4",
        ),
        ({"vocab_size": 42}, "vocab_size (42) must be divisible by tp_size (8); set --tp-size to 1, 2"),
        ({"n_routed_experts": 24}, "num_experts (24) must be divisible by ep_size (16"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be >= 1, got 0"),
    ],
)
def test_model_that_cannot_be_divided_is_refused(sizes: dict[str, int], start: str) -> None:
    known = {name: getattr(DEEPSEEK, name) for name in ModelSizes.__dataclass_fields__}
    with pytest.raises(ValueError, match=f"^{re.escape(start)}"):
        PLAN.check_model(ModelSizes(**(known | sizes)))


def test_experts_are_not_split_by_tp() -> None:
    known = {name: getattr(DEEPSEEK, name) for name in ModelSizes.__dataclass_fields__}
    PLAN.check_model(ModelSizes(**(known | {"moe_intermediate_size": 7})))


def test_suggested_tp_size_fits_every_size_of_the_model() -> None:
    # 12 heads alone would allow 6 and 12; 20 and 42 together with them leave 1 and 2.
    sizes = ModelSizes(
        num_attention_heads=12, intermediate_size=20, moe_intermediate_size=1, vocab_size=42, n_routed_experts=16
    )
    with pytest.raises(ValueError, match="set --tp-size to 1, 2$"):
        PLAN.check_model(sizes)


def test_number_of_processes_must_be_the_product_of_the_sizes() -> None:
    PLAN.check_world_size(16)
    message = (
        "8 processes were started (WORLD_SIZE) but world_size is 16 = dp_size 2 x tp_size 8; "
        "start 16 processes, or set --dp-size and --tp-size to a product of 8"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PLAN.check_world_size(8)


@pytest.mark.parametrize("rank", [-1, 16])
def test_rank_outside_the_world_is_refused(rank: int) -> None:
    message = re.escape(f"rank ({rank}) must be in [0, world_size = 16 = dp_size 2 x tp_size 8)")
    with pytest.raises(ValueError, match=message):
        PLAN.coords(rank)
    with pytest.raises(ValueError, match=message):
        PLAN.is_leader(rank)
    with pytest.raises(ValueError, match=message):
        PLAN.group_of("tp", rank)


def test_places_outside_their_axis_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("dp_rank (2) must be in [0, dp_size = 2)")):
        PLAN.leader_of(2)
    with pytest.raises(ValueError, match=re.escape("ep_rank (16) must be in [0, ep_size = 16)")):
        PLAN.local_expert_ids(16, 256)
    with pytest.raises(ValueError, match=re.escape("expert_id (256) must be in [0, num_experts = 256)")):
        PLAN.owner_of_expert(256, 256)
    with pytest.raises(
        ValueError, match=re.escape("world_size (16 = dp_size 2 x tp_size 8) must be divisible by nnodes (3)")
    ):
        PLAN.ranks_of_node(0, 3)
    with pytest.raises(ValueError, match=re.escape("node_rank (2) must be in [0, nnodes = 2)")):
        PLAN.ranks_of_node(2, 2)


def test_leaders_group_is_refused_to_a_rank_that_leads_nothing() -> None:
    assert PLAN.group_of("leaders", 8) == (0, 8)
    with pytest.raises(ValueError, match=re.escape("rank 9 is in no group of leaders: the leaders are (0, 8)")):
        PLAN.group_of("leaders", 9)


def test_unknown_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="axis must be tp, cp, dp, ep, replica or leaders, got 'pp'"):
        PLAN.groups("pp")  # type: ignore[arg-type]
