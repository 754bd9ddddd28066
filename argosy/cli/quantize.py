"""``argosy quantize``: writes a checkpoint's W8A8 form, and reports what that cost each layer.

The work is ``argosy.quantization.convert``'s. Ctrl-C keeps finished shards, and the same command goes on from them.
Invariant: exit code 0 means that the destination is complete.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from argosy.cli.invocation import EXIT_OK, Invocation
from argosy.cli.quantize_report import build_error_table, build_kept_table, describe_sizes
from argosy.cli.terminal import show_byte_progress

if TYPE_CHECKING:
    from argosy.quantization.convert import ConversionOptions, ConversionProgress

SchemeName = Literal["w8a8"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeOptions:
    """Convert a checkpoint (bf16, fp16, fp32 or DeepSeek's FP8) to W8A8 INT8 in compressed-tensors' layout."""

    source: Annotated[str | None, tyro.conf.Positional] = None  # the checkpoint's directory, or argosy-tiny
    destination: Annotated[str | None, tyro.conf.Positional] = None  # a directory to make; a killed run goes on in it
    scheme: SchemeName = "w8a8"  # INT8 weights per output channel, INT8 activations per token
    quantize_kv_b: bool = False  # quantise kv_b_proj too, which attention then dequantises when it is loaded
    quantize_mtp: bool = False  # quantise the linears of MTP layers too, but for eh_proj and the head
    num_threads: int | None = None  # None: one more than the cores, for one always waits for the disk
    max_shard_bytes: int | None = None  # of an output file; None: one output file for each of the source's
    overwrite: bool = False  # delete what a conversion with other options or of another source left in DESTINATION
    debug: bool = False  # show tracebacks

    def __post_init__(self) -> None:
        if self.source is None or self.destination is None:
            raise ValueError("give a source and a destination: argosy quantize SRC DST --scheme w8a8")


def run_quantize(options: QuantizeOptions, invocation: Invocation) -> int:
    from argosy.quantization.convert import convert_checkpoint

    conversion = _build_conversion(options)
    terminal = invocation.terminal
    last: list[ConversionProgress] = []
    start = time.perf_counter()
    with show_byte_progress(terminal, options.scheme) as bar:

        def show(progress: "ConversionProgress") -> None:
            last[:] = [progress]
            bar.show(progress.num_bytes, progress.total_bytes)

        tensors = convert_checkpoint(conversion, show)
    seconds = time.perf_counter() - start
    console = terminal.table_console()
    console.print(build_error_table(tensors))
    console.print(build_kept_table(tensors))
    print(describe_sizes(tensors, conversion.destination), file=terminal.stdout)
    terminal.say(_describe_speed(last[-1], seconds, conversion.num_threads))
    return EXIT_OK


def _build_conversion(options: QuantizeOptions) -> "ConversionOptions":
    from argosy.engine.model_directory import resolve_model_directory
    from argosy.models.deepseek.config import load_model_config
    from argosy.models.deepseek.quantized_modules import build_w8a8_format
    from argosy.quantization.convert import ConversionOptions

    assert options.source is not None and options.destination is not None
    source = resolve_model_directory(options.source)
    target = build_w8a8_format(
        load_model_config(source), quantize_kv_b=options.quantize_kv_b, quantize_mtp=options.quantize_mtp
    )
    return ConversionOptions(
        source=source,
        destination=Path(options.destination).expanduser(),
        target=target,
        num_threads=len(os.sched_getaffinity(0)) + 1 if options.num_threads is None else options.num_threads,
        max_shard_bytes=options.max_shard_bytes,
        overwrite=options.overwrite,
    )


def _describe_speed(progress: "ConversionProgress", seconds: float, num_threads: int) -> str:
    resumed = ""
    if progress.resumed_bytes:
        resumed = f"; {progress.resumed_bytes / 2**20:,.1f} MiB were converted by an earlier run"
    rate = progress.num_bytes / 2**20 / seconds
    return (
        f"read {progress.num_bytes / 2**20:,.1f} MiB in {seconds:.1f} s, {rate:,.0f} MiB/s, {num_threads} threads"
        f"{resumed}"
    )
