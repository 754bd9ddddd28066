"""What two nodes must have in common is told apart from what is a machine's own business."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from argosy.assets import builtin_model_directory
from argosy.config import EngineConfig
from argosy.engine.fingerprints import build_fingerprints

DIRECTORY = builtin_model_directory("argosy-tiny")
CONFIG = EngineConfig(tp_size=2, nnodes=2, master_addr="10.0.0.1", master_port=2000)


def _differences(config: EngineConfig, directory: Path, device_type: str = "cpu") -> set[str]:
    ours, theirs = build_fingerprints(CONFIG, DIRECTORY, "cpu"), build_fingerprints(config, directory, device_type)
    assert ours.keys() == theirs.keys()
    return {name for name in ours if ours[name] != theirs[name]}


@pytest.mark.parametrize(
    "changes",
    [
        {"node_rank": 1},
        {"num_threads": 3},
        {"flight_recorder_dir": "/elsewhere"},
        {"master_addr": "node0"},
        {"model": "x"},
    ],
)
def test_what_belongs_to_a_machine_may_differ(changes: dict[str, object]) -> None:
    assert _differences(dataclasses.replace(CONFIG, **changes), DIRECTORY) == set()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"seed": 1}, "--seed"), ({"ep_mode": "all_gather"}, "--ep-mode"), ({"max_num_seqs": 3}, "--max-num-seqs")],
)
def test_a_different_setting_is_named_by_its_flag(changes: dict[str, object], name: str) -> None:
    assert _differences(dataclasses.replace(CONFIG, **changes), DIRECTORY) == {name}  # type: ignore[arg-type]


def test_a_different_device_is_named() -> None:
    assert _differences(CONFIG, DIRECTORY, "cuda") == {"device"}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("config.json", "config.json"),
        ("tokenizer.json", "tokenizer.json"),
        ("model-00002-of-00003.safetensors", "weight files"),
    ],
)
def test_different_contents_at_equal_sizes_are_named(tmp_path: Path, file: str, name: str) -> None:
    copy = tmp_path / "model"
    shutil.copytree(DIRECTORY, copy)
    assert _differences(CONFIG, copy) == set()
    data = bytearray((copy / file).read_bytes())
    data[-1] ^= 1
    (copy / file).write_bytes(data)
    assert _differences(CONFIG, copy) == {name}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"config\.json.*--model"):
        build_fingerprints(CONFIG, tmp_path, "cpu")


def test_files_of_weights_do_not_matter_where_none_are_loaded(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(DIRECTORY / name, tmp_path / name)
    config = dataclasses.replace(CONFIG, load_format="dummy")
    assert build_fingerprints(config, tmp_path, "cpu") == build_fingerprints(config, DIRECTORY, "cpu")
    assert _differences(config, tmp_path) == {"--load-format", "weight files"}
