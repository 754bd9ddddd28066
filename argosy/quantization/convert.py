"""Converts a checkpoint to W8A8 on disk, streaming: ``argosy quantize`` without its terminal.

It knows no model: what is quantised is decided by the names in the target format. Invariant: the destination looks
whole (has an index) only when everything in it is, and a run after a kill leaves the same bytes as one without.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from argosy.quantization.checkpoint_format import (
    CONFIG_NAME,
    CheckpointQuantization,
    read_checkpoint_quantization,
    read_raw_config,
)
from argosy.quantization.compressed_tensors import build_config
from argosy.quantization.conversion_destination import (
    check_destination,
    check_room,
    list_other_files,
    lock_directory,
    reclaimable_bytes,
    remove_former,
)
from argosy.quantization.conversion_manifest import MANIFEST_NAME, Manifest, ShardErrors, fingerprint_source
from argosy.quantization.conversion_plan import Action, ShardPlan, plan_conversion
from argosy.quantization.conversion_workers import ConversionWorkers
from argosy.quantization.convert_rows import ErrorSums
from argosy.quantization.file_pieces import copy_file, write_file
from argosy.quantization.safetensors_headers import INDEX_NAME, read_headers

# Beside the shards: config, index, manifest. The index of 100,000 tensors has 10 MB.
_SMALL_FILES_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionOptions:
    """What ``convert_checkpoint`` does."""

    source: Path
    destination: Path
    target: CheckpointQuantization  # of kind w8a8
    num_threads: int = 1
    max_shard_bytes: int | None = None  # None: one output file for each of the source's
    overwrite: bool = False  # delete a former conversion of another source or with other options

    def __post_init__(self) -> None:
        assert self.target.kind == "w8a8", f"no converter to {self.target.kind}"
        for name in ("num_threads", "max_shard_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1; set --{name.replace('_', '-')}")


@dataclass(frozen=True, slots=True)
class ConversionProgress:
    """Bytes of the source: converted in this run, to convert in this run, and found converted by a former one."""

    num_bytes: int
    total_bytes: int
    resumed_bytes: int


@dataclass(frozen=True, slots=True)
class TensorReport:
    """What became of one tensor of the source."""

    name: str
    action: Action
    source_dtype: str
    num_source_bytes: int
    num_output_bytes: int
    errors: ErrorSums | None  # of a quantised tensor


def convert_checkpoint(
    options: ConversionOptions, on_progress: Callable[[ConversionProgress], None]
) -> tuple[TensorReport, ...]:
    """Write the destination, or what a killed run left to be written. ``on_progress``: from one thread at a time.

    Raises:
        ValueError: anything wrong with the source, the options or the destination's content.
        RuntimeError: files that cannot be read or written; a disk that is full.
    """
    source, destination = options.source, options.destination
    check_destination(source, destination, overwrite=options.overwrite)
    raw_config = read_raw_config(source)
    quantization = read_checkpoint_quantization(source, raw_config)
    headers = read_headers(source)
    plans = plan_conversion(headers, quantization, options.target, options.max_shard_bytes)
    other_files = list_other_files(source)
    source_files = {header.file for header in headers.values()} | {source / file for file in other_files}
    task = {
        "source": fingerprint_source(source_files | {source / CONFIG_NAME}),
        "scheme": options.target.kind,
        "ignored": options.target.ignored,
        "max_shard_bytes": options.max_shard_bytes,
        "outputs": [*(plan.file_name for plan in plans), *map(str, other_files), CONFIG_NAME, INDEX_NAME],
    }
    _make_directory(destination)
    with lock_directory(destination):
        if options.overwrite and (destination / MANIFEST_NAME).is_file():
            remove_former(destination)
        manifest = Manifest(destination, task)
        manifest.open()
        _convert_shards(plans, quantization.block_size, manifest, options, on_progress)
        _write_rest(options, raw_config, plans, other_files)
    return tuple(_report(plans, manifest))


def _make_directory(destination: Path) -> None:
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"destination {destination} cannot be made: {error.strerror}; name another") from error


def _convert_shards(
    plans: Iterable[ShardPlan],
    block_size: tuple[int, int],
    manifest: Manifest,
    options: ConversionOptions,
    on_progress: Callable[[ConversionProgress], None],
) -> None:
    finished = {plan.file_name for plan in plans if _is_finished(plan, options.destination, manifest)}
    unfinished = [plan for plan in plans if plan.file_name not in finished]
    needed = sum(plan.num_bytes for plan in unfinished) + (_SMALL_FILES_BYTES if unfinished else 0)
    reclaimed = reclaimable_bytes(options.destination / plan.file_name for plan in unfinished)
    check_room(options.destination, needed - reclaimed)
    total_bytes = sum(plan.num_source_bytes for plan in unfinished)
    resumed_bytes = sum(plan.num_source_bytes for plan in plans) - total_bytes
    done_bytes = 0

    def count(num_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += num_bytes
        on_progress(ConversionProgress(done_bytes, total_bytes, resumed_bytes))

    count(0)
    workers = ConversionWorkers(
        options.destination,
        block_size,
        on_shard=lambda plan, errors: manifest.add(plan.file_name, errors),
        on_bytes=count,
    )
    workers.run(unfinished, options.num_threads)


def _is_finished(plan: ShardPlan, destination: Path, manifest: Manifest) -> bool:
    file = destination / plan.file_name
    if manifest.finished_errors(plan.file_name) is None or not file.is_file():
        return False
    with file.open("rb") as stream:
        return file.stat().st_size == plan.num_bytes and stream.read(len(plan.header)) == plan.header


def _write_rest(
    options: ConversionOptions,
    raw_config: Mapping[str, object],
    plans: Iterable[ShardPlan],
    other_files: Iterable[Path],
) -> None:
    """Everything but shards; the index last, because it is what makes a directory a checkpoint."""
    destination = options.destination
    for file in other_files:
        (destination / file).parent.mkdir(parents=True, exist_ok=True)
        copy_file(options.source / file, destination / file)
    config = {**raw_config, "quantization_config": build_config(options.target.ignored)}
    write_file(destination / CONFIG_NAME, _encode(config))
    weight_map = {name: plan.file_name for plan in plans for name in plan.tensor_names}
    total_size = sum(plan.num_bytes - len(plan.header) for plan in plans)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_file(destination / INDEX_NAME, _encode(index))


def _encode(content: object) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _report(plans: Iterable[ShardPlan], manifest: Manifest) -> Iterable[TensorReport]:
    for plan in plans:
        errors: ShardErrors = manifest.finished_errors(plan.file_name) or {}
        for conversion in plan.conversions:
            yield TensorReport(
                name=conversion.name,
                action=conversion.action,
                source_dtype=conversion.source.dtype,
                num_source_bytes=conversion.source.num_bytes,
                num_output_bytes=conversion.num_output_bytes,
                errors=errors.get(conversion.name),
            )
