"""DeepSeek-V3.2's own chat format: a conversation becomes the text that the model was trained to continue.

V3.2 ships no Jinja template; this file is the template. It does not tokenize, and it does not read completions
(``encoding_parser.py`` does). Checking the caller's messages is ``encoding_messages.py``'s work.
Invariant: what the model answered, appended as an assistant message, is rendered as the very text it wrote, as long as
no new user message follows it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from argosy.models.deepseek.encoding_messages import (
    ChatTurn,
    ToolCall,
    read_messages,
    read_response_format,
    read_tools,
    to_json,
)

BOS_TOKEN = "<｜begin▁of▁sentence｜>"
EOS_TOKEN = "<｜end▁of▁sentence｜>"
USER_TOKEN = "<｜User｜>"
ASSISTANT_TOKEN = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML_TOKEN = "｜DSML｜"

CALLS_START = f"<{DSML_TOKEN}function_calls>"
CALLS_END = f"</{DSML_TOKEN}function_calls>"
INVOKE_START = f"<{DSML_TOKEN}invoke"
INVOKE_END = f"</{DSML_TOKEN}invoke>"
PARAMETER_START = f"<{DSML_TOKEN}parameter"
PARAMETER_END = f"</{DSML_TOKEN}parameter>"

# The words below are the wire format: the model was trained on exactly them, blank lines included.
TOOLS_HEAD = f"""## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "{CALLS_START}" block like the following as part of your reply to the user:
{CALLS_START}
{INVOKE_START} name="$FUNCTION_NAME">
{PARAMETER_START} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{PARAMETER_END}
...
{INVOKE_END}
{INVOKE_START} name="$FUNCTION_NAME2">
...
{INVOKE_END}
{CALLS_END}

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should \
use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types \
(numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. \
Here is an example:

{CALLS_START}
...
{CALLS_END}

<function_results>
...
</function_results>

{THINK_START}...thinking about results{THINK_END}

Here are the functions available in JSONSchema format:
<functions>
"""
TOOLS_TAIL = "\n</functions>\n"
RESPONSE_FORMAT_HEAD = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
DEVELOPER_HEAD = "# The user's message is: "


def encode_messages(
    messages: Sequence[Mapping[str, object]],
    *,
    thinking: bool = False,
    tools: Sequence[Mapping[str, object]] | None = None,
    response_format: Mapping[str, object] | None = None,
    drop_thinking: bool = True,
    add_bos: bool = True,
) -> str:
    """The prompt text of a conversation in OpenAI's message shape.

    Ends where the model is to continue if the last message is from the user, a developer or a tool; after an assistant
    message it ends with the end-of-sentence token.

    Args:
        messages: roles system, developer, user, assistant (with ``reasoning_content`` or ``reasoning``, ``tool_calls``)
            and tool; content is a string or a list of ``{"type": "text"}`` parts, which are joined by newlines. Tool
            results are put in the order of their calls. A system or developer message may carry ``tools`` and
            ``response_format``.
        thinking: let the model reason first (after the last user message and after tool results).
        tools: OpenAI's tool list; it goes to the first system message, or to an empty one put in front.
        response_format: the JSON schema the answer must follow; placed like ``tools``.
        drop_thinking: leave out reasoning that the format has no place for (before the last user message, or anywhere
            when ``thinking`` is off). False refuses such a conversation instead.
        add_bos: begin with the begin-of-sentence token.

    Raises:
        ValueError: naming the message's index, the field, what was found and what is allowed.
    """
    turns = _with_request_fields(read_messages(messages), tools, response_format)
    last_user = max((i for i, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)
    rendered = [BOS_TOKEN] if add_bos else []
    for position, turn in enumerate(turns):
        if turn.role == "assistant":
            keeps_reasoning = thinking and position > last_user
            _check_reasoning(turn, keeps_reasoning, drop_thinking)
            rendered.append(_render_assistant(turn, keeps_reasoning))
        else:
            rendered.append(_render_other(turn, THINK_START if thinking and position == last_user else THINK_END))
    return "".join(rendered)


def _with_request_fields(
    turns: list[ChatTurn],
    tools: Sequence[Mapping[str, object]] | None,
    response_format: Mapping[str, object] | None,
) -> list[ChatTurn]:
    if not tools and not response_format:
        return turns
    system = turns[0] if turns[0].role == "system" else None
    if system is not None and ((tools and system.functions) or (response_format and system.response_format)):
        raise ValueError("tools or response_format are given twice: as an argument and in messages[0]; give them once")
    target = system or ChatTurn(index=0, role="system")
    target = replace(
        target,
        functions=read_tools(tools, "tools") or target.functions,
        response_format=read_response_format(response_format, "response_format") or target.response_format,
    )
    return [target, *(turns[1:] if system else turns)]


def _check_reasoning(turn: ChatTurn, keeps_reasoning: bool, drop_thinking: bool) -> None:
    if keeps_reasoning and not (turn.reasoning_content or turn.tool_calls):
        raise ValueError(
            f"messages[{turn.index}] is an assistant message after the last user message, so in thinking mode it needs "
            "reasoning_content or tool_calls; add one, or encode with thinking=False"
        )
    if turn.reasoning_content and not keeps_reasoning and not drop_thinking:
        raise ValueError(
            f"messages[{turn.index}].reasoning_content cannot be kept (drop_thinking=False): the format has a "
            "place for reasoning only after the last user message and in thinking mode; set drop_thinking=True"
        )


def _render_other(turn: ChatTurn, opener: str) -> str:
    blocks = []
    if turn.functions:
        blocks.append(TOOLS_HEAD + "\n".join(turn.functions) + TOOLS_TAIL)
    if turn.response_format:
        blocks.append(RESPONSE_FORMAT_HEAD + turn.response_format)
    if turn.role == "system":
        return "\n\n".join([turn.content, *blocks])
    content = turn.content
    if turn.role == "developer":
        content = "".join(f"\n\n{block}" for block in [*blocks, DEVELOPER_HEAD + content])
    return f"{USER_TOKEN}{content}{ASSISTANT_TOKEN}{opener}"


def _render_assistant(turn: ChatTurn, keeps_reasoning: bool) -> str:
    reasoning = turn.reasoning_content + THINK_END if keeps_reasoning else ""
    calls = ""
    if turn.tool_calls:
        calls = "\n".join(["", "", CALLS_START, *(_render_call(call) for call in turn.tool_calls), CALLS_END])
    text = f"{reasoning}{turn.content}{calls}{EOS_TOKEN}"
    if turn.tool_results:
        results = "".join(f"\n<result>{result}</result>" for result in turn.tool_results)
        opener = THINK_START if keeps_reasoning else THINK_END
        text += f"\n\n<function_results>{results}\n</function_results>\n\n{opener}"
    return text


def _render_call(call: ToolCall) -> str:
    parameters = []
    for name, value in call.arguments.items():
        is_string = isinstance(value, str)
        text = value if isinstance(value, str) else to_json(value, f"the argument {name!r} of {call.name!r}")
        parameters.append(f'{PARAMETER_START} name="{name}" string="{str(is_string).lower()}">{text}{PARAMETER_END}')
    # A call without arguments has an empty line: that is what the published encoder writes.
    body = "\n".join(parameters)
    return f'{INVOKE_START} name="{call.name}">\n{body}\n{INVOKE_END}'
