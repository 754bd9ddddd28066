"""Time of one step of a model with real dimensions and dummy weights, on one card or several.

    export PYTHONPATH=.
    python benchmarks/parallel_step.py --save one.pt
    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/parallel_step.py --tp 2 --expect one.pt
    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/parallel_step.py --dp 2 --expect one.pt

One dense layer and ``--moe-layers`` MoE layers of DeepSeek-V3.2 with all 256 experts, bfloat16; weights are the same
numbers on every topology (``dummy_weights.py``). Checked first: each layer's output on prompts, and the logits, against
what one card saved, each layer with that card's input (``steps/forced_layers.py`` says why). The cosines of logits that
run freely are printed and judge nothing. The batch is shared out evenly among replicas, so times of one total batch
size compare. With ``--graphs`` decode steps are timed from device graphs as well, which all ranks record and replay
together; before, their logits are compared with the eager step's. Prints a card, then JSON.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from argosy.cache.cache_format import build_cache_format
from argosy.cache.mla_kv_cache import MLAKVCache
from argosy.cache.rope import build_rotary_table
from argosy.cli.code_version import read_commit
from argosy.config import IN_MODEL_DTYPE, EngineConfig
from argosy.distributed.dp_coord import StepProposal, agree, plan_recordings
from argosy.distributed.ep_types import ExchangePlan
from argosy.distributed.layout import ParallelLayout
from argosy.distributed.mesh import ParallelMesh
from argosy.distributed.recordings import RecordingKey
from argosy.distributed.rendezvous import connect_store, read_torchrun_environment
from argosy.distributed.tp_comm import slice_bounds
from argosy.engine.build_rank import cache_dims, exchange_under, rotary_settings
from argosy.engine.worker import build_policy
from argosy.layers.forward_batch import ForwardBatch
from argosy.messages import AdmittedRequest, ScheduledBatch
from argosy.models.deepseek.checkpoint import build_weight_mapping, checkpoint_shapes
from argosy.models.deepseek.config import ModelConfig, parse_model_config
from argosy.models.deepseek.model import DeepseekV32Model, weight_shard
from argosy.platforms import select_platform
from argosy.quantization.dummy_weights import fill_with_dummy_weights
from argosy.runner.batch_builder import BatchBuilder
from argosy.runner.graph_runner import GraphRunner, graph_lengths
from argosy.runner.row_table import RowTable
from argosy.sampling_params import SamplingParams
from benchmarks.steps.forced_layers import compare_layers, forced_layers, recorded_layers

REAL = {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_attention_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "first_k_dense_replace": 1,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048, "max_position_embeddings": 163840,
}  # fmt: skip
SMALL = REAL | {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128,
    "num_attention_heads": 16, "n_routed_experts": 32, "q_lora_rank": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "index_head_dim": 32, "index_topk": 64, "max_position_embeddings": 8192,
}  # fmt: skip
BLOCK_SIZE = 64
Call = Callable[[], torch.Tensor]
CHECK_BATCH, CHECK_LENGTH = 16, 96
DECODE_CONTEXT = 4096
# Of a layer's middle token, and of the middle prompt's logits. Sums of two halves give 0.99998 on a CPU; a rank whose
# o_proj is a tenth too small in one layer 0.9994 there.
MIN_COSINE = 0.9999
# Tokens of a layer that flipped: they are further off than this. 0 to 1.6 % on a CPU, with 32 experts; 256 have about
# three times as many near ties. A router whose weights are 5 % off on one rank flips 21 % there.
MIN_UNFLIPPED_COSINE = 0.999
MAX_FLIPPED = 0.15
MIN_REPLAY_COSINE = 0.99


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    median_ms: float
    spread: float  # (p90 - p10) / median
    bytes_sent: int  # by this rank to others, a step


@dataclass(frozen=True, slots=True)
class Check:
    """How far this rank is from one card."""

    layers: list[float]  # the middle token's cosine, with that card's input
    flipped: list[float]  # share of a layer's tokens that are further off than ``MIN_UNFLIPPED_COSINE``
    logits: float  # the middle prompt's, behind the last layer
    free: list[float]  # cosines of all prompts' logits, ascending, when nothing is forced

    def find_problem(self) -> str:
        """Empty if there is none."""
        for layer, (cosine, flipped) in enumerate(zip(self.layers, self.flipped, strict=True)):
            if not cosine >= MIN_COSINE:
                return f"layer {layer}: the middle token's cosine is {cosine:.5f}, at least {MIN_COSINE} is needed"
            if not flipped <= MAX_FLIPPED:
                return f"layer {layer}: {flipped:.1%} of the tokens flipped, at most {MAX_FLIPPED:.0%} may"
        if not self.logits >= MIN_COSINE:
            return f"logits: the middle prompt's cosine is {self.logits:.5f}, at least {MIN_COSINE} is needed"
        return ""


class Bench:
    """One rank's model and cache."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        place = read_torchrun_environment(os.environ)
        self.platform = select_platform(arguments.device)
        layout = ParallelLayout(dp_size=arguments.dp, tp_size=arguments.tp)
        self.device = self.platform.device(place.local_rank if place else 0)
        self.platform.make_current(self.device.index or 0)
        self.mesh = ParallelMesh.local()
        if place is not None:
            store = connect_store(place.address, 60.0)
            self.mesh = ParallelMesh.build(layout, place.rank, store=store, platform=self.platform, timeout_s=60.0)
        self.config = parse_model_config(
            (SMALL if arguments.small else REAL)
            | {"num_hidden_layers": 1 + arguments.moe_layers, "model_type": "deepseek_v32"}
        )
        self.dtype = getattr(torch, arguments.dtype)
        engine = EngineConfig(
            dp_size=arguments.dp, tp_size=arguments.tp, ll_max_tokens_per_rank=arguments.ll_max_tokens_per_rank
        )
        self.policy = build_policy(engine, self.config, layout.num_ep_ranks, self.platform)
        self.steps = arguments.steps
        self.model = build_model(self.config, self.dtype, self.mesh, self.device)
        self.rotary = build_rotary_table(rotary_settings(self.config), self.device)

    def plan(self, batch_size: int, num_computed: int, num_tokens: int) -> tuple[ForwardBatch, MLAKVCache]:
        """This replica's share of ``batch_size`` requests that compute ``num_tokens`` behind ``num_computed``."""
        dp, layout = self.mesh.coords.dp, self.mesh.layout
        share = range(dp * batch_size // layout.dp_size, (dp + 1) * batch_size // layout.dp_size)
        length = num_computed + num_tokens
        blocks = -(-length // BLOCK_SIZE)
        cache = MLAKVCache(
            build_cache_format(IN_MODEL_DTYPE, cache_dims(self.config), self.dtype, self.device),
            num_layers=self.config.num_hidden_layers,
            num_blocks=1 + blocks * len(share),
            block_size=BLOCK_SIZE,
            device=self.device,
        )
        table = RowTable(max_num_seqs=len(share), max_model_len=length, block_size=BLOCK_SIZE)
        admitted = [
            AdmittedRequest(
                row=row,
                request_id=str(row),
                token_ids=random_tokens(self.config.vocab_size, length, seed=request),
                num_prompt_tokens=length,
                num_computed_tokens=num_computed,
                block_ids=list(range(1 + row * blocks, 1 + (row + 1) * blocks)),
                sampling_params=SamplingParams(),
            )
            for row, request in enumerate(share)
        ]
        scheduled = ScheduledBatch(
            step=0,
            rows=list(range(len(share))),
            num_computed_tokens=[num_computed] * len(share),
            num_scheduled_tokens=[num_tokens] * len(share),
            admitted=admitted,
            num_tokens=num_tokens * len(share),
        )
        table.apply(scheduled)
        fullest = -(-batch_size // layout.dp_size) * num_tokens
        agreement = agree([StepProposal(0, fullest)], self.policy)
        builder = BatchBuilder(table, self.rotary, self.device)
        return builder.build(scheduled, ExchangePlan(agreement.mode, agreement.max_tokens_per_rank)).forward, cache

    @torch.inference_mode()
    def logits(self, batch: ForwardBatch, cache: MLAKVCache) -> torch.Tensor:
        """Of the sampled rows, on every rank of the replica."""
        return self.sample(self.model(batch, cache), batch.logits_indices, batch.num_tokens)

    def sample(self, hidden_states: torch.Tensor, rows: torch.Tensor, num_tokens: int) -> torch.Tensor:
        return self.model.compute_logits(self.model.take_rows(hidden_states, rows, num_tokens))

    def record(self, batch: ForwardBatch, cache: MLAKVCache) -> Call | None:
        """``logits`` of this decode step from a device graph, as the engine records it; None if it would not.

        Raises:
            SystemExit: they are not those of the eager step.
        """
        lengths = graph_lengths(self.config.index_topk, self.config.max_position_embeddings)
        length = next(length for length in lengths if length >= batch.attention.max_seq_len)
        size = batch.exchange.max_tokens_per_rank * self.policy.ranks_per_replica  # equal on all replicas
        ep_size = self.mesh.layout.num_ep_ranks
        table = plan_recordings((size,), (length,), self.policy, ep_size=ep_size)
        if not table.sizes:
            return None
        graphs = GraphRunner.capture(
            self.model,
            cache,
            self.rotary,
            self.platform,
            table=table,
            exchange_of=exchange_under(self.policy),
            world=self.mesh.world,
        )
        key = RecordingKey(size, length)

        @torch.inference_mode()
        def replay() -> torch.Tensor:
            return self.sample(graphs.run(batch, key), batch.logits_indices, size)

        cosine = F.cosine_similarity(replay().double(), self.logits(batch, cache).double(), dim=-1).min().item()
        if not cosine >= MIN_REPLAY_COSINE:
            sys.exit(f"rank {self.mesh.rank}: a replay differs from the eager step (cosine {cosine:.4f})")
        return replay

    def save(self, path: str) -> None:
        """One card's layers and logits on the prompts of ``check``."""
        with recorded_layers(self.model.model.layers) as outputs:
            logits = self.logits(*self.plan(CHECK_BATCH, 0, CHECK_LENGTH))
        torch.save(([output.cpu() for output in outputs], logits.cpu()), path)

    def check(self, path: str) -> Check:
        """Against what one card saved, of this replica's prompts and this rank's tokens of them."""
        coords, sizes, layers = self.mesh.coords, self.mesh.layout, self.model.model.layers
        saved, all_logits = torch.load(path, weights_only=True)
        start, stop = slice_bounds(saved[0].shape[0] // sizes.dp_size, sizes.tp_size, coords.tp)
        expected = [output.chunk(sizes.dp_size)[coords.dp][start:stop].to(self.device) for output in saved]
        logits = all_logits.chunk(sizes.dp_size)[coords.dp].to(self.device)
        with forced_layers(layers, expected), recorded_layers(layers) as outputs:
            forced = self.logits(*self.plan(CHECK_BATCH, 0, CHECK_LENGTH))
        by_layer = compare_layers(outputs, expected)
        after, free = compare_layers((forced, self.logits(*self.plan(CHECK_BATCH, 0, CHECK_LENGTH))), (logits, logits))
        return Check(
            layers=[cosines.median().item() for cosines in by_layer],
            flipped=[(cosines < MIN_UNFLIPPED_COSINE).double().mean().item() for cosines in by_layer],
            logits=after.median().item(),
            free=free.tolist(),
        )

    def measure(self, name: str, batch_size: int, num_computed: int, num_tokens: int) -> Row:
        batch, cache = self.plan(batch_size, num_computed, num_tokens)
        return self.time(name, partial(self.logits, batch, cache))

    def measure_graph(self, name: str, batch_size: int, num_computed: int) -> Row | None:
        replay = self.record(*self.plan(batch_size, num_computed, 1))
        return None if replay is None else self.time(name, replay)

    def time(self, name: str, step: Call) -> Row:
        for _ in range(3):
            step()
        self.mesh.tp.reset_counters()
        self.mesh.ep.reset_counters()
        times_ms = []
        for _ in range(self.steps):
            self.mesh.world.barrier()
            self.platform.synchronize()
            started_s = time.perf_counter()
            step()
            self.platform.synchronize()
            times_ms.append((time.perf_counter() - started_s) * 1e3)
        sent = sum(self.mesh.tp.bytes_sent.values()) + sum(self.mesh.ep.bytes_sent.values())
        cuts = statistics.quantiles(times_ms, n=10)
        median = statistics.median(times_ms)
        return Row(name, median, (cuts[-1] - cuts[0]) / median, sent // self.steps)


def build_model(config: ModelConfig, dtype: torch.dtype, mesh: ParallelMesh, device: torch.device) -> DeepseekV32Model:
    with torch.device(device):
        model = DeepseekV32Model(config, dtype, mesh)
    mapping = build_weight_mapping(config.num_hidden_layers, 0, weight_shard(config, mesh))
    fill_with_dummy_weights(model, checkpoint_shapes(config), mapping)
    return model.eval()


def random_tokens(vocab_size: int, count: int, *, seed: int) -> list[int]:
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--moe-layers", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--small", action="store_true", help="small dimensions, for a try on a CPU")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 16, 64])
    parser.add_argument("--prefill", type=int, nargs="+", default=[2048])
    parser.add_argument("--ll-max-tokens-per-rank", type=int, default=None, help="the engine's own choice")
    parser.add_argument("--graphs", action="store_true", help="decode from device graphs, too; a CPU runs them again")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save")
    parser.add_argument("--expect")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    if arguments.save:
        bench.save(arguments.save)
    check = bench.check(arguments.expect) if arguments.expect else None
    problem = check.find_problem() if check else ""
    if problem:
        sys.exit(f"rank {bench.mesh.rank} differs from one card: {problem}; no number is worth printing")
    rows = [
        bench.measure(f"decode, batch {size}, context 4096", size, DECODE_CONTEXT - 1, 1) for size in arguments.batches
    ]
    if arguments.graphs:
        recorded = [
            bench.measure_graph(f"decode, batch {size}, graph", size, DECODE_CONTEXT - 1) for size in arguments.batches
        ]
        rows += [row for row in recorded if row is not None]
    rows += [bench.measure(f"prefill, 2 x {count} tokens", 2, 0, count) for count in arguments.prefill]
    if bench.mesh.rank == 0:
        report(rows, bench, arguments, check)


def report(rows: list[Row], bench: Bench, arguments: argparse.Namespace, check: Check | None) -> None:
    name = bench.platform.device_name()
    print(f"dp{arguments.dp} tp{arguments.tp} on {name}")
    if check:
        layers = ", ".join(f"{cosine:.6f}" for cosine in check.layers)
        flipped = ", ".join(f"{share:.1%}" for share in check.flipped)
        print(
            f"cosines with {Path(arguments.expect).name}: of layers {layers} (flipped {flipped}), of logits "
            f"{check.logits:.6f}; running freely {statistics.median_low(check.free):.5f}, worst {check.free[0]:.5f}"
        )
    print()
    print(f"{'':36}{'median ms':>10}{'spread':>8}{'MB sent':>9}")
    for row in rows:
        print(f"{row.name:36}{row.median_ms:10.2f}{row.spread:8.0%}{row.bytes_sent / 1e6:9.2f}")
    record = {
        "benchmark": "parallel_step",
        "hardware": name,
        "commit": read_commit(),
        "command": " ".join(sys.argv),
        "dp_size": arguments.dp,
        "tp_size": arguments.tp,
        "check": asdict(check) if check else None,
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
