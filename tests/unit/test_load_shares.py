"""A rank reads the bytes that it owns, and no others; what it reads is counted, and memory holds its share once."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from argosy.assets import builtin_model_directory
from argosy.distributed.layout import ParallelLayout
from argosy.distributed.mesh import ParallelMesh
from argosy.models.deepseek.checkpoint import build_weight_mapping
from argosy.models.deepseek.config import load_model_config
from argosy.models.deepseek.load_plan import plan_load
from argosy.models.deepseek.model import DeepseekV32Model, weight_shard
from argosy.quantization.load_progress import LoadProgress
from argosy.quantization.placement import spec_of
from argosy.quantization.safetensors_headers import read_headers
from argosy.quantization.tensor_boxes import Index, Part
from argosy.quantization.weight_loader import LoadStats, load_weights
from argosy.quantization.weight_plan import Destination, WeightMapping
from tests.helpers.checkpoints import write_checkpoint, write_raw_shard

DIRECTORY = builtin_model_directory("argosy-tiny")
CONFIG = load_model_config(DIRECTORY)


class Weight(nn.Module):
    """One parameter, ``weight``."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, 7.0).to(dtype), requires_grad=False)


def take(source: Index) -> WeightMapping:
    return lambda name: Destination(name, (), source)


# ---- what all ranks read together

SPLIT_BY_TP = ("embed_tokens", "lm_head", "q_b_proj", "kv_b_proj", "o_proj", "layers.0.mlp.")  # layer 0 is dense


def expected_bytes_of_all_ranks(layout: ParallelLayout) -> int:
    """From names alone: an expert is read once in every ep group, a split tensor once in every tp group, and
    everything else by every rank."""
    num_bytes = 0
    for name, header in read_headers(DIRECTORY).items():
        if name.startswith(f"model.layers.{CONFIG.num_hidden_layers}."):
            continue  # MTP's
        if ".experts." in name:
            num_readers = layout.world_size // layout.num_ep_ranks
        elif any(text in name for text in SPLIT_BY_TP):
            num_readers = layout.world_size // layout.tp_size
        else:
            num_readers = layout.world_size
        num_bytes += num_readers * header.num_bytes
    return num_bytes


def load_rank(layout: ParallelLayout, rank: int) -> tuple[LoadStats, DeepseekV32Model]:
    mesh = ParallelMesh.unconnected(layout, rank)
    model = DeepseekV32Model(CONFIG, torch.bfloat16, mesh)
    shard = weight_shard(CONFIG, mesh)
    mapping = build_weight_mapping(CONFIG.num_hidden_layers, CONFIG.num_nextn_predict_layers, shard)
    return load_weights(model, DIRECTORY, mapping=mapping), model


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(dp_size=2, tp_size=8),
        ParallelLayout(dp_size=16, ep_size=16),
        ParallelLayout(tp_size=16),
        ParallelLayout(dp_size=2, tp_size=2, ep_size=2),
        ParallelLayout(),
    ],
)
def test_all_ranks_together_read_the_checkpoint_and_the_replicated_part(layout: ParallelLayout) -> None:
    loads = [load_rank(layout, rank) for rank in range(layout.world_size)]
    assert sum(stats.read_bytes for stats, _ in loads) == expected_bytes_of_all_ranks(layout)
    parameters = {name: spec_of(parameter) for name, parameter in loads[0][1].state_dict().items()}
    for plan in plan_load(read_headers(DIRECTORY), CONFIG, layout, parameters, (128, 128)):
        assert {plan.read_bytes} == {loads[rank][0].read_bytes for rank in plan.ranks}


# ---- that no other byte is read


def bytes_given_by_the_system(work: Callable[[], object]) -> int:
    """What this process's read calls have returned during ``work``."""

    def count() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])

    first = count()
    second = count()
    work()
    return count() - second - (second - first)  # a count is itself read from a file


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="asks the kernel through /proc")
@pytest.mark.parametrize(
    ("source", "shape"),
    [((Part(1, 4),), (64, 512)), ((Part(0, 1), Part(1, 4)), (256, 128)), ((slice(3, 9), slice(500, 501)), (6, 1))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_gave_what_the_counter_says(
    tmp_path: Path, source: Index, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    write_checkpoint(tmp_path, {"weight": torch.randn(256, 512), "other": torch.randn(100, 100)})
    model, counted = Weight(*shape, dtype=dtype), list[LoadStats]()

    def load() -> None:
        mapping = take(source)
        counted.append(load_weights(model, tmp_path, mapping=lambda name: mapping(name) if name == "weight" else None))

    load()  # what torch reads when something is used for the first time
    given_bytes = bytes_given_by_the_system(load) - bytes_given_by_the_system(lambda: read_headers(tmp_path))
    assert given_bytes == counted[1].read_bytes == 4 * model.weight.numel()


def test_bytes_of_others_may_be_holes_or_anything(tmp_path: Path) -> None:
    """A file that is poison and holes wherever this rank has no share, and larger than this machine's memory."""
    num_rows, num_columns, idx, num_parts = 256, 2**28, 3, 2**20
    width = num_columns // num_parts
    header = {
        "weight": {"dtype": "F32", "shape": [num_rows, num_columns], "data_offsets": [0, num_rows * num_columns * 4]}
    }
    file = tmp_path / "model.safetensors"
    write_raw_shard(file, header)
    data_start = file.stat().st_size
    os.truncate(file, data_start + num_rows * num_columns * 4)
    expected, poison = torch.randn(num_rows, width), torch.full((width,), float("nan"))
    with file.open("r+b") as stream:
        for row in range(num_rows):
            stream.seek(data_start + (row * num_columns + (idx - 1) * width) * 4)
            stream.write(b"".join(part.numpy().tobytes() for part in (poison, expected[row], poison)))
    model = Weight(num_rows, width)
    stats = load_weights(model, tmp_path, mapping=take((Part(0, 1), Part(idx, num_parts))))
    assert torch.equal(model.weight, expected)
    assert (stats.read_bytes, stats.num_reads) == (num_rows * width * 4, num_rows)


def test_neighbours_are_read_in_one_call(tmp_path: Path) -> None:
    model = nn.Module()
    tensors = {f"w{i}": torch.randn(3, 5) for i in range(2000)}
    for name in tensors:
        model.register_parameter(name, nn.Parameter(torch.empty(3, 5), requires_grad=False))
    stats = load_weights(model, write_checkpoint(tmp_path, tensors))
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in model.named_parameters())
    assert stats.num_reads == 2  # 1,024 buffers are the system's limit


# ---- pieces


@pytest.mark.parametrize("staging_bytes", [64, 1000, 1 << 20])
@pytest.mark.parametrize(
    "source", [(), (Part(1, 2),), (Part(0, 1), Part(1, 2)), (slice(5, 6),), (3,), (slice(0, 9), 4)]
)
def test_pieces_join_to_the_same_numbers(tmp_path: Path, source: Index, staging_bytes: int) -> None:
    weight = torch.randn(30, 40)
    part = {(): weight, (Part(1, 2),): weight[15:], (Part(0, 1), Part(1, 2)): weight[:, 20:], (3,): weight[3]}.get(
        source if all(not isinstance(entry, slice) for entry in source) else None,  # type: ignore[arg-type]
        weight[5:6] if source == (slice(5, 6),) else weight[:9, 4],
    )
    write_checkpoint(tmp_path, {"weight": weight})
    model = Weight(*part.shape, dtype=torch.bfloat16)
    stats = load_weights(model, tmp_path, mapping=take(source), staging_bytes=staging_bytes)
    assert torch.equal(model.weight, part.bfloat16())
    assert stats.read_bytes == 4 * part.numel()


def test_memory_of_any_order_can_be_filled(tmp_path: Path) -> None:
    weight = torch.randn(30, 40)
    write_checkpoint(tmp_path, {"weight": weight})
    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(40, 30).t(), requires_grad=False)
    load_weights(model, tmp_path, staging_bytes=999)
    assert torch.equal(model.weight, weight)
    assert model.weight.stride() == (1, 30)


# ---- files that change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: os.truncate(file, file.stat().st_size - 4), "changed while it was loaded"),
        (lambda file: file.open("ab").write(b"more"), "changed while it was loaded"),
        (lambda file: os.utime(file, ns=(1, 1)), "changed while it was loaded"),
        (lambda file: file.unlink(), "cannot read .*No such file.*check the path"),
    ],
)
@pytest.mark.parametrize("num_tensors_before", [0, 1])
def test_a_file_that_changes_during_the_load_is_noticed(
    tmp_path: Path, change: object, message: str, num_tensors_before: int
) -> None:
    write_checkpoint(tmp_path, {"weight": torch.randn(4)}, {"unused": torch.randn(4)})
    file = tmp_path / "model-00001-of-00002.safetensors"

    def change_file(progress: LoadProgress) -> None:
        if progress.num_tensors == num_tensors_before:
            change(file)  # type: ignore[operator]

    def load() -> None:
        load_weights(
            Weight(4),
            tmp_path,
            mapping=lambda name: take(())(name) if name == "weight" else None,
            on_progress=change_file,
        )

    if num_tensors_before == 1 and "No such file" in message:
        load()  # it was open and read: unlinking it takes nothing away
        return
    with pytest.raises(RuntimeError, match=message) as error:
        load()
    assert str(file) in str(error.value)


# ---- memory

MEASURE = """
import sys
from pathlib import Path
import torch
from torch import nn
from argosy.quantization.tensor_boxes import Part
from argosy.quantization.weight_loader import load_weights
from argosy.quantization.weight_plan import Destination

def peak_bytes():
    # Not ru_maxrss, which a new program inherits from the one that started it.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

directory, num_tensors, num_rows, num_columns = Path(sys.argv[1]), *map(int, sys.argv[2:])
torch.set_num_threads(1)
model = nn.Module()
for i in range(num_tensors):
    share = torch.empty(num_rows, num_columns // 2, dtype=torch.bfloat16)
    model.register_parameter(f"w{i}", nn.Parameter(share, requires_grad=False))
before = peak_bytes()
stats = load_weights(model, directory, mapping=lambda name: Destination(name, (), (Part(0, 1), Part(1, 2))))
print(peak_bytes() - before, stats.read_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory through /proc")
@pytest.mark.parametrize("num_tensors", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_peak_memory_is_the_share_and_a_bounded_rest(tmp_path: Path, num_tensors: int) -> None:
    """256 MiB a tensor, in fp32: half of each is read, in strides, and kept as bf16."""
    num_rows, num_columns = 8192, 8192
    size = num_rows * num_columns * 4
    shapes = {"dtype": "F32", "shape": [num_rows, num_columns]}
    header = {f"w{i}": shapes | {"data_offsets": [i * size, (i + 1) * size]} for i in range(num_tensors)}
    file = tmp_path / "model.safetensors"
    write_raw_shard(file, header)
    os.truncate(file, file.stat().st_size + num_tensors * size)  # holes, so that the test writes nothing
    arguments = [str(value) for value in (tmp_path, num_tensors, num_rows, num_columns)]
    completed = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    grown_bytes, read_bytes = map(int, completed.stdout.split())
    owned_bytes = num_tensors * num_rows * num_columns  # 2 bytes each, of half of them
    assert read_bytes == 2 * owned_bytes
    assert owned_bytes <= grown_bytes <= owned_bytes + 64 * 2**20  # 512 MiB are allowed; one tensor would be 128
