"""``deploy/Dockerfile``: what it copies exists and is enough, who runs is not root, its command is the program's."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch

import pytest

from argosy.server.gate import OPEN_PATHS
from tests.helpers.deployed import DEPLOY, read_serve_command

ROOT = DEPLOY.parent
KNOWN = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "STOPSIGNAL", "USER"}
KNOWN |= {"WORKDIR"}


def read_instructions() -> list[tuple[str, str]]:
    """Name and rest; comments gone, continued lines joined."""
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#")).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def read_stages() -> list[list[tuple[str, str]]]:
    stages: list[list[tuple[str, str]]] = []
    for name, rest in read_instructions():
        if name == "FROM":
            stages.append([])
        if stages:
            stages[-1].append((name, rest))
    return stages


def copied_sources() -> list[str]:
    """From the context, not from another stage."""
    copies = [rest.split() for name, rest in read_instructions() if name == "COPY" and not rest.startswith("--from")]
    return [source for words in copies for source in words[:-1]]


def last(stage: list[tuple[str, str]], name: str) -> str:
    return [rest for each, rest in stage if each == name][-1]


def test_instructions_are_known_and_in_order() -> None:
    instructions = read_instructions()
    assert {name for name, _ in instructions} <= KNOWN
    assert [name for name, _ in instructions][:2] == ["ARG", "FROM"]
    arguments = {rest.split("=")[0] for name, rest in instructions if name == "ARG"}
    for name, rest in instructions:
        used = set(re.findall(r"\$\{(\w+)\}", rest))
        assert used <= arguments, (name, used - arguments)


def test_stages_copy_from_stages_that_exist() -> None:
    stages = [last(stage, "FROM").split(" AS ")[1] for stage in read_stages()]
    assert stages == ["build", "runtime"]
    for name, rest in read_instructions():
        if name == "COPY" and (match := re.match(r"--from=(\S+)", rest)):
            assert match[1] in stages[:-1]


def test_what_is_copied_exists_and_reaches_the_build() -> None:
    sources = copied_sources()
    assert "argosy" in sources
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = [line[1:] for line in ignored if line.startswith("!")]
    assert "*" in ignored and sorted(let_in) == sorted(sources)
    assert all((ROOT / source).exists() for source in sources)
    assert any(fnmatch("argosy/__pycache__", line) for line in ignored)


def test_what_is_copied_is_enough_for_the_package() -> None:
    """The files that setuptools would ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {project["readme"], *project["license-files"], "pyproject.toml", "constraints.txt", "argosy"}
    assert set(copied_sources()) == wanted


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_requirements_are_the_projects(device: str) -> None:
    (run,) = [rest for name, rest in read_instructions() if name == "RUN" and "tomllib" in rest]
    script = re.search(r'python -c "(.*?)"\s+> requirements.txt', run)
    assert script is not None
    code = re.sub(r"\s{2,}", " ", script[1]).replace("${DEVICE}", device)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = project["optional-dependencies"]["cuda"] if device == "cuda" else []
    assert done.stdout.splitlines() == [*project["dependencies"], *extra]


def test_it_does_not_run_as_root() -> None:
    runtime = read_stages()[-1]
    user = last(runtime, "USER")
    assert user.split(":")[0].isdecimal() and int(user.split(":")[0]) > 0
    assert any(f"useradd --uid {user.split(':')[0]}" in rest for name, rest in runtime if name == "RUN")
    names = [name for name, _ in runtime]
    assert names.index("USER") < names.index("CMD") and "RUN" not in names[names.index("USER") :]


def test_its_command_and_its_health_check_are_the_programs() -> None:
    runtime = read_stages()[-1]
    entry = json.loads(last(runtime, "ENTRYPOINT"))
    assert entry == ["tini", "--", "argosy"] and " tini " in last(runtime, "RUN") + str(runtime)
    options, config = read_serve_command(json.loads(last(runtime, "CMD")))
    assert last(runtime, "EXPOSE") == str(options.port) and not options.is_loopback
    assert config.world_size == 1
    check = shlex.split(last(runtime, "HEALTHCHECK").split("CMD", 1)[1].replace("[", "").replace("]", ""))[-1]
    url = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)'", check)
    assert url is not None and int(url[1]) == options.port and url[2] in OPEN_PATHS
