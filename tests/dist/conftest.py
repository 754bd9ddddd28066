"""Ranks for the tests of this directory, which run one after another: two pools would be thirty-two processes."""

from collections.abc import Iterator

import pytest

from tests.helpers.rank_pool import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool(world_size=16)
    yield pool
    pool.close()
