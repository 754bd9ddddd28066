"""The block manager alone: counting, sharing, and the order in which freed blocks are reused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from argosy.cache.block_manager import NULL_BLOCK, BlockManager

BLOCK_SIZE = 4
KEY = bytes(range(32))


def build_manager(num_blocks: int = 8, *, enable_prefix_caching: bool = True, hash_key: bytes = KEY) -> BlockManager:
    return BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=enable_prefix_caching, hash_key=hash_key)


def hashes_of(manager: BlockManager, token_ids: list[int], cache_salt: str | None = None) -> list[bytes]:
    block_hashes: list[bytes] = []
    manager.extend_block_hashes(block_hashes, token_ids, cache_salt)
    return block_hashes


def compute(manager: BlockManager, token_ids: list[int], cache_salt: str | None = None) -> list[int]:
    """Blocks as a request holds them once all these tokens are computed."""
    block_ids = manager.allocate(manager.num_blocks_for(len(token_ids)))
    block_hashes = hashes_of(manager, token_ids, cache_salt)
    manager.publish(block_ids, block_hashes, 0, len(block_hashes))
    return block_ids


def match(manager: BlockManager, token_ids: list[int], cache_salt: str | None = None) -> list[int]:
    return manager.match_prefix(hashes_of(manager, token_ids, cache_salt), len(token_ids))


def test_null_block_is_never_given_out() -> None:
    manager = build_manager(5)
    block_ids = manager.allocate(4)
    assert sorted(block_ids) == [1, 2, 3, 4]
    assert NULL_BLOCK not in block_ids
    assert manager.num_free_blocks == 0
    manager.check_integrity([block_ids])


def test_more_than_free_is_refused() -> None:
    manager = build_manager(3)
    with pytest.raises(AssertionError, match=r"allocate\(3\) with 2 blocks free"):
        manager.allocate(3)


def test_freeing_twice_is_refused() -> None:
    manager = build_manager()
    block_ids = manager.allocate(1)
    manager.free(block_ids)
    with pytest.raises(AssertionError, match="freed more often"):
        manager.free(block_ids)


def test_blocks_return_when_the_last_owner_frees_them() -> None:
    manager = build_manager()
    block_ids = compute(manager, list(range(8)))
    manager.acquire(block_ids)
    manager.free(block_ids)
    assert manager.num_free_blocks == 5
    manager.check_integrity([block_ids])
    manager.free(block_ids)
    assert manager.num_free_blocks == 7
    manager.check_integrity([])


def test_only_full_blocks_are_hashed() -> None:
    manager = build_manager()
    assert [len(hashes_of(manager, list(range(n)))) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_hashes_extended_bit_by_bit_equal_hashes_made_at_once() -> None:
    manager = build_manager()
    tokens = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 300_000, 2**31]
    block_hashes: list[bytes] = []
    for length in range(len(tokens) + 1):
        manager.extend_block_hashes(block_hashes, tokens[:length], "salt")
    assert block_hashes == hashes_of(manager, tokens, "salt")


def test_a_hash_depends_on_everything_before_it_and_on_the_key() -> None:
    manager = build_manager()
    tokens = list(range(12))
    changed_first = [99, *tokens[1:]]
    assert all(a != b for a, b in zip(hashes_of(manager, tokens), hashes_of(manager, changed_first), strict=True))
    changed_last = [*tokens[:-1], 99]
    assert hashes_of(manager, tokens)[:2] == hashes_of(manager, changed_last)[:2]
    assert hashes_of(manager, tokens)[2] != hashes_of(manager, changed_last)[2]
    other_key = build_manager(hash_key=bytes(32))
    assert not set(hashes_of(manager, tokens)) & set(hashes_of(other_key, tokens))
    chains = [[b"known parent"], [b"known parent"]]
    for keyed, chain in zip((manager, other_key), chains, strict=True):
        keyed.extend_block_hashes(chain, tokens[:8], None)
    assert chains[0][1] != chains[1][1]


def test_the_same_block_twice_in_a_sequence_has_two_hashes() -> None:
    assert len(set(hashes_of(build_manager(), [1, 2, 3, 4] * 3))) == 3


def test_different_salts_never_share() -> None:
    manager = build_manager(32)
    tokens = list(range(9))
    salts = (None, "", "a", "b", "none", "salt")
    held = [compute(manager, tokens, salt) for salt in salts]
    assert [match(manager, tokens, salt) for salt in salts] == [block_ids[:2] for block_ids in held]
    assert len({block_id for block_ids in held for block_id in block_ids}) == 3 * len(salts)


def test_a_match_is_the_longest_prefix_and_never_the_whole_sequence() -> None:
    manager = build_manager()
    tokens = list(range(12))
    block_ids = compute(manager, tokens)
    assert match(manager, [*tokens, 50]) == block_ids
    assert match(manager, tokens) == block_ids[:2]
    assert match(manager, tokens[:8]) == block_ids[:1]
    assert match(manager, [*tokens[:8], 50, 51, 52, 53, 54]) == block_ids[:2]
    assert match(manager, tokens[:4]) == []
    assert match(manager, [50, *tokens[1:]]) == []


def test_unpublished_blocks_do_not_match() -> None:
    manager = build_manager()
    tokens = list(range(13))
    block_ids = manager.allocate(4)
    block_hashes = hashes_of(manager, tokens)
    assert match(manager, tokens) == []
    manager.publish(block_ids, block_hashes, 0, 1)
    assert match(manager, tokens) == block_ids[:1]
    manager.publish(block_ids, block_hashes, 1, 3)
    assert match(manager, tokens) == block_ids[:3]


def test_a_freed_block_is_revived_with_its_content() -> None:
    manager = build_manager()
    tokens = list(range(9))
    block_ids = compute(manager, tokens)
    manager.free(block_ids)
    matched = match(manager, tokens)
    assert matched == block_ids[:2]
    assert manager.num_free_blocks == 7
    assert manager.num_allocatable_blocks(matched) == 5
    manager.acquire(matched)
    assert manager.num_free_blocks == 5
    assert manager.num_allocatable_blocks(matched) == 5
    manager.check_integrity([matched])


def test_a_reused_block_no_longer_matches() -> None:
    manager = build_manager(4)
    tokens = list(range(13))
    manager.free(compute(manager, tokens[:12]))
    assert len(match(manager, tokens)) == 3
    taken = manager.allocate(3)
    assert match(manager, tokens) == []
    manager.check_integrity([taken])


def test_later_blocks_are_reused_first_and_prefixes_survive() -> None:
    manager = build_manager(4)
    tokens = list(range(13))
    block_ids = compute(manager, tokens[:12])
    manager.free(block_ids)
    for num_left in (2, 1, 0):
        manager.allocate(1)
        assert match(manager, tokens) == block_ids[:num_left]


def test_least_recently_freed_is_reused_first() -> None:
    manager = build_manager(5)
    old, middle, young = ([k] * 5 for k in (1, 2, 3))
    held = [compute(manager, tokens[:4]) for tokens in (old, middle, young)]
    for block_ids in held:
        manager.free(block_ids)
    manager.acquire(match(manager, old))  # used again: now the most recent
    manager.free(held[0])
    manager.allocate(1)  # the block that was never used
    expected = [[1, 0, 1], [1, 0, 0], [0, 0, 0]]
    for row in expected:
        manager.allocate(1)
        assert [len(match(manager, tokens)) for tokens in (old, middle, young)] == row


def test_blocks_without_hash_are_reused_before_cached_ones() -> None:
    manager = build_manager(8)
    tokens = list(range(9))
    manager.free(compute(manager, tokens))
    manager.free(manager.allocate(5))
    manager.allocate(5)
    assert len(match(manager, tokens)) == 2


def test_an_equal_copy_stays_unshared() -> None:
    manager = build_manager()
    tokens = list(range(9))
    first, copy = compute(manager, tokens[:8]), compute(manager, tokens[:8])
    assert match(manager, tokens) == first
    manager.free(copy)
    manager.check_integrity([first])
    assert match(manager, tokens) == first


def test_without_prefix_caching_nothing_matches() -> None:
    manager = build_manager(enable_prefix_caching=False)
    tokens = list(range(9))
    block_ids = compute(manager, tokens)
    assert hashes_of(manager, tokens) == match(manager, tokens) == []
    manager.free(block_ids)
    manager.check_integrity([])


@pytest.mark.parametrize(
    ("num_blocks", "block_size", "hash_key", "message"),
    [
        (1, 4, KEY, r"num_blocks \(1\) must be at least 2"),
        (4, 0, KEY, r"block_size \(0\) must be at least 1"),
        (4, 4, b"short", r"hash_key has 5 bytes, must have 16 to 64"),
        (4, 4, bytes(65), r"hash_key has 65 bytes"),
    ],
)
def test_impossible_sizes_are_refused(num_blocks: int, block_size: int, hash_key: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockManager(num_blocks, block_size, enable_prefix_caching=True, hash_key=hash_key)


def test_check_integrity_notices_a_wrong_owner() -> None:
    manager = build_manager()
    block_ids = manager.allocate(2)
    for owners in ([], [block_ids[:1]], [block_ids, block_ids], [[*block_ids, 7]], [[block_ids[0]] * 2]):
        with pytest.raises(AssertionError):
            manager.check_integrity(owners)


@settings(deadline=None, max_examples=200)
@given(
    num_blocks=st.integers(3, 9),
    actions=st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 12)), max_size=40),
)
def test_a_match_always_holds_what_was_computed(num_blocks: int, actions: list[tuple[bool, int, int]]) -> None:
    manager = build_manager(num_blocks)
    content: dict[int, list[int]] = {}  # block -> the whole sequence up to its end
    owners: list[list[int]] = []
    for is_free, pick, length in actions:
        if is_free and owners:
            manager.free(owners.pop(pick % len(owners)))
        else:
            tokens = [pick % 3, *range(length)]
            matched = match(manager, tokens)
            for i, block_id in enumerate(matched):
                assert content[block_id] == tokens[: (i + 1) * BLOCK_SIZE]
            num_missing = manager.num_blocks_for(len(tokens)) - len(matched)
            if num_missing > manager.num_allocatable_blocks(matched):
                continue
            manager.acquire(matched)
            block_ids = matched + manager.allocate(num_missing)
            for i in range(len(matched), len(block_ids)):
                content[block_ids[i]] = tokens[: (i + 1) * BLOCK_SIZE]
            block_hashes = hashes_of(manager, tokens)
            manager.publish(block_ids, block_hashes, len(matched), len(block_hashes))
            owners.append(block_ids)
        manager.check_integrity(owners)
