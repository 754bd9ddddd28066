"""Tool calls as V3.2 writes them, as a grammar: which functions may be called, and with which arguments.

It writes Lark for llguidance and compiles nothing. Strings are written raw, as the format wants it; a value whose
schema is more than a string's is JSON. Only declared parameters are written, in their order. Invariant: a text that
matches is one that ``encoding_parser.py`` reads, and each call's arguments obey the function's schema.
"""

import json
import re
from collections.abc import Mapping, Sequence

from argosy.models.deepseek.encoding import (
    CALLS_END,
    CALLS_START,
    DSML_TOKEN,
    INVOKE_END,
    INVOKE_START,
    PARAMETER_END,
    PARAMETER_START,
)
from argosy.models.deepseek.encoding_messages import to_json
from argosy.sampling_params import JSON_WHITESPACE

# Keywords of an object's schema that the grammar obeys, or that only describe.
_OBEYED = frozenset({"type", "properties", "required", "additionalProperties", "$defs", "definitions"})
_DESCRIBING = frozenset({"title", "description", "$schema", "$id", "$comment", "examples", "default", "strict"})
_PLAIN_STRING = frozenset({"type", "enum", "const", "minLength", "maxLength"})
_OPTIONS = {"x-guidance": {"whitespace_pattern": JSON_WHITESPACE}}
_NAME = re.compile(r'[^"\n｜]{1,256}')
_ANY_TEXT = f"(/(?s:.*)/ & ~/(?s:.*){DSML_TOKEN}(?s:.*)/)"


def write_tool_grammar(
    tools: Sequence[Mapping[str, object]],
    *,
    name: str | None = None,
    is_parallel: bool = True,
    answer_schema: Mapping[str, object] | None = None,
) -> str:
    """The grammar of one call or more.

    Args:
        tools: OpenAI's list.
        name: the only function that may be called; None = any.
        is_parallel: whether there may be several calls.
        answer_schema: a JSON schema; the output may also be a value of it, and call nothing.

    Raises:
        ValueError: no such function, or a schema that cannot be put into the format; naming the tool.
    """
    functions = [(f"tools[{i}]", _read_function(tool, f"tools[{i}]")) for i, tool in enumerate(tools)]
    if name is not None:
        functions = [each for each in functions if each[1].get("name") == name]
        if not functions:
            raise ValueError(f"tool_choice names the function {name!r}, which is not among the tools")
    calls = f"{_quote(f'{chr(10) * 2}{CALLS_START}{chr(10)}')} call{'+' if is_parallel else ''} {_quote(CALLS_END)}"
    lines = ["start: calls" if answer_schema is None else "start: calls | answer", f"calls: {calls}"]
    if answer_schema is not None:
        lines.append(f"answer: %json {to_json({**answer_schema, **_OPTIONS}, 'response_format')}")
    lines.append(f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}")
    for i, (where, function) in enumerate(functions):
        lines += _write_call(f"call_{i}", function, where)
    lines.append(f"ANY_TEXT: {_ANY_TEXT}")
    return "\n".join(lines) + "\n"


def _read_function(tool: Mapping[str, object], where: str) -> Mapping[str, object]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{where}.function must be an object with a name of 1 to 256 characters without quotes, got {name!r:.80}"
        )
    return function


def _write_call(rule: str, function: Mapping[str, object], where: str) -> list[str]:
    """Rules of one function's calls; the first is ``rule``."""
    where = f"{where}.function.parameters"
    schema = function.get("parameters") or {}
    if not isinstance(schema, Mapping):
        raise ValueError(f"{where} must be a JSON schema (an object), got {schema!r:.80}")
    unknown = sorted(set(schema) - _OBEYED - _DESCRIBING)
    if unknown or schema.get("type", "object") != "object":
        found = unknown[0] if unknown else f"type {schema['type']!r}"
        raise ValueError(f"{where} has {found}, which calls cannot be made to obey; describe an object's properties")
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        raise ValueError(f"{where} needs properties as an object and required as a list")
    missing = [each for each in required if each not in properties]
    if missing:
        raise ValueError(f"{where}.required names {missing[0]!r}, which is not among the properties")
    rules = []
    items = []
    for i, (name, value) in enumerate(properties.items()):
        if not _NAME.fullmatch(name):
            raise ValueError(f"{where}.properties has the name {name!r:.80}, which the format has no place for")
        rules += _write_parameter(f"{rule}_{i}", name, value, schema, f"{where}.properties.{name}")
        items.append(f"{rule}_{i}" if name in required else f"{rule}_{i}?")
    head = _quote(f'{INVOKE_START} name="{function["name"]}">\n')
    # A call without arguments has an empty line.
    empty = '"\\n"'
    body = " ".join(items)
    bodies = f"({body})" if required else _write_some(items, empty)
    return [f"{rule}: {head} {bodies} {_quote(INVOKE_END + chr(10))}", *rules]


def _write_some(items: list[str], empty: str) -> str:
    """Any of the optional parameters in order, or, if none, the empty line."""
    names = [item.removesuffix("?") for item in items]
    options = [" ".join([name, *(f"{later}?" for later in names[i + 1 :])]) for i, name in enumerate(names)]
    return f"({' | '.join([empty, *options])})"


def _write_parameter(rule: str, name: str, schema: object, root: Mapping[str, object], where: str) -> list[str]:
    if not isinstance(schema, Mapping) and schema is not True:
        raise ValueError(f"{where} must be a JSON schema, got {schema!r:.80}")
    raw = _write_raw_string(rule, schema, where) if isinstance(schema, Mapping) else None
    is_string = "false" if raw is None else "true"
    head = _quote(f'{PARAMETER_START} name="{name}" string="{is_string}">')
    if raw is not None:
        return [f'{rule}: {head} {raw[0]} "\\n"', *raw[1:]]
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    value = {**(schema if isinstance(schema, Mapping) else {}), **definitions, **_OPTIONS}
    return [f"{rule}: {head} %json {to_json(value, where)} {_quote(PARAMETER_END + chr(10))}"]


def _write_raw_string(rule: str, schema: Mapping[str, object], where: str) -> list[str] | None:
    """What stands for the text and its closing tag, and the rules that it needs; None if it is to be JSON."""
    if schema.get("type") != "string" or set(schema) - _PLAIN_STRING - _DESCRIBING:
        return None
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if choices is not None:
        if not isinstance(choices, list) or not choices or not all(isinstance(each, str) for each in choices):
            raise ValueError(f"{where} is a string, so its enum must hold strings, got {choices!r:.80}")
        if any(DSML_TOKEN in each for each in choices):
            raise ValueError(f"{where} has a value with {DSML_TOKEN}, which the format has no place for")
        return [f"({' | '.join(map(_quote, choices))}) {_quote(PARAMETER_END)}"]
    low, high = schema.get("minLength", 0), schema.get("maxLength")
    if "minLength" not in schema and high is None:
        return [f"{rule}_text", f"{rule}_text[lazy]: ANY_TEXT {_quote(PARAMETER_END)}"]
    if not _is_count(low) or not (high is None or _is_count(high)):
        raise ValueError(f"{where} needs minLength and maxLength as integers of at least 0")
    length = f"/(?s:.){{{low},{'' if high is None else high}}}/"
    name = f"{rule.upper()}_TEXT"
    return [f"{rule}_text", f"{rule}_text[lazy]: {name} {_quote(PARAMETER_END)}", f"{name}: {_ANY_TEXT} & {length}"]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _quote(text: str) -> str:
    """As a Lark string."""
    return json.dumps(text, ensure_ascii=False)
