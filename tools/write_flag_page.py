"""Writes ``docs/flags.md``: every flag of every command, from the dataclasses that the program makes its flags of.

    python -m tools.write_flag_page            # write the page
    python -m tools.write_flag_page --check    # exit code 1 if it is not what the program says

Invariant: the page has each flag once for each table it belongs to, in the order of ``--help``.
"""

import sys
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from argosy.cli.flags import METAVARS, read_field_comments
from argosy.cli.load_plan import LoadPlanOptions
from argosy.cli.main import COMMANDS, SAMPLING_DEFAULTS, Command
from argosy.cli.serve import ADMIN_KEY_VARIABLE, KEY_VARIABLE
from argosy.config import EngineConfig
from argosy.sampling_params import SamplingParams

PAGE = Path(__file__).resolve().parents[1] / "docs" / "flags.md"
FIRST_COMMAND = "serve"
INTRODUCTION = f"""# Flags

<!-- Written by `python -m tools.write_flag_page` from the settings' own source. Do not edit. -->

Every flag of every command, as `argosy COMMAND --help` has them. A list takes several values after one flag.
`argosy serve` also reads the environment variables `{KEY_VARIABLE}` (several keys are parted by commas) and
`{ADMIN_KEY_VARIABLE}`; under torchrun the other commands read torchrun's own.
"""
HEAD = "| flag | value | default | |\n| --- | --- | --- | --- |"


def render_page() -> str:
    names = sorted(COMMANDS, key=lambda name: name != FIRST_COMMAND)
    parts = [INTRODUCTION, *(_render_command(name, COMMANDS[name]) for name in names)]
    with_engine = ", ".join(name for name in names if COMMANDS[name].has_engine_flags)
    parts.append(f"## The engine\n\nOf {with_engine}.\n\n{render_table(EngineConfig)}\n")
    parts.append(f"{render_table(LoadPlanOptions)}\n")
    sampling = [name for name in names if COMMANDS[name].sampling_omits is not None]
    parts.append(
        f"## Sampling\n\nOf {', '.join(sampling)}; a request to the server brings its own.\n\n"
        f"{render_table(SamplingParams, omit=_omitted_by_all(sampling), defaults=SAMPLING_DEFAULTS)}\n"
    )
    missing = [
        f"`{name}` has no {', '.join(f'`{flag_of(each)}`' for each in sorted(omits))}"
        for name in sampling
        if (omits := (COMMANDS[name].sampling_omits or frozenset()) - _omitted_by_all(sampling))
    ]
    parts.extend(f"{line}.\n" for line in missing)
    return "\n".join(parts)


def render_table(
    options_class: type, *, omit: frozenset[str] = frozenset(), defaults: Mapping[str, object] | None = None
) -> str:
    comments, hints = read_field_comments(options_class), get_type_hints(options_class, include_extras=True)
    rows = []
    for spec in fields(options_class):
        if spec.name in omit:
            continue
        hint, default = hints[spec.name], (defaults or {}).get(spec.name, spec.default)
        cells = (_spellings(spec, hint), _describe_type(hint), _describe_default(default), comments[spec.name])
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join((HEAD, *rows))


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _render_command(name: str, command: Command) -> str:
    more = [
        "the engine's" if command.has_engine_flags else "",
        "sampling" if command.sampling_omits is not None else "",
    ]
    also = " and ".join(filter(None, more))
    title = f"## argosy {name}\n\n{(command.options_class.__doc__ or '').strip()}"
    return f"{title}{f' Also has {also} flags, below.' if also else ''}\n\n{render_table(command.options_class)}\n"


def _omitted_by_all(names: list[str]) -> frozenset[str]:
    return frozenset.intersection(*(COMMANDS[name].sampling_omits or frozenset() for name in names))


def _spellings(spec: Field[Any], hint: object) -> str:
    if tyro.conf.Positional in get_args(hint):
        return f"`{spec.name.upper()}`"
    names = [*spec.metadata.get("aliases", ()), flag_of(spec.name)]
    if hint is bool:
        names.append(f"--no-{names[-1][2:]}")
    return ", ".join(f"`{name}`" for name in names)


def _describe_type(hint: object) -> str:
    return "switch" if hint is bool else " or ".join(map(_name_type, _plain(hint)))


def _name_type(hint: object) -> str:
    if hint is bool:
        return "`True`, `False`"
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) in (tuple, list):
        return f"{_name_type(get_args(hint)[0])} ..."
    if get_origin(hint) is dict:
        return " ".join(_name_type(each) for each in get_args(hint)) + " ..."
    return METAVARS.get(hint, getattr(hint, "__name__", str(hint)))


def _plain(hint: object) -> tuple[object, ...]:
    """The types of a hint, without annotations and None."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, UnionType):
        return tuple(part for part in get_args(hint) if part is not NoneType)
    return (hint,)


def _describe_default(default: object) -> str:
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"`{' '.join(map(str, default)) if isinstance(default, tuple) else default}`"


def main() -> int:
    page = render_page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page:
        return 0
    print(f"{PAGE} is not what the program says; run: python -m tools.write_flag_page", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
