"""The chat encoding is the published one, and its parser is its strict inverse."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from argosy.models.deepseek.encoding import EOS_TOKEN, TOOLS_HEAD, TOOLS_TAIL, encode_messages
from argosy.models.deepseek.encoding_parser import ParsedMessage, ParsedToolCall, parse_completion

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
WEATHER = {"type": "function", "function": {"name": "weather", "description": "天气", "parameters": {"type": "object"}}}
WEATHER_JSON = '{"name": "weather", "description": "天气", "parameters": {"type": "object"}}'

ONE_CALL = (
    "\n\n<｜DSML｜function_calls>\n"
    '<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">北京 "x"\ny</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">[1, {"a": null}]</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    "</｜DSML｜function_calls>"
)
FORMAT_HEAD = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
ONE_CALL_ARGUMENTS = {"city": '北京 "x"\ny', "days": [1, {"a": None}]}


def user(content):
    return {"role": "user", "content": content}


def calling(*arguments, names=None, ids=None, **fields):
    calls = [
        {
            "id": ids[i] if ids else f"call-{i}",
            "type": "function",
            "function": {"name": names[i] if names else "weather", "arguments": json.dumps(each)},
        }
        for i, each in enumerate(arguments)
    ]
    return {"role": "assistant", "tool_calls": calls, **fields}


def result(content, call_id=None):
    return {"role": "tool", "content": content, **({"tool_call_id": call_id} if call_id else {})}


# --- the format, written out --------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        ([user("Hi")], {}, f"{BOS}<｜User｜>Hi<｜Assistant｜></think>"),
        ([user("Hi")], {"thinking": True}, f"{BOS}<｜User｜>Hi<｜Assistant｜><think>"),
        ([user("Hi")], {"add_bos": False}, "<｜User｜>Hi<｜Assistant｜></think>"),
        (
            [
                {"role": "system", "content": "简短"},
                user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
            ],
            {},
            f"{BOS}简短<｜User｜>a\nb<｜Assistant｜></think>",
        ),
        (
            [user("1"), {"role": "assistant", "content": "one", "reasoning_content": "r1"}, user("2")],
            {"thinking": True},
            f"{BOS}<｜User｜>1<｜Assistant｜></think>one{EOS}<｜User｜>2<｜Assistant｜><think>",
        ),
        (
            [user("1"), {"role": "assistant", "content": "one", "reasoning": "r1"}],
            {"thinking": True},
            f"{BOS}<｜User｜>1<｜Assistant｜><think>r1</think>one{EOS}",
        ),
        (
            [user("1"), calling(ONE_CALL_ARGUMENTS, reasoning_content="look"), result("雨")],
            {"thinking": True},
            f"{BOS}<｜User｜>1<｜Assistant｜><think>look</think>{ONE_CALL}{EOS}"
            "\n\n<function_results>\n<result>雨</result>\n</function_results>\n\n<think>",
        ),
        (
            [user("1"), calling(ONE_CALL_ARGUMENTS, content="Wait."), result("雨"), user("2")],
            {"thinking": True},
            f"{BOS}<｜User｜>1<｜Assistant｜></think>Wait.{ONE_CALL}{EOS}"
            "\n\n<function_results>\n<result>雨</result>\n</function_results>\n\n</think><｜User｜>2<｜Assistant｜><think>",
        ),
        (
            [user("1"), {"role": "developer", "content": "2"}],
            {"thinking": True},
            f"{BOS}<｜User｜>1<｜Assistant｜></think><｜User｜>\n\n# The user's message is: 2<｜Assistant｜><think>",
        ),
        (
            [user("1"), calling({})],
            {},
            f"{BOS}<｜User｜>1<｜Assistant｜></think>\n\n<｜DSML｜function_calls>\n"
            f'<｜DSML｜invoke name="weather">\n\n</｜DSML｜invoke>\n</｜DSML｜function_calls>{EOS}',
        ),
        (
            [{"role": "developer", "content": "Do.", "tools": [WEATHER], "response_format": {"type": "object"}}],
            {},
            f"{BOS}<｜User｜>\n\n{TOOLS_HEAD}{WEATHER_JSON}{TOOLS_TAIL}\n\n{FORMAT_HEAD}"
            '{"type": "object"}\n\n# The user\'s message is: Do.<｜Assistant｜></think>',
        ),
        (
            [{"role": "system", "content": "S"}, user("1")],
            {"tools": [WEATHER, WEATHER], "response_format": {"type": "object"}},
            f"{BOS}S\n\n{TOOLS_HEAD}{WEATHER_JSON}\n{WEATHER_JSON}{TOOLS_TAIL}\n\n{FORMAT_HEAD}"
            '{"type": "object"}<｜User｜>1<｜Assistant｜></think>',
        ),
        (
            [user("1")],
            {"tools": [WEATHER]},
            f"{BOS}\n\n{TOOLS_HEAD}{WEATHER_JSON}{TOOLS_TAIL}<｜User｜>1<｜Assistant｜></think>",
        ),
    ],
)
def test_a_conversation_is_rendered_in_the_published_format(messages, options, expected):
    assert encode_messages(messages, **options) == expected


def test_the_tool_block_is_the_published_text_to_the_byte():
    digest = hashlib.sha256((TOOLS_HEAD + TOOLS_TAIL).encode()).hexdigest()
    assert digest == "8dc0ae780567338a686768374742d8690e8039d3ec6e3649ff94740764f5cca1"


def test_tool_results_are_put_in_the_order_of_their_calls():
    call = calling({"city": "A"}, {"city": "B"}, ids=["a", "b"])
    in_order = encode_messages([user("1"), call, result("for a", "a"), result("for b", "b")])
    assert encode_messages([user("1"), call, result("for b", "b"), result("for a", "a")]) == in_order
    assert "<result>for a</result>\n<result>for b</result>" in in_order
    assert encode_messages([user("1"), call, result("for a"), result("for b")]) == in_order  # by place, without ids


def test_reasoning_that_cannot_be_kept_is_refused_when_it_must_not_be_dropped():
    messages = [user("1"), {"role": "assistant", "content": "one", "reasoning_content": "r"}, user("2")]
    assert "r<" not in encode_messages(messages, thinking=True)
    with pytest.raises(ValueError, match=r"messages\[1\]\.reasoning_content cannot be kept"):
        encode_messages(messages, thinking=True, drop_thinking=False)
    with pytest.raises(ValueError, match=r"messages\[1\]\.reasoning_content cannot be kept"):
        encode_messages(messages[:2], thinking=False, drop_thinking=False)
    assert "r</think>one" in encode_messages(messages[:2], thinking=True, drop_thinking=False)


@pytest.mark.parametrize(
    ("messages", "options", "complaint"),
    [
        ([], {}, "messages must not be empty"),
        ("Hi", {}, "messages must be a list of objects"),
        ({"role": "user", "content": "Hi"}, {}, "messages must be a list of objects"),
        (["Hi"], {}, r"messages\[0\] must be an object"),
        ([user("1"), {"content": "Hi"}], {}, r"messages\[1\]\.role must be one of system, .*got None"),
        ([{"role": "bot", "content": "Hi"}], {}, r"messages\[0\]\.role must be one of .*got 'bot'"),
        ([{"role": ["user"], "content": "Hi"}], {}, r"messages\[0\]\.role must be one of"),
        ([user(None)], {}, r"messages\[0\]\.content must be a string"),
        ([{"role": "user"}], {}, r"messages\[0\]\.content must be a string"),
        ([user([{"type": "image_url"}])], {}, r"messages\[0\]\.content\[0\] must be .*reads text only"),
        ([user([{"type": "text", "text": 1}])], {}, r"messages\[0\]\.content\[0\] must be"),
        ([{"role": "developer", "content": ""}], {}, r"messages\[0\]\.content of a developer message"),
        ([{**user("1"), "tool_calls": [1]}], {}, r"messages\[0\]\.tool_calls is not allowed .* role user"),
        ([{**user("1"), "tools": [WEATHER]}], {}, r"messages\[0\]\.tools .* only of system or developer"),
        ([user("1"), {"role": "assistant", "tool_calls": ["x"]}], {}, r"messages\[1\]\.tool_calls\[0\] must be"),
        ([user("1"), {"role": "assistant", "tool_calls": "x"}], {}, r"messages\[1\]\.tool_calls must be a list"),
        ([user("1"), calling({}, names=[""])], {}, r"messages\[1\]\.tool_calls\[0\] must be"),
        ([user("1"), calling([1])], {}, r"tool_calls\[0\]\.function\.arguments must be a JSON object, got \[1\]"),
        ([user("1"), calling({"x": float("nan")})], {}, r"tool_calls\[0\]\.function\.arguments is not valid JSON"),
        ([result("x")], {}, r"messages\[0\] is a tool message, but no assistant"),
        (
            [user("1"), {"role": "assistant", "content": "a"}, result("x")],
            {},
            r"messages\[2\] is a tool message, but no",
        ),
        ([user("1"), calling({}), user("2"), result("x")], {}, r"messages\[3\] is a tool message, but no"),
        ([user("1"), calling({}), result("x"), result("y")], {}, r"messages\[3\] is tool result number 2, .*made 1"),
        ([user("1"), calling({}, {}), result("x")], {}, r"messages\[1\] made 2 tool_calls, but only 1 tool"),
        ([user("1"), calling({}, {}), result("x"), user("2")], {}, r"messages\[1\] made 2 tool_calls, but only 1"),
        ([user("1"), calling({}), result("x", "no")], {}, r"messages\[2\]\.tool_call_id 'no' must be one of"),
        (
            [user("1"), calling({}, {}), *[result("x", "call-0")] * 2],
            {},
            r"messages\[2\]\.tool_call_id .*each used once",
        ),
        ([user("1")], {"tools": [{"name": "f"}]}, r"tools\[0\] must be"),
        ([user("1")], {"tools": {"name": "f"}}, "tools must be a list"),
        (
            [user("1")],
            {"tools": [{"function": {"name": "f", "parameters": {1, 2}}}]},
            r"tools\[0\]\.function cannot be",
        ),
        ([user("1")], {"response_format": "json"}, "response_format must be a JSON schema"),
        ([{"role": "system", "tools": [WEATHER]}, user("1")], {"tools": [WEATHER]}, "given twice"),
        (
            [user("1"), {"role": "assistant", "content": "a"}],
            {"thinking": True},
            r"messages\[1\] is .*reasoning_content",
        ),
    ],
)
def test_a_bad_conversation_is_refused_with_index_and_field(messages, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        encode_messages(messages, **options)


def test_arguments_may_be_an_object_with_json_in_it():
    def encode(arguments):
        call = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}]}
        return encode_messages([user("1"), call])

    assert encode(ONE_CALL_ARGUMENTS) == encode(json.dumps(ONE_CALL_ARGUMENTS))
    for arguments in ({1: "x"}, {"x": {1, 2}}, {"x": float("inf")}):
        with pytest.raises(ValueError, match=r"messages\[1\]\.tool_calls\[0\]\.function\.arguments"):
            encode(arguments)


@pytest.mark.parametrize(
    "arguments", ['{"x": 1', "", "[" * 100_000, '{"x": ' + "9" * 5000 + "}", '{"x": 1e999}', '{"x": NaN}']
)
def test_arguments_that_are_not_json_are_refused_by_name(arguments):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    with pytest.raises(ValueError, match=r"messages\[1\]\.tool_calls\[0\]\.function\.arguments"):
        encode_messages([user("1"), call])


# --- generated conversations --------------------------------------------------

PIECES = ["hello", "你好", "😀", "\n", "\n\n", "{x}", "<", ">", '"', "</result>", " ", "é", "\\", "%s", "｜", "Stop"]
texts = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)
names = st.text("abcxyz_", min_size=1, max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=5,
)


@st.composite
def tool_rounds(draw):
    arguments = draw(st.lists(st.dictionaries(names, values, max_size=3), min_size=1, max_size=3))
    call_names = draw(st.lists(names, min_size=len(arguments), max_size=len(arguments)))
    call = calling(*arguments, names=call_names, content=draw(texts), reasoning_content=draw(texts))
    return [call, *(result(draw(texts), f"call-{i}") for i in range(len(arguments)))]


@st.composite
def conversations(draw):
    messages = draw(st.sampled_from([[], [{"role": "system", "content": "你是助手", "tools": [WEATHER]}]])).copy()
    for _ in range(draw(st.integers(1, 2))):
        messages.append({"role": draw(st.sampled_from(["user", "developer"])), "content": draw(texts) + "?"})
        for _ in range(draw(st.integers(0, 2))):
            messages += draw(tool_rounds())
        messages.append({"role": "assistant", "content": draw(texts), "reasoning_content": draw(texts) + "so"})
    return messages


def completions_of(messages, thinking):
    """(message, the text the model would have written for it) for every assistant message."""
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = encode_messages(messages[:index], thinking=thinking)
            whole = encode_messages(messages[: index + 1], thinking=thinking)
            assert whole.startswith(prompt)
            yield message, whole[len(prompt) :]


@settings(max_examples=250, deadline=None)
@given(conversations(), st.booleans())
def test_every_assistant_turn_parses_back_to_what_was_said(messages, thinking):
    for message, completion in completions_of(messages, thinking):
        parsed = parse_completion(completion, thinking=thinking)
        assert parsed.content == message["content"]
        assert parsed.reasoning_content == (message["reasoning_content"] if thinking else "")
        said = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", ())]
        assert [(call.name, json.loads(call.arguments)) for call in parsed.tool_calls] == said


@settings(max_examples=100, deadline=None)
@given(conversations(), st.booleans())
def test_a_parsed_turn_appended_as_a_message_renders_as_the_same_text(messages, thinking):
    for index, (_, completion) in enumerate(list(completions_of(messages, thinking))):
        position = [i for i, message in enumerate(messages) if message["role"] == "assistant"][index]
        parsed = parse_completion(completion, thinking=thinking)
        history = messages[:position]
        again = encode_messages([*history, parsed.as_message()], thinking=thinking)
        assert again == encode_messages(history, thinking=thinking) + completion


# --- the parser is strict -----------------------------------------------------


def test_reasoning_content_and_calls_are_told_apart():
    parsed = parse_completion(f"想一想</think>好的。{ONE_CALL}{EOS}", thinking=True)
    arguments = json.dumps(ONE_CALL_ARGUMENTS, ensure_ascii=False)
    assert parsed == ParsedMessage("好的。", "想一想", (ParsedToolCall("weather", arguments),))
    assert parse_completion("四" + EOS_TOKEN, thinking=False) == ParsedMessage("四")


@settings(max_examples=60, deadline=None)
@given(conversations(), st.booleans(), st.data())
def test_a_completion_cut_off_anywhere_is_refused(messages, thinking, data):
    for message, completion in completions_of(messages, thinking):
        whole = completion.removesuffix(EOS) if message.get("tool_calls") else completion
        cut = data.draw(st.integers(0, len(whole) - 1))
        with pytest.raises(ValueError, match="malformed at character|must not hold"):
            parse_completion(whole[:cut], thinking=thinking)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (EOS, ""),
        (EOS, EOS + "more"),
        ("fine", "<think>fine"),
        ("fine", "</think>fine"),
        ("fine", f"fine{BOS}"),
        ("fine", "fine ｜DSML｜"),
        ("\n\n<｜DSML｜function_calls>", "\n<｜DSML｜function_calls>"),
        ("function_calls>\n<", "function_calls><"),
        ('invoke name="weather"', "invoke"),
        ('invoke name="weather"', 'invoke name=""'),
        ('invoke name="weather">\n', 'invoke name="weather">'),
        ('invoke name="weather">\n', 'invoke name="weather">\n</｜DSML｜invoke ｜DSML｜>\n'),
        (' string="true"', ""),
        (' string="true"', ' string="yes"'),
        ('name="days"', 'name="city"'),
        ("[1, {", "[1, {{"),
        ("[1, {", "[NaN, {"),
        ("y</｜DSML｜parameter>", "y"),
        ("</｜DSML｜parameter>\n</｜DSML｜invoke>", "</｜DSML｜parameter></｜DSML｜invoke>"),
        ("</｜DSML｜invoke>\n", "</｜DSML｜invoke>"),
        ("</｜DSML｜invoke>\n", ""),
        ("</｜DSML｜function_calls>", "</｜DSML｜function_calls>!"),
    ],
)
def test_a_malformed_completion_is_refused(before, after):
    good = f"fine{ONE_CALL}{EOS}" if before != EOS else f"fine{EOS}"
    parse_completion(good, thinking=False)
    assert before in good
    with pytest.raises(ValueError, match="the completion|the parameter"):
        parse_completion(good.replace(before, after, 1), thinking=False)


def test_a_call_that_is_not_closed_does_not_swallow_the_next():
    head = '<｜DSML｜invoke name="f">\n\n'
    text = f"\n\n<｜DSML｜function_calls>\n{head}</｜DSML｜invoke>\n{head}</｜DSML｜invoke>\n</｜DSML｜function_calls>"
    assert [call.name for call in parse_completion(text, thinking=False).tool_calls] == ["f", "f"]
    with pytest.raises(ValueError, match="the completion is malformed"):
        parse_completion(text.replace("</｜DSML｜invoke>\n", "", 1), thinking=False)


@pytest.mark.parametrize(
    "text", [f"no end{EOS}", f"no end{ONE_CALL}{EOS}", f"<think>twice</think>x{EOS}", f"a</think>b</think>{EOS}"]
)
def test_reasoning_must_end_once(text):
    complaint = "expected the reasoning to end with </think>" if "no end" in text else "must not hold"
    with pytest.raises(ValueError, match=complaint):
        parse_completion(text, thinking=True)


MARKUP = [
    *PIECES,
    EOS,
    "</think>",
    ONE_CALL,
    *ONE_CALL.splitlines(keepends=True),
    "</｜DSML｜parameter>\n",
    "</｜DSML｜invoke>",
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(MARKUP), max_size=14).map("".join), st.booleans())
def test_whatever_a_model_writes_is_parsed_or_refused_with_a_value_error(text, thinking):
    try:
        parsed = parse_completion(text, thinking=thinking)
    except ValueError:
        return
    for call in parsed.tool_calls:
        assert isinstance(json.loads(call.arguments), dict)
