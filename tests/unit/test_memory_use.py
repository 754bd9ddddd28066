"""The table that an engine on an accelerator shows at its start."""

from argosy.engine.memory_use import GIB, MemoryUse


def test_parts_and_the_rest_are_the_whole() -> None:
    use = MemoryUse(
        total=140 * GIB,
        weights=39 * GIB,
        cache=60 * GIB,
        num_cache_tokens=1_000_000,
        graphs=GIB,
        num_graphs=45,
        workspace=4 * GIB,
        free=30 * GIB,
    )
    title, *rows = use.lines()
    assert title == "device memory, 140.0 GiB:"
    assert rows[1] == "  cache          60.00 GiB  1,000,000 tokens"
    assert sum(float(row[14:22]) for row in rows) == 140.0
