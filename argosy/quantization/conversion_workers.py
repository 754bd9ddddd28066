"""The threads of a conversion: each takes the next piece, and whoever finishes a shard's last piece closes the shard.

Torch, file reads and writes all release Python's lock, so threads use the cores that they are given. Invariant: a shard
appears only after all its pieces were written and its record was kept; at most ``num_threads`` shards are open.
"""

import concurrent.futures
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from argosy.quantization.conversion_manifest import ShardErrors
from argosy.quantization.conversion_plan import ShardPlan
from argosy.quantization.convert_rows import ErrorSums
from argosy.quantization.convert_shard import Piece, add_errors, convert_piece, split
from argosy.quantization.file_pieces import NewFile, SourceFiles


@dataclass(slots=True)
class _OpenShard:
    plan: ShardPlan
    file: NewFile
    num_pieces_left: int
    errors: defaultdict[str, list[ErrorSums]] = field(default_factory=lambda: defaultdict(list))


class ConversionWorkers:
    """One run over the shards that are not finished yet."""

    def __init__(
        self,
        directory: Path,
        block_size: tuple[int, int],
        *,
        on_shard: Callable[[ShardPlan, ShardErrors], None],
        on_bytes: Callable[[int], None],
    ) -> None:
        """``on_shard`` keeps a shard's record before its file appears; both callbacks run one at a time."""
        self._directory = directory
        self._block_size = block_size
        self._on_shard = on_shard
        self._on_bytes = on_bytes
        self._source = SourceFiles()
        self._lock = threading.Lock()
        self._is_stopped = threading.Event()
        self._open_shards: list[_OpenShard] = []

    def run(self, plans: list[ShardPlan], num_threads: int) -> None:
        """Convert all of ``plans``; an error or an interrupt ends it between pieces and discards what is half-written.

        Raises:
            ValueError, RuntimeError: as ``convert_piece``.
        """
        pieces = self._open_pieces(plans)
        with _one_torch_thread(), concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
            workers = [pool.submit(self._work, pieces) for _ in range(num_threads)]
            try:
                for worker in concurrent.futures.as_completed(workers):
                    worker.result()
            finally:
                self._is_stopped.set()
                concurrent.futures.wait(workers)
                for shard in self._open_shards:
                    shard.file.discard()
                self._source.close()

    def _open_pieces(self, plans: list[ShardPlan]) -> Iterator[tuple[_OpenShard, Piece]]:
        for plan in plans:
            pieces = [piece for conversion in plan.conversions for piece in split(conversion)]
            shard = _OpenShard(plan, NewFile(self._directory / plan.file_name, plan.num_bytes), len(pieces))
            self._open_shards.append(shard)
            shard.file.write(plan.header, 0)
            for piece in pieces:
                yield shard, piece

    def _work(self, pieces: Iterator[tuple[_OpenShard, Piece]]) -> None:
        torch.set_num_threads(1)  # a thread's own setting
        try:
            while not self._is_stopped.is_set():
                with self._lock:
                    taken = next(pieces, None)
                if taken is None:
                    return
                self._convert(*taken)
        except BaseException:
            self._is_stopped.set()
            raise

    def _convert(self, shard: _OpenShard, piece: Piece) -> None:
        errors = convert_piece(piece, self._block_size, self._source, shard.file)
        with self._lock:
            if errors is not None:
                shard.errors[piece.conversion.name].append(errors)
            shard.num_pieces_left -= 1
            is_last = shard.num_pieces_left == 0
            self._on_bytes(piece.num_source_bytes)
        if is_last:
            self._finish(shard)

    def _finish(self, shard: _OpenShard) -> None:
        shard.file.sync()  # outside of the lock: the other threads go on while the disk writes
        with self._lock:
            self._on_shard(shard.plan, {name: add_errors(parts) for name, parts in sorted(shard.errors.items())})
            shard.file.finish()
            self._open_shards.remove(shard)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Threads take whole pieces; torch must not start threads of its own inside of each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
