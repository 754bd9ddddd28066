"""A conversion that is killed, runs out of disk, or finds its destination taken: nothing is lost, nothing lies.

Children are forked, so that they can be killed and limited. Invariant: after every test the destination either has no
index, or is the checkpoint that an undisturbed run writes, byte by byte.
"""

import ctypes
import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from argosy.quantization import conversion_destination
from argosy.quantization.checkpoint_format import CheckpointQuantization
from argosy.quantization.conversion_manifest import MANIFEST_NAME
from argosy.quantization.safetensors_headers import INDEX_NAME
from tests.helpers.conversions import (
    convert,
    load_converted,
    make_weights,
    read_tree,
    run_in_child,
    split_weights,
    write_source,
)

MS_DETACH = 2  # of umount2: even while something is open


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", *split_weights(make_weights(), 3))


def write_large_source(directory: Path, num_shards: int = 6) -> Path:
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2 * num_shards)]
    weights = {name: torch.randn(700, 1000, generator=generator).bfloat16() for name in names}
    return write_source(directory, *split_weights(weights, num_shards))


def finished_shards(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("*.safetensors")}


def test_sigkill_at_random_moments_then_resume_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_large_source(tmp_path / "source")
    start = time.monotonic()
    convert(source, tmp_path / "undisturbed")
    duration = time.monotonic() - start
    expected = read_tree(tmp_path / "undisturbed")
    rng = random.Random(7)
    num_killed = 0
    for trial in range(3):
        out = tmp_path / f"out{trial}"
        for _ in range(6):
            pid = os.fork()
            if pid == 0:
                convert(source, out)
                os._exit(0)
            time.sleep(rng.uniform(0, duration))
            os.kill(pid, signal.SIGKILL)
            num_killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
            if (out / INDEX_NAME).exists():
                assert read_tree(out).keys() >= expected.keys()  # whole, whatever else is still there
        convert(source, out)
        assert read_tree(out) == expected
    assert num_killed > 5


def test_death_at_every_step_on_the_disk_then_resume_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "undisturbed")
    expected = read_tree(tmp_path / "undisturbed")
    num_deaths = 0
    for step in range(1000):
        out = tmp_path / "out"

        def die_at_step(step: int = step, out: Path = out) -> None:
            _die_before_call("replace", step // 2) if step % 2 else _die_before_call("fsync", step // 2)
            convert(source, out)

        status = run_in_child(die_at_step)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            break
        num_deaths += 1
        # What has its own name is whole; only the manifest changes, and it is replaced whole.
        shown = {name: content for name, content in read_tree(out).items() if not Path(name).name.startswith(".")}
        assert all(content == expected[name] for name, content in shown.items() if name != MANIFEST_NAME)
        assert not (out / INDEX_NAME).exists() or read_tree(out).keys() >= expected.keys()
        convert(source, out)
        assert read_tree(out) == expected
        shutil.rmtree(out)
    assert num_deaths > 20


def _die_before_call(name: str, number: int) -> None:
    """In a forked child: the process ends, as by SIGKILL, at the ``number``-th call of ``os.name``."""
    original: Callable[..., object] = getattr(os, name)
    calls = iter(range(number + 1))

    def call(*arguments: object) -> object:
        if next(calls, None) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(os, name, call)


def test_finished_shards_are_not_made_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out)
    before = finished_shards(out)
    first, *rest = sorted(before)
    (out / first).unlink()  # as if it had not been finished
    (out / INDEX_NAME).unlink()
    convert(source, out)
    after = finished_shards(out)
    assert {name: after[name] for name in rest} == {name: before[name] for name in rest}
    assert after[first] != before[first]


@pytest.mark.parametrize("damage", ["truncated", "header"])
def test_shard_that_is_not_the_planned_one_is_made_again(damage: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out)
    expected = read_tree(out)
    shard = sorted(out.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] if damage == "truncated" else content.replace(b"weight", b"wEight", 1))
    convert(source, out)
    assert read_tree(out) == expected


def test_report_after_a_resume_has_every_error(source: Path, tmp_path: Path) -> None:
    first = convert(source, tmp_path / "out")
    assert convert(source, tmp_path / "out") == first
    assert any(report.errors is not None for report in first)


def test_changed_source_is_refused_until_overwritten(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out)
    before = read_tree(out)
    shard = sorted(source.glob("*.safetensors"))[0]
    os.utime(shard, ns=(0, 12345))
    with pytest.raises(ValueError, match=r"different: source\).*--overwrite"):
        convert(source, out)
    assert read_tree(out) == before
    convert(source, out, overwrite=True)
    assert load_converted(out).keys()


def test_other_options_are_refused_until_overwritten(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out)
    (out / "notes.md").write_text("mine")
    other = CheckpointQuantization(kind="w8a8", ignored=("lm_head",))
    with pytest.raises(ValueError, match="different: ignored"):
        convert(source, out, target=other)
    with pytest.raises(ValueError, match="different: max_shard_bytes"):
        convert(source, out, max_shard_bytes=40_000)
    convert(source, out, target=other, max_shard_bytes=10**9, overwrite=True)
    convert(source, tmp_path / "fresh", target=other, max_shard_bytes=10**9)
    (out / "notes.md").unlink()  # was left alone
    assert read_tree(out) == read_tree(tmp_path / "fresh")


def test_overwrite_never_deletes_outside_of_the_destination(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out)
    lines = (out / MANIFEST_NAME).read_text().splitlines()
    task = json.loads(lines[0])
    task["outputs"].append("../source/tokenizer.json")
    (out / MANIFEST_NAME).write_text(json.dumps(task) + "\n")
    with pytest.raises(ValueError, match="which is not in"):
        convert(source, out, overwrite=True)
    assert (source / "tokenizer.json").is_file()


@pytest.mark.parametrize("content", ["", "{", "[]\n", '{"outputs": 5}\n'])
def test_unreadable_record_is_refused(content: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST_NAME).write_text(content)
    with pytest.raises(ValueError, match="--overwrite"):
        convert(source, out)
    with pytest.raises(ValueError, match="it is not known what to delete"):
        convert(source, out, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_destination_with_other_things_is_left_alone(overwrite: bool, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("the only copy")
    with pytest.raises(ValueError, match=r"holds other files \('thesis\.txt'\)"):
        convert(source, out, overwrite=overwrite)
    assert read_tree(out) == {"thesis.txt": b"the only copy"}


def test_destination_that_is_the_source_is_refused(source: Path, tmp_path: Path) -> None:
    before = read_tree(source)
    (tmp_path / "link").symlink_to(source)
    for destination in (source, source / "int8", tmp_path / "link", source / ".." / "source"):
        with pytest.raises(ValueError, match="is the source, or inside of it"):
            convert(source, destination, overwrite=True)
    assert read_tree(source) == before


def test_destination_that_is_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file; name a directory"):
        convert(source, tmp_path / "file")
    with pytest.raises(ValueError, match="cannot be made"):
        convert(source, tmp_path / "file" / "below")


def test_two_conversions_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(RuntimeError, match="another argosy quantize is writing"):
        convert(source, out)
    os.close(descriptor)
    convert(source, out)


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_too_small_a_disk_is_refused_before_a_byte_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(conversion_destination.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(RuntimeError, match=r"has 1000 bytes free, and the conversion needs \d+ more"):
        convert(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors*"))


def test_file_size_limit_midway_is_one_clear_error_and_can_be_resumed(source: Path, tmp_path: Path) -> None:
    out, message = tmp_path / "out", tmp_path / "message"

    def convert_with_limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        try:
            convert(source, out, num_threads=1)
        except RuntimeError as error:
            message.write_text(str(error))

    assert run_in_child(convert_with_limit) == 0
    where = r"cannot write .*model-0000\d-of-00003\.safetensors: File too large"
    assert re.search(where + r"; the file needs \d{5,} bytes, and \d+ are free", message.read_text())
    assert not (out / INDEX_NAME).exists() and not list(out.glob(".*.partial"))
    convert(source, out)
    convert(source, tmp_path / "undisturbed")
    assert read_tree(out) == read_tree(tmp_path / "undisturbed")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB of its own."""
    if os.getuid() != 0:
        pytest.skip("only root may mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(disk).encode(), b"tmpfs", 0, b"size=3M") != 0:
        pytest.skip(f"no tmpfs can be mounted here: {os.strerror(ctypes.get_errno())}")
    yield disk
    libc.umount2(str(disk).encode(), MS_DETACH)


def test_disk_that_fills_up_midway_keeps_what_is_finished(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_large_source(tmp_path / "source", num_shards=3)  # 1.4 MB each when converted
    out = small_disk / "out"
    # Somebody else's file takes the room after the check.
    monkeypatch.setattr("argosy.quantization.convert.check_room", lambda destination, num_needed_bytes: None)
    with pytest.raises(
        RuntimeError, match=r"cannot write .*No space left on device; the file needs \d+ bytes, and \d+"
    ):
        convert(source, out, num_threads=1)
    assert len(finished_shards(out)) == 2
    assert not (out / INDEX_NAME).exists() and not list(out.glob(".*.partial"))
    before = finished_shards(out)
    libc = ctypes.CDLL(None, use_errno=True)
    ms_remount = 32
    assert libc.mount(b"tmpfs", str(small_disk).encode(), b"tmpfs", ms_remount, b"size=30M") == 0
    convert(source, out)
    assert {name: finished_shards(out)[name] for name in before} == before
    convert(source, tmp_path / "undisturbed")
    assert read_tree(out) == read_tree(tmp_path / "undisturbed")


def test_truncated_source_is_refused(source: Path, tmp_path: Path) -> None:
    shard = sorted(source.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(ValueError, match="truncated"):
        convert(source, tmp_path / "out")


# --- memory -----------------------------------------------------------------------------------------------------------

# Not ru_maxrss, which a new program inherits from the one that started it.
MEASURE_PEAK = """
import sys
from pathlib import Path
from tests.helpers.conversions import convert

def peak_bytes():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

before = peak_bytes()
convert(Path(sys.argv[1]), Path(sys.argv[2]))
print(before, peak_bytes())
"""


def write_sparse_source(directory: Path, num_tensors: int, shape: tuple[int, int]) -> Path:
    """bf16 weights of zeros that take no room on the disk."""
    directory.mkdir()
    size = 2 * shape[0] * shape[1]
    header = {
        f"model.layers.{i}.mlp.up_proj.weight": {
            "dtype": "BF16", "shape": list(shape), "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(num_tensors)
    }  # fmt: skip
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + num_tensors * size)
    (directory / "config.json").write_text("{}")
    return directory


@pytest.mark.parametrize(
    ("num_tensors", "num_rows"),
    [(1, 16 * 1024), pytest.param(4, 256 * 1024, marks=[pytest.mark.slow, pytest.mark.timeout(600)])],
)
def test_memory_does_not_grow_with_the_model(num_tensors: int, num_rows: int, tmp_path: Path) -> None:
    largest_bytes = 2 * num_rows * 4096  # 128 MiB; slow: 2 GiB
    source = write_sparse_source(tmp_path / "source", num_tensors, (num_rows, 4096))
    command = [sys.executable, "-c", MEASURE_PEAK, str(source), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500)
    before, peak = map(int, result.stdout.split())
    assert peak <= 2 * largest_bytes + 2**30  # what is promised
    assert peak - before <= 96 * 2**20  # what two threads with pieces of 8 MiB take, whatever the tensor's size
