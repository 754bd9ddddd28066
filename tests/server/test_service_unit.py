"""``deploy/argosy.service`` and its environment file: understood by systemd, and true of the program."""

import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from argosy.cli.invocation import EXIT_USER_ERROR
from argosy.cli.serve import ADMIN_KEY_VARIABLE, KEY_VARIABLE, read_settings
from tests.helpers.deployed import DEPLOY, least_grace_s, read_serve_command

UNIT = DEPLOY / "argosy.service"
ENVIRONMENT = DEPLOY / "argosy.env"
FLAGS = "ARGOSY_FLAGS"  # the unit's own variable: systemd puts its words into the command line
SECTIONS = {
    "Unit": "Description Wants After StartLimitIntervalSec StartLimitBurst",
    "Service": """Type EnvironmentFile ExecStart Restart RestartSec RestartPreventExitStatus KillMode TimeoutStopSec
        TimeoutStartSec DynamicUser CacheDirectory Environment LimitNOFILE LimitMEMLOCK LimitCORE NoNewPrivileges
        CapabilityBoundingSet AmbientCapabilities ProtectSystem ProtectHome PrivateTmp ProtectClock
        ProtectControlGroups ProtectHostname ProtectKernelLogs ProtectKernelModules ProtectKernelTunables ProtectProc
        LockPersonality RemoveIPC RestrictNamespaces RestrictRealtime RestrictSUIDSGID RestrictAddressFamilies
        SystemCallArchitectures SystemCallFilter SystemCallErrorNumber UMask""",
    "Install": "WantedBy",
}

Unit = dict[str, dict[str, str]]


def read_unit() -> Unit:
    sections: Unit = defaultdict(dict)
    name = ""
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"\[(\w+)\]", line):
            name = match[1]
        elif line and not line.startswith("#"):
            key, equals, value = line.partition("=")
            assert equals and key not in sections[name], line
            sections[name][key] = value
    return sections


def read_environment(*, is_node_0: bool) -> dict[str, str]:
    """The file's variables; the commented line of two nodes instead of the other where it is wanted."""
    lines = ENVIRONMENT.read_text(encoding="utf-8").splitlines()
    if is_node_0:
        lines = [line.removeprefix("# ") if line.startswith(f"# {FLAGS}=") else line for line in lines]
    settings = [shlex.split(line) for line in lines if line and not line.startswith("#")]
    assert all(len(words) == 1 for words in settings)
    return dict(words[0].split("=", 1) for words in settings)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "argosy.service"
    program = read_unit()["Service"]["ExecStart"].split()[0]
    unit.write_text(UNIT.read_text(encoding="utf-8").replace(program, sys.executable), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_has_only_settings_that_are_known() -> None:
    unit = read_unit()
    assert set(unit) == set(SECTIONS)
    for section, names in SECTIONS.items():
        assert set(unit[section]) <= set(names.split()), section


@pytest.mark.parametrize("is_node_0", [False, True])
def test_its_command_is_the_programs(is_node_0: bool) -> None:
    service = read_unit()["Service"]
    environment = read_environment(is_node_0=is_node_0)
    program, *arguments = service["ExecStart"].split()
    assert Path(program).name == "argosy" and arguments[-1] == f"${FLAGS}"
    options, config = read_serve_command([*arguments[:-1], *shlex.split(environment.pop(FLAGS))])
    assert config.nnodes == 1 + is_node_0 and config.world_size == 8 * config.nnodes
    assert int(service["TimeoutStopSec"]) > least_grace_s(options)
    assert set(environment) == {KEY_VARIABLE, ADMIN_KEY_VARIABLE}
    settings = read_settings(options, environment)
    assert len(settings.api_key) == 2 and settings.admin_api_key not in (None, *settings.api_key)


def test_what_cannot_work_is_not_started_again_and_a_signal_reaches_the_server_alone() -> None:
    service = read_unit()["Service"]
    assert service["Restart"] == "always" and service["RestartPreventExitStatus"] == str(EXIT_USER_ERROR)
    assert service["KillMode"] == "mixed"
    assert service["DynamicUser"] == "yes" and service["NoNewPrivileges"] == "yes"
    assert service["ProtectSystem"] == "strict" and service["CapabilityBoundingSet"] == ""
