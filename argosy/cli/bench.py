"""``argosy bench``: prefill and decode throughput over batch sizes, through the same engine that serves requests.

Prompts are random ordinary tokens, new ones for every run, so the prefix cache never answers for the model. Before a
number is printed, the greedy tokens of every batch size are compared with the tokens of the same prompts run alone.
Invariant: a run that fails that check prints no number and exits with 1.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from rich.table import Table

from argosy.cli.code_version import read_commit
from argosy.cli.invocation import EXIT_FAILED, EXIT_OK, Invocation
from argosy.cli.language_model import LanguageModel, Prompt
from argosy.cli.terminal import Terminal, show_progress
from argosy.config import EngineConfig
from argosy.messages import DeploymentStats, RequestOutput
from argosy.sampling_params import SamplingParams

CHECK_PROMPT_TOKENS = 48
CHECK_OUTPUT_TOKENS = 16
# Share of greedy tokens that must equal those of the prompt run alone. NOTE(numerics): in bfloat16 another batch shape
# rounds otherwise, one flipped near-tie changes all tokens after it, and random prompts are full of near-ties.
EXACT_FORMAT = "float32"
ROUNDED_AGREEMENT = 0.5  # of every other format, where near-ties flip


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """Measure prefill and decode throughput."""

    batch_sizes: tuple[int, ...] = (1, 8, 32)  # requests that run at once
    input_tokens: int = 1024  # prompt length of the prefill measurement
    context_tokens: int = 64  # prompt length of the decode measurement
    output_tokens: int = 64  # output length of the decode measurement
    repeats: int = 5  # measured runs of every point, after one warm-up
    debug: bool = False  # show tracebacks

    def __post_init__(self) -> None:
        for name, low in (("input_tokens", 1), ("context_tokens", 1), ("output_tokens", 2), ("repeats", 1)):
            if getattr(self, name) < low:
                flag = name.replace("_", "-")
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}; set --{flag}")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes must be positive, got {self.batch_sizes}; set --batch-sizes 1 8 32")


class Measurement(msgspec.Struct, frozen=True):
    """Throughput of one point over its repeats, tokens per second of the whole batch."""

    phase: str  # prefill or decode
    batch_size: int
    input_tokens: int
    output_tokens: int
    median_tok_s: float
    min_tok_s: float
    max_tok_s: float


class BenchReport(msgspec.Struct, frozen=True):
    """The last line of the output."""

    command: str
    commit: str
    hardware: str
    model: str
    number_format: str
    repeats: int
    agreement: float  # share of greedy tokens equal to those of the prompt run alone
    measurements: list[Measurement]
    deployment: DeploymentStats  # counted over the whole command


def run_bench(options: BenchOptions, invocation: Invocation) -> int:
    config = invocation.engine_config
    _check_fits(options, config)
    llm = invocation.load_llm(config)
    bench = _Bench(llm, options, random.Random(config.seed))
    agreement = bench.measure_agreement()
    threshold = _required_agreement(llm, config)
    if agreement < threshold:
        invocation.terminal.warn(
            f"error: batched greedy tokens agree with those run alone on {agreement:.3f} of tokens; "
            f"{llm.number_format} needs {threshold:g}: no number is printed for a wrong run"
        )
        return EXIT_FAILED
    report = BenchReport(
        command=" ".join(("argosy", *invocation.arguments)),
        commit=read_commit(),
        hardware=llm.device_name,
        model=config.model,
        number_format=llm.number_format,
        repeats=options.repeats,
        agreement=agreement,
        measurements=bench.measure_all(invocation.terminal),
        deployment=llm.summarize_deployment(),
    )
    _print_report(report, invocation.terminal)
    return EXIT_OK


def _check_fits(options: BenchOptions, config: EngineConfig) -> None:
    largest = max(options.batch_sizes)
    if largest > config.max_num_seqs:
        raise ValueError(
            f"batch size {largest} exceeds max_num_seqs ({config.max_num_seqs}); "
            "raise --max-num-seqs or lower --batch-sizes"
        )
    if largest * options.context_tokens > config.max_num_batched_tokens:
        # All prompts must fit in one step, or the first requests would decode while the last still prefill.
        raise ValueError(
            f"batch size {largest} x context_tokens ({options.context_tokens}) exceeds max_num_batched_tokens "
            f"({config.max_num_batched_tokens}); raise --max-num-batched-tokens or lower --context-tokens"
        )


def _required_agreement(llm: LanguageModel, config: EngineConfig) -> float:
    """A model of random weights finds all tokens about equally likely, so any rounding changes what it says."""
    if llm.number_format == EXACT_FORMAT:
        return 1.0
    return 0.0 if config.load_format == "dummy" else ROUNDED_AGREEMENT


class _Bench:
    def __init__(self, llm: LanguageModel, options: BenchOptions, rng: random.Random) -> None:
        self._llm = llm
        self._options = options
        self._rng = rng
        self._ordinary_ids = [i for i in range(llm.vocab_size) if i not in llm.special_token_ids]

    def measure_agreement(self) -> float:
        """Share of greedy tokens before the first difference from the same prompt run alone, over all batch sizes."""
        params = _greedy(CHECK_OUTPUT_TOKENS)
        prompts = self._random_prompts(max(self._options.batch_sizes), CHECK_PROMPT_TOKENS)
        alone = [_token_ids(self._run([prompt], params))[0] for prompt in prompts]
        num_equal = num_tokens = 0
        for batch_size in self._options.batch_sizes:
            batched = _token_ids(self._run(prompts[:batch_size], params))
            num_equal += sum(_common_prefix(a, b) for a, b in zip(alone, batched, strict=False))
            num_tokens += batch_size * CHECK_OUTPUT_TOKENS
        return num_equal / num_tokens

    def measure_all(self, terminal: Terminal) -> list[Measurement]:
        points = [(phase, size) for phase in ("prefill", "decode") for size in self._options.batch_sizes]
        measurements = []
        with show_progress(terminal, "bench", len(points)) as progress:
            for phase, batch_size in points:
                measurements.append(self._measure(phase, batch_size))
                progress.advance()
        return measurements

    def _measure(self, phase: str, batch_size: int) -> Measurement:
        options = self._options
        input_tokens = options.input_tokens if phase == "prefill" else options.context_tokens
        output_tokens = 1 if phase == "prefill" else options.output_tokens
        rates = []
        for _ in range(options.repeats + 1):
            prompts = self._random_prompts(batch_size, input_tokens)
            start_s = time.monotonic()
            outputs = self._run(prompts, _greedy(output_tokens))
            prefill_rate = batch_size * input_tokens / (time.monotonic() - start_s)
            rates.append(prefill_rate if phase == "prefill" else _decode_rate(outputs))
        measured = rates[1:]  # the first run warms up caches and allocators
        return Measurement(
            phase, batch_size, input_tokens, output_tokens, statistics.median(measured), min(measured), max(measured)
        )

    def _run(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[RequestOutput]:
        outputs: dict[int, RequestOutput] = {}
        for index, result in self._llm.generate_as_finished(prompts, [params] * len(prompts)):
            if isinstance(result, ValueError):
                raise result
            outputs[index] = result
        return [outputs[index] for index in range(len(prompts))]

    def _random_prompts(self, count: int, length: int) -> list[list[int]]:
        return [self._rng.choices(self._ordinary_ids, k=length) for _ in range(count)]


def _greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def _token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def _common_prefix(left: list[int], right: list[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((position for position, (a, b) in pairs if a != b), min(len(left), len(right)))


def _decode_rate(outputs: list[RequestOutput]) -> float:
    """Tokens per second after the step that gave every request its first token."""
    num_tokens = sum(len(output.outputs[0].token_ids) - 1 for output in outputs)
    start_s = max(_reached(output.metrics.first_token_s) for output in outputs)
    return num_tokens / (max(_reached(output.metrics.finished_s) for output in outputs) - start_s)


def _reached(time_s: float | None) -> float:
    assert time_s is not None, "a finished request has all its times"
    return time_s


def _describe_deployment(stats: DeploymentStats) -> str:
    experts = f"busiest expert {stats.expert_imbalance:.2f} x the mean in the worst layer"
    if stats.num_late_compilations:
        experts += f"; {stats.num_late_compilations} kernels compiled while requests waited"
    if stats.num_ranks == 1:
        return experts
    sent = ", ".join(f"{axis} {count / 1e6:,.1f} MB" for axis, count in stats.bytes_sent.items())
    return (
        f"{stats.num_ranks} ranks sent {sent}; agreeing on a step {stats.coordination_us:,.0f} us; dummy steps "
        f"{sum(stats.num_dummy_steps)}; tokens of the busiest replica {stats.replica_imbalance:.2f} x the mean; "
        f"{experts}, busiest rank {stats.rank_imbalance:.2f} x"
    )


def _print_report(report: BenchReport, terminal: Terminal) -> None:
    console = terminal.table_console()
    console.print(f"{report.model} {report.number_format} on {report.hardware}")
    console.print(f"commit {report.commit}, median of {report.repeats} runs after one warm-up")
    table = Table("phase", "batch", "input", "output", "median tok/s", "min", "max")
    for item in report.measurements:
        counts = (str(item.batch_size), str(item.input_tokens), str(item.output_tokens))
        rates = (f"{rate:,.0f}" for rate in (item.median_tok_s, item.min_tok_s, item.max_tok_s))
        table.add_row(item.phase, *counts, *rates)
    console.print(table)
    console.print(f"greedy tokens equal to those run alone: {report.agreement:.4f}")
    console.print(_describe_deployment(report.deployment))
    terminal.stdout.write(msgspec.json.encode(report).decode() + "\n")
