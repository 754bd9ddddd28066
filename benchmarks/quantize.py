"""How fast ``argosy quantize`` is, against what this disk and one pass of arithmetic cost.

It makes a checkpoint of real widths in a temporary directory, and takes turns: read all of its bytes, one pass over all
numbers (to float32, in pieces that fit a cache), write as many bytes as the result has and sync them; then the
conversion. Page caches of the source are dropped before every read. The import of torch is not timed. CPU seconds are
given too, because on a busy machine only they mean something. Invariant: numbers are printed only after the converted
tensors equalled ``quantize_per_channel``.

    python benchmarks/quantize.py [--source-mib 1200] [--format bf16|fp8] [--num-threads 3] [--runs 3] [--directory DIR]
"""

import argparse
import concurrent.futures
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from argosy.quantization.checkpoint_format import CheckpointQuantization
from argosy.quantization.convert import ConversionOptions, convert_checkpoint
from argosy.quantization.fp8_block import dequantize_fp8_block
from argosy.quantization.quantize_weight import quantize_per_channel

EXPERT_SHAPES = (("gate_proj", (2048, 7168)), ("up_proj", (2048, 7168)), ("down_proj", (7168, 2048)))
EXPERTS_PER_SHARD = 3
PIECE_BYTES = 8 * 2**20
PASS_ELEMENTS = 128 * 1024
BLOCK = 128
GOAL = 0.6
MIB = 2**20
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Seconds, medians over the runs; the spread is (largest - smallest) / median."""

    source_format: str
    num_threads: int
    source_mib: float
    output_mib: float
    read_s: float
    arithmetic_s: float
    write_s: float
    quantize_s: float
    quantize_spread: float
    baseline_cpu_s: float  # user and system time of the first three together
    quantize_cpu_s: float
    source_mib_per_s: float
    share_of_cost: float  # (read + arithmetic + write) / quantize; the goal is at least GOAL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source-mib", type=int, default=1200, help="size of the generated checkpoint")
    parser.add_argument("--format", choices=("bf16", "fp8"), default="bf16", help="of the source")
    parser.add_argument(
        "--num-threads", type=int, default=len(os.sched_getaffinity(0)) + 1, help="default: as argosy quantize"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=None, help="on the disk to measure; default: the system's")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="argosy-quantize-", dir=arguments.directory) as root:
        source = write_source(Path(root) / "source", arguments.source_mib * MIB, arguments.format)
        result = measure(source, Path(root), arguments.format, arguments.num_threads, arguments.runs)
    print_card(result, arguments.runs)
    print(json.dumps({"benchmark": "quantize", **describe_machine(), **asdict(result)}))


def write_source(directory: Path, num_bytes: int, source_format: str) -> Path:
    directory.mkdir()
    expert_bytes = sum(rows * columns for _, (rows, columns) in EXPERT_SHAPES) * (2 if source_format == "bf16" else 1)
    weight_map: dict[str, str] = {}
    for shard in range(max(1, round(num_bytes / expert_bytes / EXPERTS_PER_SHARD))):
        name = f"model-{shard:05d}.safetensors"
        tensors = make_shard(shard, source_format)
        save_file(tensors, directory / name)
        weight_map |= dict.fromkeys(tensors, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {} if source_format == "bf16" else {"quantization_config": FP8_CONFIG}
    (directory / "config.json").write_text(json.dumps(config))
    os.sync()
    return directory


def make_shard(shard: int, source_format: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(shard)
    tensors: dict[str, torch.Tensor] = {}
    for expert in range(EXPERTS_PER_SHARD):
        for kind, (rows, columns) in EXPERT_SHAPES:
            name = f"model.layers.{shard}.mlp.experts.{expert}.{kind}.weight"
            if source_format == "bf16":
                tensors[name] = torch.randn(rows, columns, generator=generator).bfloat16()
                continue
            codes = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
            codes[codes & 0x7F == 0x7F] = 0  # NaN
            tensors[name] = codes.view(torch.float8_e4m3fn)
            blocks = torch.rand(rows // BLOCK, columns // BLOCK, generator=generator)
            tensors[f"{name}_scale_inv"] = torch.exp2((blocks * 4).floor() - 10)
    return tensors


def measure(source: Path, root: Path, source_format: str, num_threads: int, num_runs: int) -> Result:
    """One turn warms up; then ``num_runs`` turns of all four."""
    out, scratch = root / "out", root / "scratch"
    files = sorted(source.glob("*.safetensors"))
    names = ("read", "arithmetic", "write", "quantize")
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    sizes: list[int] = []
    for turn in range(num_runs + 1):
        drop_cache(files)
        took = {"read": timed(lambda: read_all(files))}
        took["arithmetic"] = timed(lambda: pass_over_all(files, source_format, num_threads))
        drop_cache(files)
        took["quantize"] = timed(lambda: quantize(source, out, num_threads))
        if turn == 0:
            check(source, out, source_format)
        sizes = [path.stat().st_size for path in sorted(out.glob("*.safetensors"))]
        shutil.rmtree(out)
        took["write"] = timed(lambda: write_all(scratch, sizes))  # noqa: B023
        shutil.rmtree(scratch)
        for name, value in took.items():
            if turn > 0:
                wall[name].append(value[0])
                cpu[name].append(value[1])
    medians = {name: statistics.median(values) for name, values in wall.items()}
    cpu_medians = {name: statistics.median(values) for name, values in cpu.items()}
    source_bytes = sum(file.stat().st_size for file in files)
    runs = wall["quantize"]
    return Result(
        source_format=source_format,
        num_threads=num_threads,
        source_mib=round(source_bytes / MIB, 1),
        output_mib=round(sum(sizes) / MIB, 1),
        read_s=round(medians["read"], 3),
        arithmetic_s=round(medians["arithmetic"], 3),
        write_s=round(medians["write"], 3),
        quantize_s=round(medians["quantize"], 3),
        quantize_spread=round((max(runs) - min(runs)) / medians["quantize"], 3),
        baseline_cpu_s=round(sum(cpu_medians[name] for name in names[:3]), 3),
        quantize_cpu_s=round(cpu_medians["quantize"], 3),
        source_mib_per_s=round(source_bytes / MIB / medians["quantize"], 1),
        share_of_cost=round((medians["read"] + medians["arithmetic"] + medians["write"]) / medians["quantize"], 3),
    )


def timed(action: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    start, cpu_start = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - start, time.process_time() - cpu_start


def drop_cache(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(files: list[Path]) -> None:
    buffer = memoryview(bytearray(PIECE_BYTES))
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def pass_over_all(files: list[Path], source_format: str, num_threads: int) -> None:
    """Numbers to float32 by as many threads as the conversion has; the files are in the page cache by now."""

    def pass_over(file: Path) -> None:
        torch.set_num_threads(1)
        numbers = torch.empty(PASS_ELEMENTS)
        for piece in read_pieces(file):
            # FP8 counts as plain bytes here: torch has no fast way to widen it, and that would flatter us.
            dtype = torch.uint8 if source_format == "fp8" else torch.bfloat16
            for chunk in torch.from_numpy(piece[: len(piece) // 2 * 2]).view(dtype).split(PASS_ELEMENTS):
                numbers[: len(chunk)].copy_(chunk)

    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(pass_over, files))


def read_pieces(file: Path) -> Iterator[np.ndarray]:
    whole = np.memmap(file, dtype=np.uint8, mode="c")
    for start in range(0, len(whole), PIECE_BYTES):
        yield whole[start : start + PIECE_BYTES]


def write_all(directory: Path, sizes: list[int]) -> None:
    directory.mkdir()
    data = memoryview(os.urandom(PIECE_BYTES))
    for number, size in enumerate(sizes):
        with (directory / str(number)).open("wb", buffering=0) as stream:
            for start in range(0, size, PIECE_BYTES):
                stream.write(data[: min(PIECE_BYTES, size - start)])
            os.fsync(stream.fileno())


def quantize(source: Path, out: Path, num_threads: int) -> None:
    target = CheckpointQuantization(kind="w8a8")
    options = ConversionOptions(source=source, destination=out, target=target, num_threads=num_threads)
    convert_checkpoint(options, lambda progress: None)


def check(source: Path, out: Path, source_format: str) -> None:
    shard = sorted(source.glob("*.safetensors"))[-1]
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(shard, "pt") as original:
        for name in list(original.keys()):
            if name.endswith("_scale_inv"):
                continue
            weight = original.get_tensor(name)
            if source_format == "fp8":
                weight = dequantize_fp8_block(weight, original.get_tensor(f"{name}_scale_inv"), torch.float32)
            quantized, scale = quantize_per_channel(weight)
            with safe_open(out / weight_map[name], "pt") as converted:
                is_equal = torch.equal(converted.get_tensor(name), quantized)
                is_equal &= torch.equal(converted.get_tensor(f"{name}_scale"), scale)
            if not is_equal:
                sys.exit(f"{name} was not converted as specified; no numbers are printed")


def print_card(result: Result, num_runs: int) -> None:
    machine = describe_machine()
    print(f"argosy quantize: {result.source_mib:,.0f} MiB of {result.source_format} -> {result.output_mib:,.0f} MiB")
    print(f"{machine['hardware']}, torch {machine['torch']}, commit {machine['commit']}")
    print(f"{result.num_threads} threads, medians of {num_runs} runs after one warm-up, source not in the page cache\n")
    for label, seconds in (
        ("read", result.read_s),
        ("one pass to float32", result.arithmetic_s),
        ("write and sync", result.write_s),
        ("all three", result.read_s + result.arithmetic_s + result.write_s),
        ("argosy quantize", result.quantize_s),
    ):
        print(f"  {label:20s} {seconds:8.2f} s   {result.source_mib / seconds:8,.0f} MiB/s of the source")
    verdict = "met" if result.share_of_cost >= GOAL else "MISSED"
    print(f"\n  speed against all three: {result.share_of_cost:.2f} (goal >= {GOAL}: {verdict}), ", end="")
    print(f"spread of the conversion {100 * result.quantize_spread:.0f} %")
    print(
        f"  CPU time: {result.baseline_cpu_s:.2f} s for all three, {result.quantize_cpu_s:.2f} s for the conversion\n"
    )


def describe_machine() -> dict[str, str]:
    return {
        "hardware": f"{_cpu_name()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "command": " ".join(["python", "benchmarks/quantize.py", *sys.argv[1:]]),
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
