"""The dry run names the bytes that a load would read: the published table's for the real model, the reader's own."""

import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

from argosy.assets import builtin_model_directory
from argosy.cli.main import main
from argosy.config import EngineConfig
from argosy.distributed.layout import ParallelLayout
from argosy.engine.load_plan import parameters_of_share
from argosy.models.deepseek.config import ModelConfig, parse_model_config
from argosy.models.deepseek.load_plan import RankLoadPlan, plan_load
from argosy.quantization.checkpoint_format import CheckpointQuantization
from argosy.quantization.safetensors_headers import TensorHeader
from tests.helpers.checkpoints import write_index, write_raw_shard
from tests.helpers.fake_language_model import fake_terminal, written
from tests.helpers.published import PUBLISHED_CONFIG, build_headers

GIB = 2**30
PUBLISHED = parse_model_config(PUBLISHED_CONFIG)


@cache
def published_headers(linear_dtype: str) -> dict[str, TensorHeader]:
    return build_headers(PUBLISHED, linear_dtype)


def plan_published(layout: ParallelLayout, linear_dtype: str) -> list[RankLoadPlan]:
    quantization = CheckpointQuantization(kind="w8a8" if linear_dtype == "I8" else "none")
    config = EngineConfig(dtype="bfloat16", dp_size=layout.dp_size, tp_size=layout.tp_size)
    parameters = parameters_of_share(config, PUBLISHED, quantization, layout)
    return plan_load(published_headers(linear_dtype), PUBLISHED, layout, parameters, (128, 128))


# GiB per rank of the published model with its MTP layer: attention, experts, shared experts, dense, embedding + head,
# and the total, which counts norms and the MTP projection too, but not the router and the scales.
TABLE = {
    (2, 8, "I8"): (2.95, 38.72, 2.42, 0.14, 0.43, 44.9),
    (1, 16, "I8"): (2.33, 38.72, 2.42, 0.07, 0.22, 43.9),
    (16, 1, "I8"): (11.64, 38.72, 2.42, 1.11, 3.45, 57.5),
    (8, 4, "I8"): (4.19, 19.36, 2.42, 0.28, 0.86, 27.3),
    (32, 1, "I8"): (11.64, 19.36, 2.42, 1.11, 3.45, 38.2),
    (2, 8, "BF16"): (5.84, 77.44, 4.84, 0.28, 0.43, 89.0),
}
FAST = (2, 8, "I8")
COLUMNS = ("attention", "experts", "shared experts", "dense", "embedding + head")


@pytest.mark.parametrize(
    ("dp_size", "tp_size", "linear_dtype"),
    [case if case == FAST else pytest.param(*case, marks=pytest.mark.slow) for case in TABLE],
)
def test_the_real_models_shares_are_those_of_the_published_table(dp_size: int, tp_size: int, linear_dtype: str) -> None:
    layout = ParallelLayout(dp_size=dp_size, tp_size=tp_size)
    (plan,) = plan_published(layout, linear_dtype)
    assert plan.ranks == tuple(range(dp_size * tp_size))
    gib = {each.part: (each.read_bytes + each.mtp_bytes) / GIB for each in plan.parts}
    *columns, total = TABLE[dp_size, tp_size, linear_dtype]
    assert [round(gib[name], 2) for name in COLUMNS] == columns
    assert 0.02 < gib["scales"] < 0.07 if linear_dtype == "I8" else gib["scales"] == 0
    assert round(sum(gib.values()) - gib["router"] - gib["scales"], 1) == total


def write_without_data(directory: Path, config: ModelConfig, num_shards: int) -> None:
    """Sparse files: true headers over holes, 26 GiB of them."""
    headers = build_headers(config, "F8_E4M3")
    names = list(headers)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = directory / f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        entries: dict[str, object] = {}
        stop = 0
        for name in names[shard::num_shards]:
            start, stop = stop, stop + headers[name].num_bytes
            entries[name] = {
                "dtype": headers[name].dtype,
                "shape": headers[name].shape,
                "data_offsets": [start, stop],
            }
            weight_map[name] = file.name
        write_raw_shard(file, entries)
        os.truncate(file, file.stat().st_size + stop)
    write_index(directory, weight_map)


def write_published(directory: Path, *, num_hidden_layers: int) -> None:
    raw = PUBLISHED_CONFIG | {
        "num_hidden_layers": num_hidden_layers,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }
    (directory / "config.json").write_text(json.dumps(raw))
    shutil.copy(builtin_model_directory("argosy-tiny") / "tokenizer.json", directory)
    write_without_data(directory, parse_model_config(raw), num_shards=3)


def run_program(*arguments: str) -> tuple[int, str, str]:
    terminal = fake_terminal()
    exit_code = main(list(arguments), build_llm=refuse_to_load, terminal=terminal)
    return exit_code, written(terminal.stdout), written(terminal.stderr)


def refuse_to_load(config: EngineConfig) -> NoReturn:
    raise AssertionError("a plan loads nothing")


def test_the_program_prints_the_plan_of_a_checkpoint_from_its_headers(tmp_path: Path) -> None:
    write_published(tmp_path, num_hidden_layers=4)
    layout = ("--dp", "2", "--tp", "8")
    flags = ("--load-plan", "--model", str(tmp_path), *layout, "--dtype", "bfloat16", "--device", "cpu")
    exit_code, output, _ = run_program("generate", *flags)
    assert exit_code == 0
    rows = {line[2:34].strip(): line[34:].split() for line in output.splitlines()}
    assert rows["each of ranks 0-15, GiB"] == ["read", "in", "memory"]
    # FP8 is dequantised on a CPU: a byte in the file, two in memory. Index weights and the router are kept in float32.
    assert rows["experts"] == [f"{16 * 44.04e6 / 2**30:.2f}", f"{2 * 16 * 44.04e6 / 2**30:.2f}"]
    assert rows["shared experts"] == [f"{44.04e6 / 2**30:.2f}", f"{2 * 44.04e6 / 2**30:.2f}"]
    assert rows["embedding + head"] == ["0.43", "0.43"]
    attention = 4 * (28.64e6 + 171.97e6 / 8)
    assert rows["attention"] == [
        f"{(attention + 4 * 2 * 64 * 7168) / 2**30:.2f}",
        f"{(2 * attention + 4 * 4 * 64 * 7168) / 2**30:.2f}",
    ]
    assert float(rows["(MTP layer, not loaded yet)"][0]) > float(rows["experts"][0])
    assert "all ranks together read" in output


@pytest.mark.parametrize("command", ["eval", "bench", "chat", "demo", "validate"])
def test_every_command_that_loads_a_model_can_plan(command: str) -> None:
    exit_code, output, _ = run_program(command, "--load-plan", "--tp", "4")
    assert exit_code == 0
    assert "each of ranks 0-3, MiB" in output


def test_made_weights_are_planned_without_a_checkpoint(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(builtin_model_directory("argosy-tiny") / name, tmp_path)
    flags = ("generate", "--load-plan", "--model", str(tmp_path), "--dp", "4")
    exit_code, _, errors = run_program(*flags)
    assert (exit_code, "no checkpoint" in errors) == (2, True)
    exit_code, output, _ = run_program(*flags, "--load-format", "dummy", "--quantization", "w8a8")
    assert exit_code == 0
    assert "compute w8a8" in output
    assert "nothing is read" in output


def test_settings_that_an_engine_refuses_are_refused(tmp_path: Path) -> None:
    exit_code, _, errors = run_program("generate", "--load-plan", "--tp", "3")
    assert (exit_code, "must be divisible by tp_size (3)" in errors) == (2, True)
    exit_code, _, errors = run_program("generate", "--load-plan", "--quantization", "w8a8")
    assert (exit_code, "argosy quantize" in errors) == (2, True)
