"""The three streams of a command, its progress bar and its Ctrl-C.

Streams are arguments so that a command can be tested without a process. Invariant: progress and speeds go to stderr,
results to stdout, so that a pipe carries results only.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Terminal:
    """Where a command reads and writes. ``stdin`` has a ``buffer``: JSON lines are read as bytes."""

    stdin: TextIO
    stdout: TextIO
    stderr: TextIO

    def say(self, text: str) -> None:
        """One line on stderr."""
        print(text, file=self.stderr, flush=True)

    def warn(self, text: str) -> None:
        self.say(f"argosy: {text}")

    def table_console(self) -> Console:
        """A rich console on stdout: as wide as the terminal, 120 columns in a pipe."""
        return Console(file=self.stdout, width=None if self.stdout.isatty() else 120, highlight=False)


class ProgressCounter(Protocol):
    def advance(self) -> None: ...


class NullProgress:
    """Stderr is not a terminal: nothing to draw."""

    def advance(self) -> None:
        return


class BarProgress:
    def __init__(self, progress: Progress, description: str, total: int) -> None:
        self._progress = progress
        self._task_id = progress.add_task(description, total=total)

    def advance(self) -> None:
        self._progress.advance(self._task_id)


@contextmanager
def show_progress(terminal: Terminal, description: str, total: int) -> Iterator[ProgressCounter]:
    """A bar on stderr while the block runs, if stderr is a terminal and there is more than one thing to count."""
    if not terminal.stderr.isatty() or total < 2:
        yield NullProgress()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=terminal.stderr), transient=True) as progress:
        yield BarProgress(progress, description, total)


@contextmanager
def show_stages(terminal: Terminal) -> Iterator[Callable[[str, int, int], None]]:
    """Yields ``show(stage, done, total)``, which draws a bar for each stage on stderr, if stderr is a terminal."""
    if not terminal.stderr.isatty():
        yield lambda stage, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(file=terminal.stderr), transient=True) as progress:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        yield show


class ByteProgress(Protocol):
    def show(self, num_bytes: int, total_bytes: int) -> None: ...


class NullByteProgress:
    """Stderr is not a terminal: nothing to draw."""

    def show(self, num_bytes: int, total_bytes: int) -> None:
        return


class BarByteProgress:
    def __init__(self, progress: Progress, description: str) -> None:
        self._progress = progress
        self._task_id = progress.add_task(description, total=None)

    def show(self, num_bytes: int, total_bytes: int) -> None:
        self._progress.update(self._task_id, completed=num_bytes, total=total_bytes)


@contextmanager
def show_byte_progress(terminal: Terminal, description: str) -> Iterator[ByteProgress]:
    """A bar with bytes per second and the time left, on stderr while the block runs, if stderr is a terminal."""
    if not terminal.stderr.isatty():
        yield NullByteProgress()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=terminal.stderr), transient=True) as progress:
        yield BarByteProgress(progress, description)


class InterruptWatch:
    """Turns the first Ctrl-C into a flag that a loop reads between engine steps; a second one is a KeyboardInterrupt.

    A step is never cut in half, so the engine stays usable and what was finished is kept.
    """

    def __init__(self) -> None:
        self.is_set = False

    def on_signal(self, signal_number: int, frame: FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True


@contextmanager
def watch_interrupt() -> Iterator[InterruptWatch]:
    """While the block runs, Ctrl-C sets the yielded flag; never outside the main thread, which gets no signals."""
    watch = InterruptWatch()
    if threading.current_thread() is not threading.main_thread():
        yield watch
        return
    previous = signal.signal(signal.SIGINT, watch.on_signal)
    try:
        yield watch
    finally:
        signal.signal(signal.SIGINT, previous)


def system_terminal() -> Terminal:
    """This process's streams; one that the parent closed (``>&-``) reads as empty and swallows what is written."""
    return Terminal(
        stdin=sys.stdin or open(os.devnull, encoding="utf-8"),
        stdout=sys.stdout or open(os.devnull, "w", encoding="utf-8"),
        stderr=sys.stderr or open(os.devnull, "w", encoding="utf-8"),
    )
