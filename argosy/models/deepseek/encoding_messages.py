"""Reads chat messages in OpenAI's shape into checked, typed turns; every complaint about a message is made here.

It knows which fields each role may have and how tool results belong to calls, not how anything is rendered
(``encoding.py``). Invariant: a turn that exists is valid, and an assistant turn carries its tool results in call order.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLES_WITH_FIELD = {
    "tools": ("system", "developer"),
    "response_format": ("system", "developer"),
    "tool_calls": ("assistant",),
    "reasoning_content": ("assistant",),
    "reasoning": ("assistant",),
    "tool_call_id": ("tool",),
}
_MAX_SHOWN_CHARS = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """One call that an assistant made."""

    call_id: str | None
    name: str
    arguments: dict[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTurn:
    """One message; the tool messages that answer an assistant message are folded into it."""

    index: int  # in the caller's list, for error messages
    role: str
    content: str = ""
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_results: tuple[str, ...] = ()  # parallel to tool_calls, or empty: not answered
    functions: tuple[str, ...] = ()  # JSON of each tool's function
    response_format: str = ""  # JSON schema


@dataclass(frozen=True, kw_only=True, slots=True)
class _ToolResult:
    index: int
    call_id: str | None
    content: str


def read_messages(messages: Sequence[Mapping[str, object]]) -> list[ChatTurn]:
    """The conversation as turns.

    Raises:
        ValueError: naming the message's index and field.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a list of objects with role and content, got {_shown(messages)}")
    if not messages:
        raise ValueError("messages must not be empty; give at least one user message")
    turns: list[ChatTurn] = []
    results: list[_ToolResult] = []
    for index, message in enumerate(messages):
        role = _read_role(index, message)
        if role == "tool":
            _check_answers_a_call(index, turns, len(results))
            results.append(_read_tool_result(index, message))
            continue
        _fold_results(turns, results)
        results = []
        turns.append(_read_turn(index, role, message))
    _fold_results(turns, results)
    return turns


def read_tools(tools: object, where: str) -> tuple[str, ...]:
    """The JSON of each tool's function, from OpenAI's ``[{"type": "function", "function": {...}}]``; () for None."""
    if tools is None:
        return ()
    if not isinstance(tools, (list, tuple)):
        raise ValueError(f"{where} must be a list of tools, got {_shown(tools)}")
    functions = []
    for position, tool in enumerate(tools):
        name = f"{where}[{position}]"
        function = _read_function(tool, name)
        functions.append(to_json(function, f"{name}.function"))
    return tuple(functions)


def read_response_format(schema: object, where: str) -> str:
    """The JSON of a schema; "" for none."""
    if not schema:
        return ""
    if not isinstance(schema, Mapping):
        raise ValueError(f"{where} must be a JSON schema (an object), got {_shown(schema)}")
    return to_json(schema, where)


def to_json(value: object, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be written as JSON: {error}") from error


def load_json(text: str, where: str) -> object:
    """Parses strict JSON: NaN and Infinity, which Python would accept, are refused."""
    try:
        value: object = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({error}): {_shown(text)}") from error
    return value


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."


def _read_role(index: int, message: object) -> str:
    if not isinstance(message, Mapping):
        raise ValueError(f"messages[{index}] must be an object with role and content, got {_shown(message)}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"messages[{index}].role must be one of {', '.join(ROLES)}, got {_shown(role)}")
    for field, roles in _ROLES_WITH_FIELD.items():
        if message.get(field) and role not in roles:
            raise ValueError(
                f"messages[{index}].{field} is not allowed in a message of role {role}, only of "
                f"{' or '.join(roles)}; remove it"
            )
    return role


def _read_turn(index: int, role: str, message: Mapping[str, object]) -> ChatTurn:
    where = f"messages[{index}]"
    content = message.get("content")
    if content is None and role in ("system", "assistant"):
        content = ""
    text = _read_text(content, f"{where}.content")
    if role == "developer" and not text:
        raise ValueError(f"{where}.content of a developer message must not be empty")
    return ChatTurn(
        index=index,
        role=role,
        content=text,
        reasoning_content=_read_text(
            message.get("reasoning_content") or message.get("reasoning") or "", f"{where}.reasoning_content"
        ),
        tool_calls=_read_tool_calls(message.get("tool_calls"), f"{where}.tool_calls"),
        functions=read_tools(message.get("tools"), f"{where}.tools"),
        response_format=read_response_format(message.get("response_format"), f"{where}.response_format"),
    )


def _read_text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise ValueError(f'{where} must be a string or a list of {{"type": "text"}} parts, got {_shown(content)}')
    texts = []
    for position, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise ValueError(
                f'{where}[{position}] must be {{"type": "text", "text": a string}}; this model reads text only, '
                f"got {_shown(part)}"
            )
        texts.append(text)
    return "\n".join(texts)


def _read_tool_calls(tool_calls: object, where: str) -> tuple[ToolCall, ...]:
    if tool_calls is None:
        return ()
    if not isinstance(tool_calls, (list, tuple)):
        raise ValueError(f"{where} must be a list of calls, got {_shown(tool_calls)}")
    calls = []
    for position, call in enumerate(tool_calls):
        name = f"{where}[{position}]"
        function = _read_function(call, name)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = load_json(arguments, f"{name}.function.arguments")
        if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
            raise ValueError(f"{name}.function.arguments must be a JSON object, got {_shown(arguments)}")
        to_json(arguments, f"{name}.function.arguments")  # an object given in Python may hold anything
        calls.append(
            ToolCall(
                call_id=_read_call_id(call.get("id"), f"{name}.id"), name=str(function["name"]), arguments=arguments
            )
        )
    return tuple(calls)


def _read_function(entry: object, where: str) -> Mapping[str, object]:
    function = entry.get("function") if isinstance(entry, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise ValueError(f'{where} must be {{"type": "function", "function": {{"name": ...}}}}, got {_shown(entry)}')
    return function


def _read_call_id(call_id: object, where: str) -> str | None:
    if call_id is not None and not isinstance(call_id, str):
        raise ValueError(f"{where} must be a string, got {_shown(call_id)}")
    return call_id


def _read_tool_result(index: int, message: Mapping[str, object]) -> _ToolResult:
    return _ToolResult(
        index=index,
        call_id=_read_call_id(message.get("tool_call_id"), f"messages[{index}].tool_call_id"),
        content=_read_text(message.get("content"), f"messages[{index}].content"),
    )


def _check_answers_a_call(index: int, turns: list[ChatTurn], num_results: int) -> None:
    num_calls = len(turns[-1].tool_calls) if turns else 0
    if num_calls == 0:
        raise ValueError(
            f"messages[{index}] is a tool message, but no assistant message with tool_calls comes right before it"
        )
    if num_results == num_calls:
        raise ValueError(
            f"messages[{index}] is tool result number {num_results + 1}, but messages[{turns[-1].index}] "
            f"made {num_calls} tool_calls; give one tool message per call"
        )


def _fold_results(turns: list[ChatTurn], results: list[_ToolResult]) -> None:
    """Moves the results into the assistant turn that they answer, in the order of its calls."""
    if not results:
        return
    calls = turns[-1].tool_calls
    if len(results) < len(calls):
        raise ValueError(
            f"messages[{turns[-1].index}] made {len(calls)} tool_calls, but only {len(results)} tool messages follow; "
            "give one tool message per call"
        )
    call_ids = [call.call_id for call in calls]
    if all(result.call_id is None for result in results) or all(call_id is None for call_id in call_ids):
        ordered = results
    else:
        ordered = _order_results(results, call_ids, turns[-1].index)
    turns[-1] = replace(turns[-1], tool_results=tuple(result.content for result in ordered))


def _order_results(results: list[_ToolResult], call_ids: list[str | None], assistant_index: int) -> list[_ToolResult]:
    # The format has no ids: a result belongs to a call by its place alone, so a swapped pair would mislead the model.
    by_call_id = {result.call_id: result for result in results}
    for result in results:
        if result.call_id not in call_ids or by_call_id[result.call_id] is not result:
            raise ValueError(
                f"messages[{result.index}].tool_call_id {_shown(result.call_id)} must be one of the ids of "
                f"messages[{assistant_index}].tool_calls ({_shown(call_ids)}), each used once"
            )
    return [by_call_id[call_id] for call_id in call_ids]
