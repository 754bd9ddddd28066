"""Nonsense by the field that is wrong: a table of bodies, each with the field that its refusal must name.

``None`` as the field: the fault is in no one field. Every entry is a body that differs from a good one in one thing.
"""

import json
from collections.abc import Iterator

NO_INTEGERS: tuple[object, ...] = (None, True, "1", 1.5, [], {}, [1], {"a": 1}, "NaN")
NO_NUMBERS: tuple[object, ...] = (None, True, "0.5", [], {}, [0.5], "Infinity")
NO_FLAGS: tuple[object, ...] = (None, 0, 1, "true", [], {}, "yes")
HUGE = (10**30, -(10**30), 2**63, 10**400)
DEEP = 5000

GOOD: dict[str, dict[str, object]] = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/generate": {"prompt_token_ids": [5]},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASSISTANT = {"role": "assistant", "tool_calls": [CALL]}
USER = {"role": "user", "content": "a"}


def sampling_values() -> dict[str, list[object]]:
    """What no route that generates takes, by field."""
    values: dict[str, list[object]] = {}
    integers = {"top_k": (-2, 2**31), "n": (0, -1, 129, 2**31), "min_tokens": (-1, 2**31), "priority": (10**9 + 1,)}
    for name, beyond in integers.items():
        values[name] = [*NO_INTEGERS, *beyond, *HUGE]
    values["seed"] = [*NO_INTEGERS[1:], -1, 2**63, *HUGE]
    numbers = {
        "temperature": (-0.1, 100.5, 1e308),
        "top_p": (0, -1, 1.01),
        "min_p": (-0.1, 1.1),
        "presence_penalty": (-2.1, 2.1),
        "frequency_penalty": (-2.1, 2.1),
        "repetition_penalty": (0, -1, 10.1),
    }
    for name, beyond_range in numbers.items():
        values[name] = [*NO_NUMBERS, *beyond_range, 10**400]
    values["timeout"] = [0, -1, 1e7, "1", True, [], 10**400]
    for name in ("stream", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "return_token_ids"):
        values[name] = list(NO_FLAGS)
    values["stop"] = ["", 1, True, {}, [""], [1], [None], [["a"]], ["a"] * 17, "a" * 257, ["a" * 257]]
    values["stop_token_ids"] = [None, 5, "5", [-1], [1.5], ["5"], [True], [None], [2**31], [10**6], [5] * 257, {}]
    values["logit_bias"] = [[], "a", 1, {"x": 1}, {"-1": 1}, {"1": 101}, {"1": -101}, {"1": "1"}, {"1": None}, {"": 1}]
    values["logit_bias"] += [{"1": True}, {"1.5": 1}, {"1000000": 1}, {"99999999999": 1}, {"1 ": 1}, {"\u0661": 1}]
    values["request_id"] = ["", "a b", "a\n", "a\u0000", "\u00e4", "a" * 129, 5, [], {}, True, "../x", "a;b"]
    values["cache_salt"] = ["", "a" * 257, 5, [], {}, False]
    values["stream_options"] = [True, "a", [], {"include_usage": 1}, {"other": True}, {"include_usage": None}]
    values["user"] = [5, [], "a" * 1025]
    values["metadata"] = [[], "a", {"a": 1}, {"a": None}]
    values["store"] = [True, "no", 1]
    values["service_tier"] = ["flex", 1]
    return values


def completion_values() -> dict[str, list[object]]:
    deep: object = "a"
    for _ in range(50):
        deep = [deep]
    return {
        "prompt": [
            *(None, "", 1, 1.5, True, {}, [], [[]], [""], [None], [1.5], [True], [-1], [10**6], [2**31], [10**30]),
            *(["a", 1], [1, "a"], [[1], "a"], [[1], [-1]], [[1], []], [["a"]], {"text": "a"}, deep, ["a"] * 1025),
            *([[5]] * 1025, [5] * 2048, "a b " * 4000, "\ud800", "a\udfff", ["\ud83d"], [{"type": "text"}]),
        ],
        "max_tokens": [0, -1, "5", 1.5, True, [], {}, 2**31, *HUGE],
        "logprobs": [-1, 21, "1", 1.5, True, [], *HUGE],
        "echo": list(NO_FLAGS),
        "suffix": ["b", "", 1, []],
        "best_of": [0, 129, "1", True],
        "model": ["a" * 257, 5, [], {}, True],
    }


def chat_values() -> dict[str, list[object]]:
    return {
        "messages": [*bad_messages()],
        "tools": [
            *("a", 1, {}, ["a"], [1], [None], [[]], [{}], [{"type": "function"}], [{"function": {}}]),
            *([{"function": {"name": ""}}], [{"function": {"name": 1}}], [{"function": []}]),
            *([{"function": {"name": "f"}}] * 1 + ["a"], [{"function": {"name": "f"}}] * 257),
            *([{"name": "f"}], [{"type": "function", "function": None}], [{"function": {"name": "\ud800"}}]),
        ],
        "tool_choice": ["required", "any", 1, True, [], {}, {"type": "function"}, {"type": "function", "function": {}}],
        "response_format": [
            *(1, "text", [], {}, {"type": "xml"}, {"type": 1}, {"type": "text", "other": 1}, {"type": "json_schema"}),
            {"type": "text", "json_schema": {"schema": {}}},
            {"type": "json_schema", "json_schema": {"schema": {"not": {}}}},
        ],
        "structured_outputs": [
            *(1, "a", [], {}, {"regex": "(("}, {"regex": "a", "choice": ["a"]}, {"structural_tag": "a"}),
            *({"choice": [""]}, {"choice": []}, {"json": "a" * 300_000}, {"grammar": "no grammar"}),
        ],
        "chat_template_kwargs": [1, [], {"tokenize": False}, {"thinking": 1}, {"thinking": "yes"}, {"add_bos": False}],
        "reasoning_effort": ["enormous", 1, True, [], {}],
        "max_tokens": [0, -1, "5", 1.5, True, *HUGE],
        "max_completion_tokens": [0, -1, "5", 1.5, True, *HUGE],
        "logprobs": [1, "true", [], {}],
        "top_logprobs": [-1, 21, "1", True, 10**30],
        "parallel_tool_calls": ["no", []],
    }


def bad_messages() -> Iterator[object]:
    yield from (None, 1, "hello", {}, [], [None], [1], ["hello"], [[]], [{}], [USER] * 4097)
    for role in (None, "", "wizard", "USER", 1, [], {}, "user\u0000", "\ud800"):
        yield [{"role": role, "content": "a"}]
    for content in (None, 1, True, {}, [1], [None], ["a"], [{}], [{"type": "text"}], [{"type": "text", "text": 1}]):
        yield [{"role": "user", "content": content}]
    for part in ({"type": "image_url", "image_url": {"url": "x"}}, {"type": "input_audio"}, {"text": "a"}):
        yield [{"role": "user", "content": [part]}]
    yield [{"role": "user", "content": "\ud800"}]
    yield [{"role": "user", "content": "a b " * 4000}]
    yield [{"role": "user", "content": "a", "tool_calls": [CALL]}]
    yield [{"role": "user", "content": "a", "tool_call_id": "c1"}]
    yield [{"role": "user", "content": "a", "reasoning_content": "b"}]
    yield [{"role": "user", "content": "a", "tools": [{"function": {"name": "f"}}]}]
    yield [{"role": "developer", "content": ""}]
    yield [{"role": "tool", "content": "a"}]
    yield [USER, {"role": "tool", "content": "a", "tool_call_id": "c1"}]
    yield [USER, ASSISTANT, {"role": "tool", "content": "a", "tool_call_id": "c2"}]
    yield [USER, ASSISTANT, {"role": "tool", "content": "a", "tool_call_id": 1}]
    yield [USER, ASSISTANT, {"role": "tool", "tool_call_id": "c1"}]
    yield [USER, ASSISTANT, *[{"role": "tool", "content": "a", "tool_call_id": "c1"}] * 2]
    yield [USER, {"role": "assistant", "tool_calls": [CALL, CALL]}, {"role": "tool", "content": "a"}]
    for calls in (1, "a", {}, [1], [{}], [{"function": {}}], [{"function": {"name": ""}}], [{"function": {"name": 1}}]):
        yield [USER, {"role": "assistant", "content": "a", "tool_calls": calls}]
    for arguments in (None, 1, [], "", "{", "[]", "null", "NaN", '{"a": NaN}', "[" * DEEP, '{"a": Infinity}'):
        yield [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
    yield [USER, {"role": "assistant", "tool_calls": [{"id": 1, "function": {"name": "f", "arguments": "{}"}}]}]
    yield [{"role": "system", "content": "a", "response_format": "text"}, USER]
    yield [{"role": "system", "content": "a", "tools": "f"}, USER]


def contradictions() -> Iterator[tuple[str, dict[str, object], str | None]]:
    """Fields that are good alone."""
    text, chat = GOOD["/v1/completions"], GOOD["/v1/chat/completions"]
    tools = [{"type": "function", "function": {"name": "f"}}]
    yield "/v1/completions", text | {"max_tokens": 4, "min_tokens": 5}, "min_tokens"
    yield "/v1/completions", text | {"stream_options": {"include_usage": True}}, None
    yield "/v1/completions", text | {"best_of": 2}, None
    yield "/v1/completions", text | {"best_of": 2, "n": 3}, None
    yield "/v1/chat/completions", chat | {"max_tokens": 4, "max_completion_tokens": 5}, None
    yield "/v1/chat/completions", chat | {"top_logprobs": 2}, None
    yield "/v1/chat/completions", chat | {"top_logprobs": 2, "logprobs": False}, None
    yield "/v1/chat/completions", chat | {"chat_template_kwargs": {"thinking": True, "enable_thinking": False}}, None
    system = {"role": "system", "content": "a", "tools": tools}
    yield "/v1/chat/completions", {"messages": [system, USER], "tools": tools}, None
    yield "/tokenize", {}, None
    yield "/tokenize", {"prompt": "a", "messages": [USER]}, None
    yield "/tokenize", {"prompt": None, "messages": None}, None


def other_values() -> Iterator[tuple[str, dict[str, list[object]]]]:
    ids: list[object] = [None, 5, "5", [-1], [1.5], ["5"], [None], [10**6], [2**31], [10**30], [[5]], {}]
    yield "/generate", {"prompt_token_ids": [*ids, [], [5] * 3000], "max_tokens": [0, "1"], "logprobs": [21, True]}
    yield "/detokenize", {"tokens": ids, "model": [5]}
    yield "/tokenize", {"prompt": [5, [], {}, "\ud800"], "return_token_strs": [1], "add_special_tokens": ["yes"]}
    yield "/tokenize", {"surprise": [1]}


def bad_bodies() -> Iterator[tuple[str, str, bytes, str | None]]:
    """``(group, path, body, field)``."""
    tables = [("/v1/completions", sampling_values()), ("/v1/completions", completion_values())]
    tables += [("/v1/chat/completions", chat_values()), *other_values()]
    for path, table in tables:
        for name, values in table.items():
            for value in values:
                yield name, path, json.dumps(GOOD[path] | {name: value}).encode(), name
    for path, body, field in contradictions():
        yield "contradictions", path, json.dumps(body).encode(), field
    for path, good in GOOD.items():
        for name in ("surprise", "", "__proto__", "prompt ", "a" * 10_000, "\u0000", "constructor"):
            yield (
                "unknown fields",
                path,
                json.dumps(good | {name: 1}).encode(),
                name.rstrip("a") if name == "" else None,
            )
        yield "unknown models", path, json.dumps(good | {"model": "gpt-9\u0000"}).encode(), "model"
        for body in bodies_that_are_no_object():
            yield "no objects", path, body, None


def bodies_that_are_no_object() -> Iterator[bytes]:
    yield from (b"", b" ", b"{", b"}", b"[]", b"null", b"true", b'"a"', b"1", b"-", b"NaN", b"{]", b"{'prompt': 'a'}")
    yield from (b"\xff\xfe", b'{"prompt": "\xc3("}', b'{"prompt": "a"', b'{"prompt": "a"}}', b'{"prompt": "a",}')
    yield from (b'{"prompt": "a"} x', b'\xef\xbb\xbf{"prompt": "a"}', '{"prompt": "a"}'.encode("utf-16"), b"\x00" * 64)
    yield from (b'{"prompt": "a\nb"}', b'{"prompt": NaN}', b'{"prompt": "a", "top_p": Infinity}', b'{"n": -Infinity}')
    yield from (b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}")
    yield from (b'{"prompt": "a", "prompt": "b"}', b'{"prompt": "a", "metadata": {"a": "1", "a": "2"}}')
    yield from (
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"prompt": ["a", "\\ud800"]}',
        b'{"\\udc00": 1}',
        b'{"prompt": "\\x"}',
    )
    yield from (
        b'{"prompt": [' + b"5," * (2**20 + 1) + b"5]}",
        b"// comment\n{}",
        b'{"prompt": 0x10}',
        b'{"prompt": 01}',
    )
