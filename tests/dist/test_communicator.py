"""Every collective against plain arithmetic on one process, and its bytes against the formula."""

import time
import pytest
import torch

from argosy.distributed.communicator import Communicator
from argosy.distributed.layout import ParallelLayout
from argosy.platforms.cpu import PastMark
from tests.helpers.rank_pool import PoolContext, RankPool

WORLDS = (2, 3, 4)
DTYPES = (torch.float32, torch.bfloat16, torch.int32, torch.uint8)


def filled(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small whole numbers, so that sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(1000 + rank)
    return torch.randint(0, 5, shape, generator=generator).to(dtype)


def equal_shapes(context: PoolContext, dtype: torch.dtype) -> None:
    ep = context.communicator()
    n, rank = ep.size, ep.rank
    inputs = [filled(r, n * 3, 5, dtype=dtype) for r in range(n)]
    total = torch.stack(inputs).sum(0).to(dtype)
    mine = inputs[rank]
    assert torch.equal(ep.all_reduce(mine.clone()), total)
    assert torch.equal(ep.all_gather(mine), torch.cat(inputs))
    assert torch.equal(ep.start_all_gather(mine).wait(), torch.cat(inputs))
    assert torch.equal(ep.reduce_scatter(mine), total[rank * 3 : rank * 3 + 3])
    assert torch.equal(ep.start_reduce_scatter(mine).wait(), total[rank * 3 : rank * 3 + 3])
    boxes = [x.view(n, 3, 5) for x in inputs]
    assert torch.equal(ep.start_all_to_all(boxes[rank]).wait(), torch.stack([box[rank] for box in boxes]))
    assert torch.equal(ep.broadcast(mine.clone(), n - 1), inputs[-1])
    ep.barrier()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world", WORLDS)
def test_equal_shapes(rank_pool: RankPool, world: int, dtype: torch.dtype) -> None:
    rank_pool.run(equal_shapes, dtype, world=world)


def uneven(context: PoolContext, counts: list[int]) -> None:
    ep = context.communicator()
    rank = ep.rank
    starts = [sum(counts[:r]) for r in range(ep.size + 1)]
    inputs = [filled(r, counts[r], 5) for r in range(ep.size)]
    assert torch.equal(ep.all_gather_v(inputs[rank], counts), torch.cat(inputs))
    partials = [filled(r, sum(counts), 5) for r in range(ep.size)]
    total = torch.stack(partials).sum(0)
    assert torch.equal(ep.reduce_scatter_v(partials[rank], counts), total[starts[rank] : starts[rank + 1]])


@pytest.mark.parametrize("counts", [[4, 4, 4], [4, 4, 1], [4, 2, 0], [0, 0, 0], [0, 3, 1], [0, 0, 7], [1, 4, 4]])
def test_uneven_rows(rank_pool: RankPool, counts: list[int]) -> None:
    rank_pool.run(uneven, counts, world=len(counts))


def all_to_all_v(context: PoolContext, matrix: list[list[int]], dtype: torch.dtype) -> int:
    ep = context.communicator()
    rank = ep.rank

    def parcel(source: int, destination: int) -> torch.Tensor:
        return filled(source * 7 + destination, matrix[source][destination], 6, dtype=torch.float32).to(dtype)

    x = torch.cat([parcel(rank, r) for r in range(ep.size)])
    expected = torch.cat([parcel(r, rank) for r in range(ep.size)])
    pending = ep.start_all_to_all_v(x, matrix[rank], [row[rank] for row in matrix])
    got = pending.wait()
    assert got.dtype == dtype
    assert torch.equal(got.float(), expected.float())
    return ep.bytes_sent["all_to_all_v"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    "matrix",
    [[[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[0, 0, 0], [3, 0, 1], [0, 2, 0]], [[0, 0, 0]] * 3, [[9, 0, 0]] * 3],
    ids=["full", "some empty", "nothing", "all to one"],
)
def test_all_to_all_v_moves_rows_and_counts_bytes(
    rank_pool: RankPool, matrix: list[list[int]], dtype: torch.dtype
) -> None:
    sent = rank_pool.run(all_to_all_v, matrix, dtype, world=3)
    assert sent == [(sum(row) - row[r]) * 6 * dtype.itemsize for r, row in enumerate(matrix)]


def bytes_by_formula(context: PoolContext) -> dict[str, int]:
    ep = context.communicator()
    named = ep.named("layer 3 attention")
    x = torch.ones(4, 10)
    named.all_reduce(x)
    ep.all_gather(x)
    ep.reduce_scatter(x)
    ep.start_all_to_all(x).wait()
    ep.broadcast(x, 1)
    ep.all_gather_ints([1, 2])
    counted = dict(ep.bytes_sent)
    named.reset_counters()
    assert ep.bytes_sent == {}
    return counted


def waited_for_a_slow_rank(context: PoolContext) -> tuple[dict[str, float], dict[str, float]]:
    ep = context.communicator()
    ep.barrier()
    ep.reset_counters()
    if ep.rank == 1:
        time.sleep(0.3)
    ep.named("layer 3 attention").all_reduce(torch.ones(4))
    waited = dict(ep.waited_s)
    ep.reset_counters()
    return waited, ep.waited_s


def test_waiting_for_a_slow_rank_is_counted(rank_pool: RankPool) -> None:
    (quick, after_reset), (slow, _) = rank_pool.run(waited_for_a_slow_rank, world=2)
    assert list(quick) == list(slow) == ["all_reduce"] and after_reset == {}
    assert quick["all_reduce"] > 0.2 and 0 < slow["all_reduce"] < quick["all_reduce"]


def test_bytes_follow_the_formula(rank_pool: RankPool) -> None:
    results = rank_pool.run(bytes_by_formula, world=4)
    expected = {"all_reduce": 240, "all_gather": 480, "reduce_scatter": 120, "all_to_all": 120}
    for rank, counted in enumerate(results):
        assert counted == {**expected, "broadcast": 480 if rank == 1 else 0, "all_gather_ints": 48}


def ints(context: PoolContext) -> list[list[int]]:
    return context.communicator().all_gather_ints([context.rank, 2**40 + context.rank])


def test_integers_arrive_in_rank_order(rank_pool: RankPool) -> None:
    assert rank_pool.run(ints, world=3) == [[[r, 2**40 + r] for r in range(3)]] * 3


def mesh_sums(context: PoolContext, layout: ParallelLayout) -> dict[str, list[int]]:
    mesh = context.mesh(layout)
    groups = {}
    for communicator in (mesh.world, mesh.tp, mesh.ep, mesh.leaders):
        gathered = communicator.all_gather(torch.tensor([context.rank]))
        groups[communicator.axis] = gathered.tolist()
    return groups


@pytest.mark.parametrize(
    "layout",
    [ParallelLayout(dp_size=2, tp_size=8), ParallelLayout(dp_size=4, tp_size=2, ep_size=4), ParallelLayout(tp_size=3)],
)
def test_mesh_groups_are_those_of_the_layout(rank_pool: RankPool, layout: ParallelLayout) -> None:
    results = rank_pool.run(mesh_sums, layout, world=layout.world_size)
    for rank, groups in enumerate(results):
        assert groups["world"] == list(range(layout.world_size))
        assert tuple(groups["tp"]) == layout.group_of("tp", rank)
        assert tuple(groups["ep"]) == layout.group_of("ep", rank)
        assert groups["leaders"] == (list(layout.groups("leaders")[0]) if layout.is_leader(rank) else [rank])


def fails_on_one_rank(context: PoolContext) -> None:
    if context.rank == 1:
        raise ValueError("planted")
    context.communicator().barrier()


def test_pool_recovers_from_a_failure() -> None:
    pool = RankPool(world_size=3)
    try:
        with pytest.raises(RuntimeError, match="rank 1: (.|\n)*planted"):
            pool.run(fails_on_one_rank)
        pool.run(ints, world=2)
    finally:
        pool.close()


def test_one_rank_needs_no_group() -> None:
    local = Communicator.local("tp")
    x = torch.randn(3, 4)
    assert local.all_reduce(x) is x
    assert local.all_gather_v(x, [3]) is x
    assert local.reduce_scatter_v(x, [3]) is x
    assert local.start_all_to_all_v(x, [3], [3]).wait() is x
    assert local.all_gather_ints([5, 6]) == [[5, 6]]
    local.barrier()
    assert local.bytes_sent == {}


def count_on_a_tape(context: PoolContext) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Counters after recording, after one replay, and after an eager round of the same."""
    ep = context.communicator()

    def run() -> None:
        ep.named("layer 2 experts").all_gather(torch.ones(2, 3))
        ep.all_gather(torch.ones(5))
        ep.all_reduce(torch.ones(4))

    with ep.taping() as tape:
        run()
    recorded = dict(ep.bytes_sent)
    ep.replay(tape, lambda: None, PastMark)  # as a card does: nothing of it is seen on the host
    replayed = dict(ep.bytes_sent)
    ep.reset_counters()
    run()
    return recorded, replayed, dict(ep.bytes_sent)


def test_collectives_on_a_tape_count_at_each_replay_what_they_count_eagerly(rank_pool: RankPool) -> None:
    for recorded, replayed, eager in rank_pool.run(count_on_a_tape, world=4):
        assert recorded == {} and replayed == eager == {"all_gather": 44 * 3, "all_reduce": 24}
