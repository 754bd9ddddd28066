"""Command-line flags from config dataclasses: the fields are the flags, their comments are the help.

The only place that knows tyro's types. It does not validate values: the real dataclass does, when ``build_config``
makes it from the parsed flags, so a bad value is the same ``ValueError`` on the command line and in Python. A field's
metadata may add short spellings: ``field(default=1, metadata={"aliases": ("--tp",)})``. Invariant: every field of a
config becomes exactly one flag, or is named in ``omit``.
"""

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass, make_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

ConfigT = TypeVar("ConfigT")

# What a value of a plain type is called in the help. Everything else keeps tyro's own name.
METAVARS: dict[object, str] = {str: "STR", int: "INT", float: "FLOAT"}


def build_flag_class(
    config_class: type, *, omit: frozenset[str] = frozenset(), defaults: Mapping[str, object] | None = None
) -> type:
    """A dataclass for tyro with the fields of ``config_class``, minus ``omit``, with other ``defaults`` where given.

    It has no ``__post_init__``: values reach ``build_config`` as they were typed.
    """
    comments = read_field_comments(config_class)
    hints = get_type_hints(config_class, include_extras=True)
    new_defaults = dict(defaults or {})
    flag_fields = []
    for spec in fields(config_class):
        if spec.name in omit:
            continue
        default = new_defaults.pop(spec.name, None) if spec.name in new_defaults else _default_of(spec)
        hint = hints[spec.name]
        argument = _argument(spec, hint, comments[spec.name])
        annotation = Annotated[hint, argument]  # type: ignore[valid-type]
        flag_fields.append((spec.name, annotation, field(default=default)))
    assert not new_defaults, f"{config_class.__name__} has no field {sorted(new_defaults)}"
    return make_dataclass(f"{config_class.__name__}Flags", flag_fields, frozen=True, kw_only=True)


def build_config(config_class: type[ConfigT], flags: object, *, omit: frozenset[str] = frozenset()) -> ConfigT:
    """The real, validated dataclass from parsed flags; omitted fields keep their defaults.

    Raises:
        ValueError: from the dataclass's own checks.
    """
    names = [spec.name for spec in fields(config_class) if spec.name not in omit]  # type: ignore[arg-type]
    return config_class(**{name: getattr(flags, name) for name in names})


def read_field_comments(config_class: type) -> dict[str, str]:
    """The trailing comment of every annotated field, inherited ones too, by field name; without one, the name in
    words."""
    comments: dict[str, str] = {}
    for owner in reversed(config_class.__mro__):
        if is_dataclass(owner):
            comments |= _read_own_comments(owner)
    return comments


def _read_own_comments(config_class: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(config_class))
    comment_by_line = {
        token.start[0]: token.string.lstrip("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    class_node = ast.parse(source).body[0]
    assert isinstance(class_node, ast.ClassDef)
    comments = {}
    for node in class_node.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            # A default in brackets spans lines. A name that says it all (ignore_eos) may go without a comment.
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found = [comment_by_line[line] for line in lines if line in comment_by_line]
            comments[name] = found[-1] if found else name.replace("_", " ")
    return comments


def _default_of(spec: Field[Any]) -> object:
    assert spec.default is not MISSING, f"{spec.name} needs a default to be a flag"
    return spec.default


def _argument(spec: Field[Any], hint: object, help_text: str) -> object:
    """Tyro's argument settings; an optional plain type is shown as that type instead of ``{None}|INT``."""
    if tyro.conf.Positional in get_args(hint):
        return tyro.conf.arg(help=help_text, metavar=f"[{spec.name.upper()}]")
    metavar = None
    inner = [part for part in get_args(_unannotated(hint)) if part is not NoneType]
    is_optional = get_origin(_unannotated(hint)) in (Union, UnionType)
    if is_optional and len(inner) == 1 and get_origin(inner[0]) is not Literal:
        metavar = METAVARS.get(inner[0])
    return tyro.conf.arg(help=help_text, metavar=metavar, aliases=spec.metadata.get("aliases"))


def _unannotated(hint: object) -> object:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint
