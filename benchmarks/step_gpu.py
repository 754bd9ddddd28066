"""Whole steps on an NVIDIA card at DeepSeek-V3.2's real dimensions: 1 dense and 3 MoE layers, all 256 experts.

    python benchmarks/step_gpu.py [--quantization w8a8|fp8_block|none] [--layers 4] [--kv-cache-dtype auto|int8|fp8]
        [--decode 1,4,16,32,64,128,256] [--prefill 2048,4096,16384,65536] [--context 4096] [--eager] [--profile]

Random weights, so tokens mean nothing; before times are printed, a batch decoded from graphs must give the hidden
states of the same batch run eagerly. Decode: one step after the other, each waited for on the host (``step``), and with
the next one started before the last is waited for (``overlapped``). Prefill: one request in chunks of 8,192 tokens.
Routers compute, but their choice is replaced by a drawn one that spreads tokens as trained routers do: the busiest
expert gets about twice the mean at 4,096 tokens. Rooflines are for INT8 weights, with the rates that public kernels
reach. ``gap``: the share of overlapped steps in which the device waits for the host, from a trace: nothing runs for
more than 5 us. The last line is JSON.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from argosy.assets import builtin_model_directory
from argosy.cli.code_version import read_version
from argosy.config import EngineConfig
from argosy.engine.build import BuiltEngine, build_engine
from argosy.engine.build_rank import build_graphs
from argosy.messages import AdmittedRequest, ScheduledBatch
from argosy.runner.model_runner import ModelRunner
from argosy.sampling_params import SamplingParams
from tests.helpers.published import PUBLISHED_CONFIG

CHUNK = 8192
BLOCK_SIZE = 64
WARM_UP, STEPS = 5, 30
ROUTING_SPREAD = 0.33
GAP_US = 5.0
MAX_ERROR = 0.02  # of hidden states from a graph against eager ones, norm of the difference over the norm
# us a decode step of 4 layers at a context of 4K, and tok/s of a prefill: INT8 at the rates of the best public kernels.
ROOF_DECODE_US = {1: 1010, 4: 1717, 16: 3972, 32: 5937, 64: 7914, 128: 9129, 256: 10182}
ROOF_PREFILL = {2048: 122e3, 4096: 138e3, 16384: 128e3, 65536: 102e3}


@dataclass(frozen=True)
class DecodeLine:
    batch_size: int
    step_ms: float
    p10_ms: float
    p90_ms: float
    overlapped_ms: float
    device_ms: float  # the sum of kernels
    gap_share: float
    roofline_share: float  # of the overlapped step, 4 layers at 4K


@dataclass(frozen=True)
class PrefillLine:
    num_tokens: int
    tokens_per_s: float
    p10: float
    p90: float
    roofline_share: float


def main() -> int:
    options = parse_options()
    if not torch.cuda.is_available():
        print("needs an NVIDIA card", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    started_s = time.monotonic()
    built = build(options)
    runner = built.core.runner
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {read_version()}; {sys.argv[1:]}")
    print(
        f"start {time.monotonic() - started_s:.1f} s, weights {built.load_s:.1f} s, {describe_memory(built)}",
        flush=True,
    )
    spread_routing(runner)
    if not options.eager:
        record_started_s = time.monotonic()
        config = dataclasses.replace(built.config, enforce_eager=False)
        runner.graphs = build_graphs(config, built.model_config, runner, built.platform)
        print(f"{runner.graphs.num_graphs} graphs in {time.monotonic() - record_started_s:.1f} s", flush=True)
    runner.cache.latent.view(torch.uint8).random_(0, 64)  # small numbers in every format
    runner.cache.index_k.view(torch.uint8).random_(0, 64)
    decodes, prefills = [], []
    for batch_size in options.decode:
        check_graph(runner, batch_size, options.context)
        decodes.append(measure_decode(runner, batch_size, options.context))
        line = decodes[-1]
        print(
            f"decode B={batch_size:4d} ctx {options.context}: "
            f"step {line.step_ms:7.3f} ms ({line.p10_ms:.3f} .. {line.p90_ms:.3f}), "
            f"overlapped {line.overlapped_ms:7.3f}, kernels {line.device_ms:7.3f}, "
            f"gap {line.gap_share:.1%}, roofline {line.roofline_share:.0%}",
            flush=True,
        )
        if options.profile:
            print_profile(lambda b=batch_size: decode_steps(runner, b, options.context, 3), 3)
    runner.model.expert_load.reset()
    for num_tokens in options.prefill:
        prefills.append(measure_prefill(runner, num_tokens))
        line = prefills[-1]
        print(
            f"prefill {num_tokens:6d}: {line.tokens_per_s / 1e3:7.1f}k tok/s "
            f"({line.p10 / 1e3:.1f} .. {line.p90 / 1e3:.1f}), roofline {line.roofline_share:.0%}",
            flush=True,
        )
        if options.profile:
            print_profile(lambda n=num_tokens: prefill(runner, n), 1)
    if prefills:
        loads = [max(layer) * len(layer) / sum(layer) for layer in runner.model.expert_load.local_counts()]
        print(f"busiest expert over the mean in prefill, by layer: {', '.join(f'{load:.2f}' for load in loads)}")
    print(json.dumps({"decode": [asdict(x) for x in decodes], "prefill": [asdict(x) for x in prefills]}))
    return 0


def parse_options() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quantization", default="w8a8", choices=("w8a8", "fp8_block", "none"))
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "int8", "fp8"))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--decode", type=numbers, default="1,4,16,32,64,128,256")
    parser.add_argument("--prefill", type=numbers, default="2048,4096,16384,65536")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


def build(options: argparse.Namespace) -> BuiltEngine:
    directory = Path(tempfile.mkdtemp(prefix="argosy-step-"))
    settings = {**PUBLISHED_CONFIG, "num_hidden_layers": options.layers, "first_k_dense_replace": 1}
    (directory / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    longest = max([options.context + 256, *options.prefill])
    max_num_seqs = max([1, *options.decode])
    return build_engine(
        EngineConfig(
            model=str(directory),
            tokenizer=str(builtin_model_directory("argosy-tiny")),
            device="cuda",
            load_format="dummy",
            quantization=options.quantization,
            kv_cache_dtype=options.kv_cache_dtype,
            max_model_len=longest,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=CHUNK,
            block_size=BLOCK_SIZE,
            enforce_eager=True,  # recorded when routing has been spread
        )
    )


class SpreadRouter(torch.nn.Module):
    """Runs the router, and hands out a drawn choice with its weights."""

    def __init__(self, router: torch.nn.Module, topk_ids: torch.Tensor) -> None:
        super().__init__()
        self._router, self._topk_ids = router, topk_ids

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, topk_weights = self._router(hidden_states)
        return self._topk_ids[: hidden_states.shape[0]], topk_weights


def spread_routing(runner: ModelRunner) -> None:
    for layer in runner.model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate = SpreadRouter(layer.mlp.gate, draw_routing(CHUNK))


def draw_routing(num_tokens: int) -> torch.Tensor:
    logits = torch.randn(256) * ROUTING_SPREAD
    noise = -torch.log(-torch.log(torch.rand(num_tokens, 256)))
    return (logits + noise).topk(8, dim=1)[1].to("cuda", torch.int32)


def describe_memory(built: BuiltEngine) -> str:
    free, total = torch.cuda.mem_get_info()
    weights = sum(parameter.nbytes for parameter in built.core.runner.model.parameters())
    return (
        f"weights {weights / 2**30:.1f} GiB, cache {built.core.runner.cache.num_bytes / 2**30:.1f} GiB, "
        f"free {free / 2**30:.1f} of {total / 2**30:.1f} GiB"
    )


def plan_decode(batch_size: int, context: int, num_steps: int) -> list[ScheduledBatch]:
    """Requests whose ``context`` tokens count as computed: the cache holds something everywhere."""
    blocks_each = -(-(context + num_steps + 1) // BLOCK_SIZE)
    generator = torch.Generator().manual_seed(batch_size)
    admitted = [
        AdmittedRequest(
            row=row,
            request_id=str(row),
            token_ids=torch.randint(10, 3000, (context + 1,), generator=generator).tolist(),
            num_prompt_tokens=context + 1,
            num_computed_tokens=context,
            block_ids=list(range(1 + row * blocks_each, 1 + (row + 1) * blocks_each)),
            sampling_params=SamplingParams(temperature=0.0, ignore_eos=True),
        )
        for row in range(batch_size)
    ]
    return [
        ScheduledBatch(
            step=step,
            rows=list(range(batch_size)),
            num_computed_tokens=[context + step] * batch_size,
            num_scheduled_tokens=[1] * batch_size,
            admitted=admitted if step == 0 else [],
            num_tokens=batch_size,
        )
        for step in range(num_steps)
    ]


def decode_steps(runner: ModelRunner, batch_size: int, context: int, num_steps: int) -> list[float]:
    times = []
    for batch in plan_decode(batch_size, context, num_steps):
        started_s = time.perf_counter()
        runner.execute(batch)
        times.append(time.perf_counter() - started_s)
    return times


def overlapped_step_s(runner: ModelRunner, batch_size: int, context: int) -> float:
    """Seconds a step when the next is started before the last is waited for."""
    batches = plan_decode(batch_size, context, WARM_UP + STEPS)
    in_flight = runner.start(batches[0])
    started_s = 0.0
    for i, batch in enumerate(batches[1:], start=1):
        following = runner.start(batch)
        runner.finish(in_flight)
        in_flight = following
        if i == WARM_UP:
            started_s = time.perf_counter()
    runner.finish(in_flight)
    return (time.perf_counter() - started_s) / (STEPS - 1)


def check_graph(runner: ModelRunner, batch_size: int, context: int) -> None:
    """Raises if hidden states from a graph are not those of the same batch run eagerly."""
    if runner.graphs is None:
        return
    (batch,) = plan_decode(batch_size, context, 1)
    runner.execute(batch)  # admits the requests
    forward = runner._builder.build(without_admission(batch)).forward
    if not runner.graphs.fits(forward):
        return
    with torch.inference_mode():
        found = runner.graphs.run(forward).float().clone()
        expected = runner.model(forward, runner.cache).float()
    error = ((found - expected).norm() / expected.norm()).item()
    if not error <= MAX_ERROR:
        raise RuntimeError(f"decode B={batch_size}: graph and eager differ by {error:.2e}, no time is printed")


def without_admission(batch: ScheduledBatch) -> ScheduledBatch:
    return ScheduledBatch(
        step=batch.step,
        rows=batch.rows,
        num_computed_tokens=batch.num_computed_tokens,
        num_scheduled_tokens=batch.num_scheduled_tokens,
        num_tokens=batch.num_tokens,
    )


def measure_decode(runner: ModelRunner, batch_size: int, context: int) -> DecodeLine:
    times = sorted(1e3 * seconds for seconds in decode_steps(runner, batch_size, context, WARM_UP + STEPS)[WARM_UP:])
    overlapped_ms = 1e3 * overlapped_step_s(runner, batch_size, context)
    device_ms, gap_share = trace_overlapped(runner, batch_size, context)
    return DecodeLine(
        batch_size,
        statistics.median(times),
        times[len(times) // 10],
        times[-1 - len(times) // 10],
        overlapped_ms,
        device_ms,
        gap_share,
        ROOF_DECODE_US.get(batch_size, 0) / 1e3 / overlapped_ms,
    )


def trace_overlapped(runner: ModelRunner, batch_size: int, context: int) -> tuple[float, float]:
    """Milliseconds of kernels a step, and the share of the time in which nothing runs for more than ``GAP_US``."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        overlapped_step_s(runner, batch_size, context)
        torch.cuda.synchronize()
    events = sorted((event.time_range.start, event.time_range.end, event.name) for event in profile.events())
    # A step ends with the copy of its tokens to the host.
    ends = [i for i, event in enumerate(events) if "DtoH" in event[2]][WARM_UP:-1]
    first, last = ends[0], ends[-1]
    busy = sum(end - start for start, end, _ in events[first + 1 : last + 1])
    span = events[last][1] - events[first][1]
    pauses = (events[i + 1][0] - events[i][1] for i in range(first, last))
    gaps = sum(pause for pause in pauses if pause > GAP_US)
    return busy / 1e3 / (len(ends) - 1), gaps / span


def prefill(runner: ModelRunner, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    request = AdmittedRequest(
        row=0,
        request_id="prefill",
        token_ids=torch.randint(10, 3000, (num_tokens,), generator=generator).tolist(),
        num_prompt_tokens=num_tokens,
        num_computed_tokens=0,
        block_ids=list(range(1, 2 + num_tokens // BLOCK_SIZE)),
        sampling_params=SamplingParams(temperature=0.0, ignore_eos=True),
    )
    for step, start in enumerate(range(0, num_tokens, CHUNK)):
        scheduled = min(CHUNK, num_tokens - start)
        runner.execute(
            ScheduledBatch(
                step=step,
                rows=[0],
                num_computed_tokens=[start],
                num_scheduled_tokens=[scheduled],
                admitted=[request] if start == 0 else [],
                num_tokens=scheduled,
            )
        )


def measure_prefill(runner: ModelRunner, num_tokens: int) -> PrefillLine:
    rates = []
    for i in range(6):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        prefill(runner, num_tokens)
        torch.cuda.synchronize()
        if i:
            rates.append(num_tokens / (time.perf_counter() - started_s))
    rates.sort()
    median = statistics.median(rates)
    return PrefillLine(num_tokens, median, rates[0], rates[-1], median / ROOF_PREFILL.get(num_tokens, float("inf")))


def print_profile(run: Callable[[], object], num_steps: int) -> None:
    """Kernels by time, a step."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        times[event.name].append(event.device_time_total)
    total = sum(map(sum, times.values()))
    print(f"    {'kernel':70} {'calls':>6} {'us a step':>10} {'share':>6}   (sum {total / num_steps:.0f} us a step)")
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))[:32]:
        print(f"    {name[:70]:70} {len(each) / num_steps:6.1f} {sum(each) / num_steps:10.1f} {sum(each) / total:6.1%}")


if __name__ == "__main__":
    sys.exit(main())
