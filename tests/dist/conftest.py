"""Ranks for the tests of this directory; a worker of pytest-xdist has a pool of its own, idle between its tests."""

from collections.abc import Iterator

import pytest

from tests.helpers.rank_pool import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool(world_size=16)
    yield pool
    pool.close()
