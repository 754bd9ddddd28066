"""Which grammar a request's output must match: ``structured_outputs``, ``response_format`` and ``tool_choice``.

It compiles nothing (``grammar_door.py``). Invariant: a request has one grammar or none, and it does all that the
request's fields ask, or ``ApiError`` names the field that cannot be done.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from argosy.models.deepseek.tool_grammar import write_tool_grammar
from argosy.sampling_params import StructuredOutputsParams
from argosy.server.errors import ApiError

_ANY_OBJECT: Mapping[str, object] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar, and the field that asked for it."""

    structured: StructuredOutputsParams
    param: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What the fields of a chat ask."""

    structured_outputs: Mapping[str, object] | None
    response_schema: Mapping[str, object] | None  # of response_format: what the answer must be
    tools: Sequence[Mapping[str, object]] | None  # that may be called
    must_call: bool
    function_name: str | None  # the only function that may be called
    is_parallel: bool  # several calls in one answer


def read_structured_outputs(fields: Mapping[str, object] | None) -> Constraint | None:
    """Raises ApiError for fields that do not go together."""
    if fields is None:
        return None
    try:
        return Constraint(StructuredOutputsParams(**fields), "structured_outputs")  # type: ignore[arg-type]
    except ValueError as error:
        raise ApiError(400, str(error), param="structured_outputs") from error


def choose_constraint(wishes: Wishes) -> Constraint | None:
    """Raises ApiError for what contradicts itself, or cannot be written as a grammar."""
    own, schema = read_structured_outputs(wishes.structured_outputs), wishes.response_schema
    if own is not None and schema is not None:
        raise ApiError(400, "structured_outputs and response_format both say what to answer; give one", param=own.param)
    if own is not None and wishes.tools:
        raise ApiError(
            400, 'structured_outputs leave no room for tool calls; set tool_choice to "none"', param=own.param
        )
    if wishes.must_call:
        return _constrain_calls(wishes, None, "tools")
    if schema is not None and wishes.tools:
        return _constrain_calls(wishes, schema, "response_format")
    if schema is not None:
        return _build("response_format", json=schema)
    return own


def _constrain_calls(wishes: Wishes, answer_schema: Mapping[str, object] | None, param: str) -> Constraint:
    try:
        grammar = write_tool_grammar(
            wishes.tools or (),
            name=wishes.function_name,
            is_parallel=wishes.is_parallel,
            answer_schema=answer_schema,
        )
    except ValueError as error:
        place = "tool_choice" if str(error).startswith("tool_choice") else "tools"
        raise ApiError(400, str(error), param=place) from error
    return _build(param, grammar=grammar)


def _build(param: str, **form: object) -> Constraint:
    try:
        return Constraint(StructuredOutputsParams(**form), param)  # type: ignore[arg-type]
    except ValueError as error:
        text = str(error)
        for name in form:
            text = text.replace(f"structured_outputs.{name}", param)
        raise ApiError(400, text, param=param) from error


def describe_response_format(kind: str, schema: Mapping[str, object] | None) -> Mapping[str, object] | None:
    """The schema of an answer, by the type of ``response_format``."""
    return {"text": None, "json_object": _ANY_OBJECT, "json_schema": schema}[kind]
