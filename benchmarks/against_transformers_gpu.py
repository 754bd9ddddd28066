"""Argosy against ``transformers`` on one NVIDIA card: DeepSeek-V3.2's real dimensions, 1 dense and 3 MoE layers.

    PYTHONPATH=. python benchmarks/against_transformers_gpu.py [--quantizations none,w8a8] [--decode 1,16,64]
        [--prefill 4096] [--context 4096] [--no-check]
    PYTHONPATH=. python benchmarks/against_transformers_gpu.py --device cpu --tiny --layers 2 --context 100 --decode 1,3
        --prefill 96

All 256 experts, 75 GB of bfloat16, so one program after the other is on the card: transformers first, in each of the
settings below, of which the fastest counts; then Argosy on the same weights in bfloat16, and in W8A8 (INT8 numbers of
its own: speed only). Both sides' routers compute, and get the same drawn experts. Checked first on small copies that
both hold (2 layers, 16 experts, index_topk 64; narrow in float32, of real widths in bfloat16): each greedy token of
Argosy must be transformers' best in the same place, or as good within ``MAX_DEFICIT`` standard deviations of logits.
Decode: greedy steps behind a full cache, of B requests; prefill: one request. The last line is JSON.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import transformers

from argosy import LLM, RequestOutput, SamplingParams
from argosy.assets import builtin_model_directory
from argosy.cli.code_version import read_version
from argosy.models.deepseek.config import parse_model_config
from argosy.platforms import Platform, select_platform
from benchmarks.steps.models import (
    BLOCK_SIZE,
    add_options,
    build,
    fill_cache,
    model_settings,
    numbers,
    record_graphs,
    write_config,
)
from benchmarks.steps.routing import draw_by_layer, draw_trained, spread_routing
from benchmarks.steps.timing import Bench, check_graph, measure_decode, measure_prefill
from benchmarks.steps.transformers_model import Choice, TheirSteps, build_theirs, prefill_theirs, spread_their_routing

GOALS = {("decode", 1): 10, ("decode", 16): 20, ("decode", 64): 40, ("prefill", 4096): 2}
CHOICES = (Choice("grouped_mm", False), Choice("grouped_mm", True), Choice("batched_mm", False))
MAX_COPIED = 4  # requests up to which batched_mm is tried: it copies the weights of every token's experts
WARM_UP, ROUNDS, ROUND_STEPS = 2, 3, 4
CHECK_PROMPTS, CHECK_LENGTH, CHECK_TOKENS = 4, 96, 12
# In bfloat16 experts and positions flip where scores nearly tie. Of a wrong model it is 5.
MAX_DEFICIT = {"float32": 0.01, "bfloat16": 1.0}
CHECK_SETTINGS: dict[str, object] = {"n_routed_experts": 16, "vocab_size": 4096, "index_topk": 64}


@dataclass(frozen=True, slots=True)
class Line:
    """One quantity; seconds."""

    kind: str
    size: int  # requests of a decode step, tokens of a prefill
    seconds: float
    note: str = ""


def main() -> int:
    options = parse_options()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("needs an NVIDIA card; --device cpu --tiny tries the script", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    platform = select_platform(options.device)
    print(
        f"{platform.device_name()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{read_version()}; {sys.argv[1:]}",
        flush=True,
    )
    if not options.no_check:
        check_small_copy("float32", platform, is_tiny=True)
        if options.device == "cuda":
            check_small_copy("bfloat16", platform, is_tiny=False)
        free(platform)
    settings = model_settings(options.layers, 1, is_tiny=options.tiny)
    theirs = measure_theirs(options, settings, platform)
    free(platform)
    results = {"transformers": theirs}
    for quantization in options.quantizations.split(","):
        results[quantization] = measure_ours(options, settings, quantization)
        free(platform)
        print_lines(quantization, results[quantization], theirs)
    print(json.dumps({name: [asdict(line) for line in lines] for name, lines in results.items()}))
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--quantizations", default="none,w8a8")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--decode", type=numbers, default="1,16,64")
    parser.add_argument("--prefill", type=numbers, default="4096")
    parser.add_argument("--no-check", action="store_true")
    return parser.parse_args()


def free(platform: Platform) -> None:
    """What nobody holds goes back to the device."""
    gc.collect()
    platform.reset_peak()


# --- correctness ------------------------------------------------------------------------------------------------------


def check_small_copy(dtype: str, platform: Platform, *, is_tiny: bool) -> None:
    """
    Raises:
        RuntimeError: a token that transformers finds clearly worse than its best.
    """
    started_s = time.monotonic()
    settings = model_settings(2, 1, is_tiny=is_tiny) | CHECK_SETTINGS
    device = platform.device(0)
    llm = LLM(
        str(write_config(settings)),
        tokenizer=str(builtin_model_directory("argosy-tiny")),
        device=platform.device_type,  # type: ignore[arg-type]
        dtype=dtype,  # type: ignore[arg-type]
        quantization="none",
        load_format="dummy",
        max_model_len=256,
        max_num_seqs=CHECK_PROMPTS,
        enforce_eager=True,
        kv_cache_memory_bytes=2**28,
    )
    prompts = torch.randint(10, llm.vocab_size - 10, (CHECK_PROMPTS, CHECK_LENGTH)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=CHECK_TOKENS, ignore_eos=True)
    results = llm.generate(prompts, params, use_tqdm=False)
    outputs = [list(result.outputs[0].token_ids) for result in results if isinstance(result, RequestOutput)]
    theirs = build_theirs(settings, getattr(torch, dtype), device)
    theirs.set_experts_implementation("eager")
    with torch.inference_mode():
        sequences = torch.tensor([a + b for a, b in zip(prompts, outputs, strict=True)], device=device)
        # The logits before each token that ours made, over the ids that ours may make.
        logits = theirs(sequences[:, :-1], logits_to_keep=CHECK_TOKENS).logits[..., : llm.vocab_size].float()
    chosen = logits.gather(2, sequences[:, -CHECK_TOKENS:].unsqueeze(2)).squeeze(2)
    deficit = ((logits.amax(dim=2) - chosen) / logits.std(dim=2)).max().item()
    equal = (logits.argmax(dim=2) == sequences[:, -CHECK_TOKENS:]).float().mean().item()
    print(
        f"small copy, {dtype}: {equal:.1%} of {chosen.numel()} tokens are transformers' best, "
        f"the worst is {deficit:.1e} standard deviations below it; {time.monotonic() - started_s:.1f} s",
        flush=True,
    )
    if not deficit <= MAX_DEFICIT[dtype]:
        raise RuntimeError(f"a token is {deficit:.2e} below transformers' best: no number is worth printing")


# --- transformers -----------------------------------------------------------------------------------------------------


def measure_theirs(options: argparse.Namespace, settings: dict[str, object], platform: Platform) -> list[Line]:
    started_s = time.monotonic()
    device = platform.device(0)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = build_theirs(settings, dtype, device)
    config = parse_model_config(settings)
    num_tokens = max([1, *options.decode, *options.prefill])
    spread_their_routing(model, draw_by_layer(draw_trained, config, num_tokens, device))
    print(f"transformers: start {time.monotonic() - started_s:.1f} s, {gib(model):.1f} GiB", flush=True)
    lines = []
    for batch_size in options.decode:
        choices = CHOICES if batch_size <= MAX_COPIED else CHOICES[:2]
        times = {choice: time_their_decode(model, choice, batch_size, options.context, platform) for choice in choices}
        for choice, seconds in times.items():
            print(f"  decode B={batch_size:3d}, {choice}: {1e3 * seconds:.2f} ms", flush=True)
        best = min(times, key=lambda choice: times[choice])
        lines.append(Line("decode", batch_size, times[best], str(best)))
    model.set_experts_implementation("grouped_mm")
    for length in options.prefill:
        input_ids = torch.randint(10, config.vocab_size, (1, length), device=device)
        seconds = time_rounds(lambda ids=input_ids: prefill_theirs(model, ids), platform)
        print(f"  prefill {length}: {1e3 * seconds:.1f} ms, {length / seconds:.0f} tok/s", flush=True)
        lines.append(Line("prefill", length, seconds, "grouped_mm"))
    return lines


def time_their_decode(
    model: torch.nn.Module, choice: Choice, batch_size: int, context: int, platform: Platform
) -> float:
    """Seconds a step; infinity where memory does not suffice."""
    try:
        room = WARM_UP + ROUNDS * ROUND_STEPS + 1
        steps = TheirSteps(model, choice, batch_size, context, room)  # type: ignore[arg-type]
        steps.decode(WARM_UP)
        return time_rounds(lambda: steps.decode(ROUND_STEPS), platform, num_warm_up=0) / ROUND_STEPS
    except torch.OutOfMemoryError:
        return float("inf")
    finally:
        free(platform)


def time_rounds(run: Callable[[], object], platform: Platform, num_warm_up: int = 1) -> float:
    """Seconds, the median."""
    times = []
    for i in range(num_warm_up + ROUNDS):
        platform.synchronize()
        started_s = time.perf_counter()
        run()
        platform.synchronize()
        if i >= num_warm_up:
            times.append(time.perf_counter() - started_s)
    return statistics.median(times)


# --- Argosy -----------------------------------------------------------------------------------------------------------


def measure_ours(options: argparse.Namespace, settings: dict[str, object], quantization: str) -> list[Line]:
    started_s = time.monotonic()
    built = build(options, settings, quantization, options.decode, options.prefill)
    runner, config = built.core.runner, built.model_config
    num_tokens = max([options.chunk, *options.decode, *options.prefill])
    spread_routing(runner.model, draw_by_layer(draw_trained, config, num_tokens, built.device))
    runner.graphs = record_graphs(runner, config, built.platform, options.decode, options.context)
    fill_cache(runner)
    print(f"Argosy {quantization}: start {time.monotonic() - started_s:.1f} s, {gib(runner.model):.1f} GiB", flush=True)
    bench = Bench(
        runner=runner,
        platform=built.platform,
        block_size=BLOCK_SIZE,
        vocab_size=min(built.tokenizer.vocab_size, config.vocab_size),
        chunk=options.chunk,
        context=options.context,
    )
    lines = []
    for batch_size in options.decode:
        error = check_graph(bench, batch_size)
        times = measure_decode(bench, batch_size, options.steps)
        lines.append(Line("decode", batch_size, times.overlapped_ms / 1e3, f"graph against eager {error:.1e}"))
    for length in options.prefill:
        lines.append(Line("prefill", length, length / measure_prefill(bench, length).tokens_per_s))
    return lines


def print_lines(quantization: str, lines: Sequence[Line], theirs: Sequence[Line]) -> None:
    for line, other in zip(lines, theirs, strict=True):
        goal = GOALS.get((line.kind, line.size))
        wanted = "" if goal is None else f" (goal {goal}x)"
        print(
            f"  {quantization:6} {line.kind:8} {line.size:6d}: {1e3 * line.seconds:9.2f} ms, transformers "
            f"{1e3 * other.seconds:9.2f} ms, {other.seconds / line.seconds:6.1f}x{wanted}; {other.note}; {line.note}",
            flush=True,
        )


def gib(model: torch.nn.Module) -> float:
    return sum(parameter.nbytes for parameter in model.parameters()) / 2**30


if __name__ == "__main__":
    sys.exit(main())
