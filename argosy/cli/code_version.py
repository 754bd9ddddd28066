"""Which code a measurement ran on. Reads the installation, changes nothing.

Invariant: always a text, never an error: a measurement is not lost because git is absent.
"""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE_DIRECTORY = Path(__file__).resolve().parent.parent
GIT_TIMEOUT_S = 5.0


def read_commit(directory: Path = PACKAGE_DIRECTORY) -> str:
    """The short commit, with ``-dirty`` if tracked files differ from it; the package version outside a git checkout."""
    commit = _run_git(directory, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return f"version {read_version()}"
    return f"{commit}-dirty" if _run_git(directory, "status", "--porcelain", "--untracked-files=no") else commit


def read_version() -> str:
    try:
        return version("argosy")
    except PackageNotFoundError:
        return "unknown (not installed)"


def _run_git(directory: Path, *arguments: str) -> str | None:
    """Standard output, or None if there is no git or no repository."""
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
