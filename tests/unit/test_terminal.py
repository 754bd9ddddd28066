"""Bars of the start are drawn on a terminal, and nothing is on a pipe."""

import io

from argosy.cli.terminal import Terminal, show_stages


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def show_start(stderr: io.StringIO) -> str:
    with show_stages(Terminal(stdin=io.StringIO(), stdout=io.StringIO(), stderr=stderr)) as show:
        show("loading weights", 0, 3)
        show("loading weights", 3, 3)
        show("recording device graphs", 1, 2)
    return stderr.getvalue()


def test_stages_have_a_bar_each() -> None:
    drawn = show_start(Screen())
    assert "loading weights" in drawn and "3/3" in drawn
    assert "recording device graphs" in drawn and "1/2" in drawn


def test_a_pipe_gets_nothing() -> None:
    assert show_start(io.StringIO()) == ""
