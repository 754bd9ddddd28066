"""The site: the page of flags is what the program says, and every link, anchor and nav entry leads somewhere."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import yaml

from argosy.cli.main import COMMANDS, parse_arguments
from tools.write_flag_page import PAGE, render_page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FLAG = re.compile(r"--[a-z][a-z0-9-]+")


def test_the_page_of_flags_is_what_the_program_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_page(), "run: python -m tools.write_flag_page"


@pytest.mark.parametrize("command", ["serve", "generate", "bench serve", "version"])
def test_it_has_the_flags_of_help_and_no_others(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
        parse_arguments([*command.split(), "--help"])
    sections = dict(part.split("\n", 1) for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:])
    shown = sections[f"argosy {command}"]
    if COMMANDS[command].has_engine_flags:
        shown += sections["The engine"]
    if COMMANDS[command].sampling_omits is not None:
        shown += sections["Sampling"]
    spellings = {flag for row in shown.splitlines() for flag in FLAG.findall(row.split("|")[1] if "|" in row else "")}
    assert len(spellings) > 1 and spellings == left_column_flags(output.getvalue()) - {"--help"}


def left_column_flags(help_text: str) -> set[str]:
    """Of ``--help``: the flags that a line begins with."""
    columns = [line[1:].strip().split("  ")[0] for line in help_text.splitlines()]
    return {flag for column in columns if column.startswith("-") for flag in FLAG.findall(column)}


def test_nav_has_every_page_once_and_no_others() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = [page for entry in nav for page in entry.values()]
    assert sorted(pages) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    assert pages[0] == "index.md"


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda path: path.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page if not name else page.parent / name
        assert target.is_file() and target.resolve().is_relative_to(DOCS), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_broken_links_would_be_found() -> None:
    text = without_code("[a](b.md) `[c](d.md)` ![e](f.png)\n```\n[g](h.md)\n```\n[i](#j)")
    assert LINK.findall(text) == ["b.md", "#j"]
    assert slug("Who restarts what?") == "who-restarts-what"


def without_code(text: str) -> str:
    return re.sub(r"^(```.*?^```|    .*?$)|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)}


def slug(heading: str) -> str:
    """As mkdocs names a heading's anchor."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())
