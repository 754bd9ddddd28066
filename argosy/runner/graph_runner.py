"""Decode steps as device graphs: recorded once for each of a few batch sizes, replayed with one call.

A step of one token a request launches hundreds of kernels of a few microseconds, and the host is slower than that. A
recording has fixed shapes and addresses, so a batch is copied into static tensors and padded to the next size that was
recorded; padding rows write no slot and attend to one entry of the null block. What depends on how long sequences are
is recorded for a few longest lengths. Invariant: a replay gives what the model gives for the same batch run eagerly,
within the rounding of products of another height.

With several ranks, collectives are in the recordings: all ranks make the same ones in the same order, and which one a
step replays is agreed on by all (``dp_coord.py``). The head is not recorded: its output is large, and its launch is
hidden behind the replay.

Shape letters: B requests, n recorded batch size, D hidden, t this rank's slice of n.
"""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from argosy.cache.mla_kv_cache import MLAKVCache
from argosy.distributed.communicator import Communicator
from argosy.distributed.ep_types import ExchangeOf, exchange_nothing
from argosy.distributed.flight_recorder import CollectiveTape
from argosy.distributed.recordings import RecordingKey, RecordingTable
from argosy.kernels import RotaryTable, fill_decode_inputs, rotary_rows
from argosy.layers.forward_batch import AttentionMetadata, ForwardBatch
from argosy.models.deepseek.model import DeepseekV32Model
from argosy.platforms import DeviceGraph, Platform, SideLane

# Between neighbours at most a third of a batch is padding, from 8 on; each size costs a recording at the start.
BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
LENGTH_STEP = 8  # from one recorded longest length to the next

OnCapture = Callable[[int, int], None]  # recordings made, recordings in all


def graph_batch_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """What is recorded for an engine of ``max_num_seqs``: its own size, if the table reaches so far, and those below.

    Larger batches run eagerly: their kernels take longer than their launches.
    """
    smaller = tuple(size for size in BATCH_SIZES if size < max_num_seqs)
    return (*smaller, max_num_seqs) if max_num_seqs <= BATCH_SIZES[-1] else BATCH_SIZES


def graph_lengths(index_topk: int, max_model_len: int) -> tuple[int, ...]:
    """Longest sequences of recordings, ascending: the first needs no indexer, the last takes everything."""
    steps = itertools.takewhile(
        lambda length: length < max_model_len, (index_topk * LENGTH_STEP**power for power in itertools.count())
    )
    return (*steps, max_model_len)


@dataclass(frozen=True, slots=True)
class StaticInputs:
    """The tensors that recordings read, for the largest size; a recording of size n has views of their first n rows."""

    input_ids: torch.Tensor  # [n] int64
    positions: torch.Tensor  # [n] int64
    slot_mapping: torch.Tensor  # [n] int64
    seq_lens: torch.Tensor  # [n] int32
    block_table: torch.Tensor  # [n, blocks] int32

    @classmethod
    def allocate(cls, size: int, num_blocks: int, device: torch.device) -> "StaticInputs":
        zeros = torch.zeros(size, dtype=torch.int64, device=device)
        return cls(
            input_ids=zeros,
            positions=zeros.clone(),
            slot_mapping=torch.full_like(zeros, -1),
            seq_lens=torch.ones(size, dtype=torch.int32, device=device),
            block_table=torch.zeros(size, num_blocks, dtype=torch.int32, device=device),
        )

    def rows(self, size: int) -> "StaticInputs":
        return StaticInputs(*(getattr(self, field.name)[:size] for field in dataclasses.fields(self)))

    def fill(self, batch: ForwardBatch) -> None:
        """Copy the batch into the first rows; what stands behind them becomes padding."""
        attention = batch.attention
        fill_decode_inputs(
            (self.input_ids, self.positions, self.slot_mapping, self.seq_lens, self.block_table),
            (batch.input_ids, batch.positions, attention.slot_mapping, attention.seq_lens, attention.block_table),
        )


@dataclass(frozen=True, slots=True)
class Recording:
    """A graph, and what its collectives send."""

    graph: DeviceGraph
    tape: CollectiveTape
    world: Communicator  # all ranks of it, by a name that tells which recording it is


class GraphRunner:
    """The recordings of one rank. Build with ``capture``."""

    def __init__(
        self,
        model: DeepseekV32Model,
        cache: MLAKVCache,
        rotary: RotaryTable,
        platform: Platform,
        *,
        table: RecordingTable,
        exchange_of: ExchangeOf,
        side_lane: SideLane,
    ) -> None:
        self.table = table
        self.num_replays = 0
        self._model, self._cache, self._rotary, self._platform = model, cache, rotary, platform
        self._exchange_of = exchange_of
        num_blocks = -(-table.lengths[-1] // cache.block_size)
        device = rotary.cos.device
        self._inputs = StaticInputs.allocate(table.sizes[-1], num_blocks, device)
        self._query_start_loc = torch.arange(table.sizes[-1] + 1, dtype=torch.int32, device=device)
        self._no_rows = torch.zeros(0, dtype=torch.int64, device=device)
        self._side_lane = side_lane
        self._recordings: dict[RecordingKey, Recording] = {}

    @classmethod
    def capture(
        cls,
        model: DeepseekV32Model,
        cache: MLAKVCache,
        rotary: RotaryTable,
        platform: Platform,
        *,
        table: RecordingTable,
        exchange_of: ExchangeOf = exchange_nothing,
        world: Communicator | None = None,
        on_capture: OnCapture | None = None,
    ) -> "GraphRunner":
        """Run and record all of ``table``. Collective over ``world``, whose ranks replay together; None: one rank."""
        world = world or Communicator.local("world")
        side_lane = platform.new_side_lane()
        runner = cls(model, cache, rotary, platform, table=table, exchange_of=exchange_of, side_lane=side_lane)
        pool = platform.new_graph_pool()
        keys = table.keys()
        for i, key in enumerate(keys):
            runner._record(key, world, pool)
            if on_capture is not None:
                on_capture(i + 1, len(keys))
        return runner

    @property
    def num_graphs(self) -> int:
        return len(self._recordings)

    def run(self, batch: ForwardBatch, key: RecordingKey) -> torch.Tensor:
        """``DeepseekV32Model.forward`` of a batch that ``key`` holds, padded to its size: this rank's slice [t, D] of n
        hidden states, valid until the next call. Collective over the ranks that recorded: all replay the same key."""
        recording = self._recordings[key]
        self._inputs.rows(key.size).fill(batch)
        recording.world.replay(recording.tape, recording.graph.replay, self._platform.mark)
        self.num_replays += 1
        return recording.graph.output

    def _record(self, key: RecordingKey, world: Communicator, pool: object) -> None:
        forward = partial(self._forward, self._inputs.rows(key.size), key.length)
        self._platform.warm_up(forward, pool)
        with world.taping() as tape:
            graph = self._platform.capture(forward, pool)
        label = f"decode steps of up to {key.size} x {key.length} tokens, {tape.num_collectives} collectives"
        self._recordings[key] = Recording(graph, tape, world.named(label))

    @torch.inference_mode()
    def _forward(self, inputs: StaticInputs, length: int) -> torch.Tensor:
        size = inputs.input_ids.shape[0]
        attention = AttentionMetadata(
            query_start_loc=self._query_start_loc[: size + 1],
            seq_lens=inputs.seq_lens,
            slot_mapping=inputs.slot_mapping,
            block_table=inputs.block_table,
            max_query_len=1,
            max_seq_len=length,
            max_decode_seq_len=length,
            min_decode_seq_len=0,  # unknown
            num_decode_tokens=size,
            num_prefill_tokens=0,
            prefill_segments=(),
        )
        batch = ForwardBatch(
            input_ids=inputs.input_ids,
            positions=inputs.positions,
            rotary=rotary_rows(self._rotary, inputs.positions),
            attention=attention,
            logits_indices=self._no_rows,  # rows are taken outside
            exchange=self._exchange_of(size),
            side_lane=self._side_lane,
        )
        hidden_states: torch.Tensor = self._model(batch, self._cache)
        return hidden_states
