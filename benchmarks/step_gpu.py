"""Whole steps on an NVIDIA card at DeepSeek-V3.2's real dimensions: 1 dense and 3 MoE layers, all 256 experts.

    PYTHONPATH=. python benchmarks/step_gpu.py [--quantization w8a8|fp8_block|none] [--layers 4]
        [--kv-cache-dtype auto|int8|fp8] [--decode 1,4,16,32,64,128,256] [--prefill 2048,4096,16384,65536]
        [--context 4096] [--eager] [--profile]
    PYTHONPATH=. python benchmarks/step_gpu.py --device cpu --tiny --layers 2 --context 100 --chunk 256 --decode 1,3
        --prefill 100,300 --steps 6 --profile

Random weights, so tokens mean nothing; before times are printed, a batch decoded from graphs must give the hidden
states of the same batch run eagerly. Decode: one step after the other, each waited for on the host (``step``), and with
the next one started before the last is waited for (``overlapped``). Prefill: one request in chunks of 8,192 tokens.
Routers compute, but their choice is replaced by a drawn one (``steps/routing.py``). From a trace of overlapped steps:
``gap``, the share of the time between the last kernel or copy of a step and the first kernel of the next, and
``inside``, the share in which nothing runs after that. ``floor`` is the least that the bytes and operations of a step
take at the rates of public kernels (``steps/floors.py``). ``--profile``: kernels by part of the model, those first that
take most above their floor. The last line is JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch

from argosy.cli.code_version import read_version
from argosy.engine.build import BuiltEngine
from benchmarks.steps.floors import CacheSizes, ExpertSizes, StepSizes, floors_us
from benchmarks.steps.models import (
    BLOCK_SIZE,
    add_options,
    build,
    describe_memory,
    fill_cache,
    model_settings,
    numbers,
    record_graphs,
)
from benchmarks.steps.parts import table
from benchmarks.steps.plans import cut
from benchmarks.steps.routing import draw_by_layer, draw_trained, experts_hit, imbalance, spread_routing
from benchmarks.steps.timing import (
    Bench,
    check_graph,
    label_decode,
    label_prefill,
    measure_decode,
    measure_prefill,
    trace_decode,
)

IMBALANCE_TOKENS = 4096


def main() -> int:
    options = parse_options()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("needs an NVIDIA card; --device cpu --tiny tries the script", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    started_s = time.monotonic()
    settings = model_settings(options.layers, 1, is_tiny=options.tiny, quantization=options.quantization)
    built = build(options, settings, options.quantization, options.decode, options.prefill)
    runner, platform = built.core.runner, built.platform
    print(f"{platform.device_name()}, torch {torch.__version__}, {read_version()}; {sys.argv[1:]}")
    print(f"start {time.monotonic() - started_s:.1f} s, {describe_memory(runner, platform)}", flush=True)
    choices = spread(built, max([options.chunk, *options.decode]))
    if not options.eager:
        record_started_s = time.monotonic()
        runner.graphs = record_graphs(runner, built.model_config, platform, options.decode, options.context)
        num_graphs = runner.graphs.num_graphs if runner.graphs else 0
        print(f"{num_graphs} graphs in {time.monotonic() - record_started_s:.1f} s", flush=True)
    fill_cache(runner)
    report = Report(options, built, choices)
    for batch_size in options.decode:
        report.decode(batch_size)
    for num_tokens in options.prefill:
        report.prefill(num_tokens)
    print(json.dumps({"decode": report.decodes, "prefill": report.prefills}))
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--quantization", default="w8a8", choices=("w8a8", "fp8_block", "none"))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--decode", type=numbers, default="1,4,16,32,64,128,256")
    parser.add_argument("--prefill", type=numbers, default="2048,4096,16384,65536")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


def spread(built: BuiltEngine, num_tokens: int) -> Sequence[torch.Tensor]:
    config = built.model_config
    choices = draw_by_layer(draw_trained, config, num_tokens, built.device)
    spread_routing(built.core.runner.model, choices)
    shown = min(IMBALANCE_TOKENS, num_tokens)
    loads = (imbalance(topk_ids, config.n_routed_experts, shown) for topk_ids in choices)
    print(f"busiest expert over the mean of {shown} tokens, by layer: {', '.join(f'{load:.2f}' for load in loads)}")
    return choices


class Report:
    """Measures, and prints a line each."""

    def __init__(self, options: argparse.Namespace, built: BuiltEngine, choices: Sequence[torch.Tensor]) -> None:
        self._options, self._config, self._choices = options, built.model_config, choices
        self._cache = CacheSizes.of(built.model_config, built.config.cache_dtypes)
        self._bench = Bench(
            runner=built.core.runner,
            platform=built.platform,
            block_size=BLOCK_SIZE,
            vocab_size=min(built.tokenizer.vocab_size, built.model_config.vocab_size),
            chunk=options.chunk,
            context=options.context,
        )
        self.decodes: list[dict[str, object]] = []
        self.prefills: list[dict[str, object]] = []

    def decode(self, batch_size: int) -> None:
        bench, options = self._bench, self._options
        error = check_graph(bench, batch_size)
        times = measure_decode(bench, batch_size, options.steps)
        trace, steps = trace_decode(bench, batch_size)
        floors = self._floors(StepSizes.decode(self._config, batch_size, options.context))
        floor_ms = sum(floors.values()) / 1e3
        print(
            f"decode B={batch_size:4d} ctx {options.context}: step {times.step_ms:7.3f} ms "
            f"({times.p10_ms:.3f} .. {times.p90_ms:.3f}), overlapped {times.overlapped_ms:7.3f}, "
            f"traced {trace.period_us / 1e3:7.3f}, kernels {trace.kernels_us / 1e3:7.3f}, "
            f"floor {floor_ms:.3f} ({floor_ms / times.overlapped_ms:.0%})\n"
            f"    gap {trace.gap_us:.1f} us ({trace.gap_share:.1%}), inside {trace.inside_share:.1%}, longest pause "
            f"{trace.longest_pause_us:.1f} us; host: start {times.start_ms:.3f}, finish {times.finish_ms:.3f} with the "
            f"wait, {times.finish_alone_ms:.3f} alone; graph against eager {error:.1e}",
            flush=True,
        )
        if options.profile:
            self._print_parts(label_decode(bench, batch_size, steps), floors, len(steps))
        self.decodes.append(asdict(times) | asdict(trace) | {"floor_ms": floor_ms, "graph_error": error})

    def prefill(self, num_tokens: int) -> None:
        times = measure_prefill(self._bench, num_tokens)
        floors: dict[str, float] = {}
        for start, length in cut(num_tokens, self._options.chunk):
            for part, us in self._floors(StepSizes.prefill(self._config, start, length)).items():
                floors[part] = floors.get(part, 0.0) + us
        share = times.tokens_per_s * sum(floors.values()) / 1e6 / num_tokens
        print(
            f"prefill {num_tokens:6d}: {times.tokens_per_s / 1e3:7.1f}k tok/s ({times.lowest / 1e3:.1f} .. "
            f"{times.highest / 1e3:.1f}), floor {num_tokens / sum(floors.values()) * 1e3:.1f}k ({share:.0%})",
            flush=True,
        )
        if self._options.profile:
            self._print_parts(label_prefill(self._bench, num_tokens), floors, 1)
        self.prefills.append(asdict(times) | {"floor_share": share})

    def _floors(self, step: StepSizes) -> dict[str, float]:
        experts = ExpertSizes(
            num_rows=step.num_tokens * self._config.num_experts_per_tok,
            num_hit=experts_hit(self._choices, step.num_tokens),
        )
        return floors_us(self._config, step, experts, self._cache, self._options.quantization)

    def _print_parts(self, labelled: Sequence[object], floors: dict[str, float], num_steps: int) -> None:
        print("\n".join(table(labelled, floors, num_steps)), flush=True)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
