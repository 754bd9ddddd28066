"""Who holds which block of the paged cache, and which blocks can be shared because they begin alike.

It knows block ids, reference counts and hashes; it never sees requests or tensors, and it never decides who may run.
Invariant: every block is exactly one of null (block 0), free, or referenced; a hash names at most one block, and a
block with a hash holds the keys and values of exactly the tokens that were hashed, after exactly those before them.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

NULL_BLOCK = 0
MIN_HASH_KEY_BYTES = 16
MAX_HASH_KEY_BYTES = 64  # blake2b's limit
HASH_BYTES = 32


class BlockManager:
    """Reference-counted cache blocks with prefix sharing.

    A freed block keeps its hash and can be revived by ``acquire`` until ``allocate`` reuses it. Blocks without a hash
    are reused first; then the least recently freed, and of one sequence the later blocks before the earlier ones.

    ``hash_key``: a secret of this engine, so that nobody outside can construct colliding prefixes.

    Raises:
        ValueError: for sizes that cannot work.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool, hash_key: bytes) -> None:
        if num_blocks < 2:
            raise ValueError(
                f"num_blocks ({num_blocks}) must be at least 2: block 0 is the null block; set --num-blocks"
            )
        if block_size < 1:
            raise ValueError(f"block_size ({block_size}) must be at least 1; set --block-size to 16, 32 or 64")
        if not MIN_HASH_KEY_BYTES <= len(hash_key) <= MAX_HASH_KEY_BYTES:
            raise ValueError(
                f"hash_key has {len(hash_key)} bytes, must have {MIN_HASH_KEY_BYTES} to {MAX_HASH_KEY_BYTES}; "
                "use secrets.token_bytes(32)"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        # Copying a keyed hasher is cheaper than keying a new one: the key is a compressed block of its own.
        self._block_hasher = blake2b(key=hash_key, digest_size=HASH_BYTES, person=b"argosy-block")
        self._root_hasher = blake2b(key=hash_key, digest_size=HASH_BYTES, person=b"argosy-root")
        self._ref_counts = [0] * num_blocks
        self._hash_of_block: list[bytes | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}
        self._free_blank = list(range(num_blocks - 1, NULL_BLOCK, -1))  # a stack: no hash, nothing to lose
        self._free_hashed: OrderedDict[int, None] = OrderedDict()  # least recently freed first

    @property
    def num_free_blocks(self) -> int:
        return len(self._free_blank) + len(self._free_hashed)

    @property
    def num_cached_blocks(self) -> int:
        """Free blocks that still hold a prefix, which ``match_prefix`` may find."""
        return len(self._free_hashed)

    @property
    def num_usable_blocks(self) -> int:
        """All but the null block."""
        return self.num_blocks - 1

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def extend_block_hashes(self, block_hashes: list[bytes], token_ids: Sequence[int], cache_salt: str | None) -> None:
        """Append the hashes of all full blocks of ``token_ids`` that ``block_hashes`` does not cover yet.

        Stays empty when prefix caching is off, and with it everything that follows from hashes.
        """
        block_size = self.block_size
        start = len(block_hashes)
        stop = len(token_ids) // block_size
        if start >= stop or not self.enable_prefix_caching:
            return
        parent = block_hashes[-1] if block_hashes else self._root_hash(cache_salt)
        tokens = array("I", token_ids[start * block_size : stop * block_size])
        data = tokens.tobytes()
        num_bytes = block_size * tokens.itemsize
        for offset in range(0, len(data), num_bytes):
            hasher = self._block_hasher.copy()
            hasher.update(parent + data[offset : offset + num_bytes])
            parent = hasher.digest()
            block_hashes.append(parent)

    def match_prefix(self, block_hashes: Sequence[bytes], num_tokens: int) -> list[int]:
        """Blocks that hold the longest computed prefix of a sequence of ``num_tokens``; no reference is taken.

        Never the whole sequence: at least one token is left to compute, or there would be no logits to sample from.
        """
        block_of_hash = self._block_of_hash
        matched: list[int] = []
        for block_hash in block_hashes[: (num_tokens - 1) // self.block_size]:
            block_id = block_of_hash.get(block_hash)
            if block_id is None:
                break
            matched.append(block_id)
        return matched

    def num_allocatable_blocks(self, matched: Sequence[int]) -> int:
        """Blocks that ``allocate`` could give once ``matched`` were acquired."""
        ref_counts = self._ref_counts
        return self.num_free_blocks - sum(not ref_counts[block_id] for block_id in matched)

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Take a reference on matched blocks, reviving those that were free."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._free_hashed[block_id]
            self._ref_counts[block_id] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Blocks with one reference each and no meaningful content. The caller has checked that so many are free."""
        assert num_blocks <= self.num_free_blocks, f"allocate({num_blocks}) with {self.num_free_blocks} blocks free"
        block_ids: list[int] = []
        for _ in range(num_blocks):
            block_id = self._free_blank.pop() if self._free_blank else self._evict()
            self._ref_counts[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def publish(self, block_ids: Sequence[int], block_hashes: Sequence[bytes], start: int, stop: int) -> None:
        """Make blocks ``start`` to ``stop`` of a sequence matchable. Only after the step that computed them.

        Where an equal block was published before, that one stays the only one: this copy is never shared.
        """
        for block_id, block_hash in zip(block_ids[start:stop], block_hashes[start:stop], strict=False):
            if block_hash not in self._block_of_hash:
                self._block_of_hash[block_hash] = block_id
                self._hash_of_block[block_id] = block_hash

    def free(self, block_ids: Sequence[int]) -> None:
        """Drop one reference on each block of a sequence, given in the sequence's order."""
        ref_counts = self._ref_counts
        for block_id in reversed(block_ids):  # NOTE(order): later blocks are reused first, so that prefixes survive
            assert ref_counts[block_id] > 0, f"block {block_id} freed more often than referenced"
            ref_counts[block_id] -= 1
            if ref_counts[block_id] > 0:
                continue
            if self._hash_of_block[block_id] is None:
                self._free_blank.append(block_id)
            else:
                self._free_hashed[block_id] = None

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Assert the invariants, given the block ids of every sequence that holds blocks. For tests: linear time."""
        expected = [0] * self.num_blocks
        for block_ids in owners:
            assert len(set(block_ids)) == len(block_ids), f"a sequence holds a block twice: {block_ids}"
            for block_id in block_ids:
                expected[block_id] += 1
        assert expected == self._ref_counts, f"owners {expected} but reference counts {self._ref_counts}"
        free = {*self._free_blank, *self._free_hashed}
        assert len(free) == self.num_free_blocks, f"a block is free twice: {self._free_blank} {[*self._free_hashed]}"
        for block_id in range(self.num_blocks):
            states = (block_id == NULL_BLOCK, block_id in free, expected[block_id] > 0)
            assert sum(states) == 1, f"block {block_id}: (null, free, referenced) = {states}"
        hashed = {block_hash: i for i, block_hash in enumerate(self._hash_of_block) if block_hash is not None}
        assert hashed == self._block_of_hash, "hash table and block hashes disagree"
        assert len(hashed) == sum(block_hash is not None for block_hash in self._hash_of_block), "two blocks, one hash"
        assert all(self._hash_of_block[i] is None for i in self._free_blank), "a blank block has a hash"
        assert all(self._hash_of_block[i] is not None for i in self._free_hashed), "a free hashed block has no hash"

    def _root_hash(self, cache_salt: str | None) -> bytes:
        hasher = self._root_hasher.copy()
        hasher.update(b"none" if cache_salt is None else b"salt" + cache_salt.encode("utf-8", "surrogatepass"))
        return hasher.digest()

    def _evict(self) -> int:
        block_id, _ = self._free_hashed.popitem(last=False)
        block_hash = self._hash_of_block[block_id]
        assert block_hash is not None, f"free block {block_id} is kept as hashed but has no hash"
        del self._block_of_hash[block_hash]
        self._hash_of_block[block_id] = None
        return block_id
