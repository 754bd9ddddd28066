"""Ranks for the tests of this directory. One xdist worker runs them all: two pools would be thirty-two processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.rank_pool import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool(world_size=16)
    yield pool
    pool.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With ``--dist loadgroup`` xdist keeps a group on one worker."""
    directory = Path(__file__).parent
    for item in items:
        if directory in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("ranks"))
