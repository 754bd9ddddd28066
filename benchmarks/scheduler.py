"""What scheduling and bookkeeping cost a step: ``schedule()`` + ``update()``, timed alone, without a model.

It measures steady decode at several batch sizes, one token a request and step; it does not measure prefill, the runner
or the detokeniser. Invariant: numbers are printed only after the same loop gave every request its tokens.

    python benchmarks/scheduler.py [--steps 2000] [--runs 5]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from argosy.cache.block_manager import BlockManager
from argosy.engine.request import Request
from argosy.engine.scheduler import Scheduler
from argosy.messages import StepOutput
from argosy.sampling_params import SamplingParams

BATCH_SIZES = (1, 8, 32, 128)
GOALS_US = {1: 25.0, 128: 200.0}  # the gate of the issue; half of it is the aim
BLOCK_SIZE = 64
NUM_PROMPT_TOKENS = 100
NUM_WARMUP_STEPS = 50
EOS_TOKEN_ID = 1
NS_PER_US = 1000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """Microseconds a step takes; over all steps of all runs, except the spread of the runs' medians."""

    batch_size: int
    median_us: float
    lowest_run_us: float  # the smallest of the runs' medians
    highest_run_us: float  # the largest
    p99_us: float
    ns_per_request: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="timed steps a run")
    parser.add_argument("--runs", type=int, default=5, help="runs a batch size; their spread is reported")
    arguments = parser.parse_args()
    for batch_size in BATCH_SIZES:
        check_tokens(batch_size)
    costs = [measure(batch_size, arguments.steps, arguments.runs) for batch_size in BATCH_SIZES]
    print_card(costs, arguments.steps, arguments.runs)
    print(json.dumps({"benchmark": "scheduler", **describe_machine(), "results": [asdict(cost) for cost in costs]}))


def build_scheduler(batch_size: int, num_output_tokens: int) -> Scheduler:
    """Every request is running and has computed its prompt when this returns."""
    max_model_len = NUM_PROMPT_TOKENS + num_output_tokens
    num_blocks = 1 + batch_size * -(-max_model_len // BLOCK_SIZE)
    manager = BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=True, hash_key=bytes(32))
    scheduler = Scheduler(
        manager,
        max_num_seqs=batch_size,
        max_num_batched_tokens=batch_size * NUM_PROMPT_TOKENS,
        max_model_len=max_model_len,
    )
    params = SamplingParams(max_tokens=num_output_tokens)
    for i in range(batch_size):
        prompt_token_ids = [2 + (i * NUM_PROMPT_TOKENS + j) % 1000 for j in range(NUM_PROMPT_TOKENS)]
        scheduler.add(Request(f"request-{i}", prompt_token_ids, params, (EOS_TOKEN_ID,)))
    return scheduler


def check_tokens(batch_size: int) -> None:
    num_output_tokens = 3 * BLOCK_SIZE + 1
    scheduler = build_scheduler(batch_size, num_output_tokens)
    received: dict[str, list[int]] = {f"request-{i}": [] for i in range(batch_size)}
    num_steps = 0
    while scheduler.has_unfinished():
        batch = scheduler.schedule()
        sampled = [[2 + (row + num_steps) % 1000] for row in batch.rows]
        for delta in scheduler.update(batch, StepOutput(sampled)):
            received[delta.request_id] += delta.new_token_ids
        num_steps += 1
    scheduler.check_integrity()
    for i, tokens in enumerate(received.values()):  # the first request has row 0, and so on
        expected = [2 + (i + step) % 1000 for step in range(num_output_tokens)]
        if tokens != expected or num_steps != num_output_tokens:
            sys.exit(f"batch size {batch_size}: request {i} got wrong tokens; no numbers are printed")


def measure(batch_size: int, num_steps: int, num_runs: int) -> StepCost:
    all_us: list[float] = []
    medians_us: list[float] = []
    for _ in range(num_runs):
        scheduler = build_scheduler(batch_size, NUM_WARMUP_STEPS + num_steps + 2)
        run_steps(scheduler, 1 + NUM_WARMUP_STEPS)
        run_us = run_steps(scheduler, num_steps)
        medians_us.append(statistics.median(run_us))
        all_us += run_us
    median_us = statistics.median(all_us)
    return StepCost(
        batch_size=batch_size,
        median_us=round(median_us, 2),
        lowest_run_us=round(min(medians_us), 2),
        highest_run_us=round(max(medians_us), 2),
        p99_us=round(statistics.quantiles(all_us, n=100)[98], 2),
        ns_per_request=round(median_us * NS_PER_US / batch_size, 1),
    )


def run_steps(scheduler: Scheduler, num_steps: int) -> list[float]:
    """Time every step. Building the output lists is the runner's work and stays outside the clock."""
    elapsed_us: list[float] = []
    clock = time.perf_counter_ns
    for step in range(num_steps):
        start = clock()
        batch = scheduler.schedule()
        schedule_ns = clock() - start
        output = StepOutput([[2 + (row + step) % 1000] for row in batch.rows])
        start = clock()
        scheduler.update(batch, output)
        elapsed_us.append((schedule_ns + clock() - start) / NS_PER_US)
    return elapsed_us


def print_card(costs: list[StepCost], num_steps: int, num_runs: int) -> None:
    machine = describe_machine()
    print("Scheduler and bookkeeping: schedule() + update(), steady decode, no model")
    print(f"{machine['hardware']}, Python {machine['python']}, commit {machine['commit']}")
    print(
        f"{NUM_WARMUP_STEPS} warm-up steps, then {num_steps} steps x {num_runs} runs, blocks of {BLOCK_SIZE} tokens\n"
    )
    print("  batch   median us   runs' medians us       p99 us   ns/request   goal us")
    for cost in costs:
        goal_us = GOALS_US.get(cost.batch_size)
        verdict = "" if goal_us is None else f"<= {goal_us:.0f} {'met' if cost.median_us <= goal_us else 'MISSED'}"
        spread = f"{cost.lowest_run_us:.1f} .. {cost.highest_run_us:.1f}"
        print(
            f"  {cost.batch_size:5d}   {cost.median_us:9.1f}   {spread:16s}   {cost.p99_us:9.1f}   "
            f"{cost.ns_per_request:10.0f}   {verdict}"
        )
    print()


def describe_machine() -> dict[str, str]:
    return {
        "hardware": f"{_cpu_name()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "commit": _commit(),
        "command": " ".join(["python", "benchmarks/scheduler.py", *sys.argv[1:]]),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    root = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "none"


if __name__ == "__main__":
    main()
