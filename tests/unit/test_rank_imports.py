"""What is imported before ranks are forked depends on what the machine has."""

from pathlib import Path

import pytest

from argosy.engine.rank_imports import modules_of_ranks

LOOPS = "argosy.kernels.loops"


@pytest.mark.parametrize("device_file", ["nvidia0", "davinci3"])
def test_a_machine_with_an_accelerator_needs_no_loops(tmp_path: Path, device_file: str) -> None:
    assert LOOPS in modules_of_ranks(tmp_path)
    (tmp_path / device_file).touch()
    assert LOOPS not in modules_of_ranks(tmp_path)


def test_a_driver_without_a_card_is_no_accelerator(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    assert LOOPS in modules_of_ranks(tmp_path)
