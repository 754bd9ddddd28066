"""Every ``argosy`` command in the README, the docs and the examples parses, and makes valid settings."""

import re
import shlex
from pathlib import Path

import pytest

from argosy.cli.flags import build_config
from argosy.cli.main import COMMANDS, parse_arguments
from argosy.config import EngineConfig

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md")))
# Commands that a guide shows before the engine takes them. The test fails when that changes, and the guide must, too.
FUTURE_FLAGS = ("--device npu",)


def read_commands(text: str) -> list[str]:
    """The ``argosy`` commands in code blocks, also those behind torchrun's ``-m``; continued lines are joined."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        line.partition("-m argosy")[2] if " -m argosy " in line else line.removeprefix("argosy")
        for line in lines
        if line.startswith("argosy ") or " -m argosy " in line
    ]


COMMAND_LINES = [
    pytest.param(command, id=f"{path.name}:{command.strip()[:60]}")
    for path in DOCUMENTS
    for command in read_commands(path.read_text(encoding="utf-8"))
]


def test_commands_are_found_in_code_blocks() -> None:
    text = "argosy no\n```\nargosy a \\\n    --b 1  # c\nother\n```\n```sh\ntorchrun --n 2 -m argosy d\n```\n"
    assert [shlex.split(line, comments=True) for line in read_commands(text)] == [["a", "--b", "1"], ["d"]]
    assert len(COMMAND_LINES) > 10


@pytest.mark.parametrize("command", COMMAND_LINES)
def test_documented_command_is_accepted(command: str) -> None:
    arguments = shlex.split(command, comments=True)
    if any(flag in command for flag in FUTURE_FLAGS):
        with pytest.raises(SystemExit) as exit_info:
            parse_arguments(arguments)
        assert exit_info.value.code == 2, "this is accepted now: update the guide and FUTURE_FLAGS"
        return
    name, parsed = parse_arguments(arguments)
    build_config(COMMANDS[name].options_class, getattr(parsed, name.replace(" ", "_")))
    if COMMANDS[name].has_engine_flags:
        build_config(EngineConfig, parsed.engine)
