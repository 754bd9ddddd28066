"""Generated nonsense: good bodies with one to three things changed, as values, as text or as bytes."""

import copy
import json
import random
from collections.abc import Iterator

GOOD_BODIES: tuple[tuple[str, dict[str, object]], ...] = (
    ("/v1/completions", {"prompt": "1 + 1", "max_tokens": 4, "temperature": 0, "logprobs": 2, "echo": False}),
    ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "stop": ["x"], "seed": 1, "stream": True, "max_tokens": 3}),
    ("/v1/completions", {"prompt": [[5, 6], [7]], "logit_bias": {"5": 1.5}, "top_p": 0.9, "max_tokens": 2}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "logprobs": True}),
    (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "t"}]},
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
                },
                {"role": "tool", "content": "r", "tool_call_id": "c"},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 3,
            "chat_template_kwargs": {"thinking": True},
        },
    ),
    ("/generate", {"prompt_token_ids": [5, 6], "max_tokens": 2, "return_token_ids": True, "stop_token_ids": [9]}),
    ("/tokenize", {"prompt": "hello", "return_token_strs": True}),
    ("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
)
_ODD: tuple[object, ...] = (
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.5, 1e308, 1e-320, float("nan")),
    *(float("inf"), "", "a", "\x00", "\ud800", "\U0001f600", "a" * 3000, "NaN", "null", "<think>", "../../etc/passwd"),
    *([], {}, [[]], [{}], {"": None}, [None], [0], ["a"], {"a": {"a": {"a": []}}}, [1, "a", None, {}]),
)


def mutated_requests(rng: random.Random, number: int) -> Iterator[tuple[str, bytes]]:
    """``(path, body)``; the same for the same state of ``rng``."""
    for _ in range(number):
        path, good = rng.choice(GOOD_BODIES)
        body: object = copy.deepcopy(good)
        for _ in range(rng.randint(1, 3)):
            body = _mutate(rng, body)
        data = json.dumps(body).encode()
        yield path, _damage(rng, data) if rng.random() < 0.2 else data


def _mutate(rng: random.Random, value: object) -> object:
    """One change somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        action = rng.random()
        if action < 0.1:
            del value[name]
        elif action < 0.2:
            value[rng.choice((*value, "surprise", "", "n", "model", "tools", "messages"))] = copy.deepcopy(
                rng.choice(_ODD)
            )
        else:
            value[name] = _mutate(rng, value[name])
        return value
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        action = rng.random()
        if action < 0.15:
            del value[place]
        elif action < 0.3:
            value.insert(place, copy.deepcopy(rng.choice((*_ODD, value[place]))))
        else:
            value[place] = _mutate(rng, value[place])
        return value
    if isinstance(value, str) and rng.random() < 0.4:
        place = rng.randint(0, len(value))
        return (
            value[:place]
            + rng.choice(("\x00", "\ud83d", "<｜User｜>", "\u202e", "\n", " ", "é", "｜DSML｜"))
            + value[place:]
        )
    if type(value) in (int, float) and rng.random() < 0.4:
        return rng.choice((-value, value * 10**9, value + 0.5, str(value), [value]))  # type: ignore[operator]
    return copy.deepcopy(rng.choice(_ODD))


def _damage(rng: random.Random, data: bytes) -> bytes:
    """Bytes that may be JSON no more."""
    place = rng.randrange(len(data))
    action = rng.random()
    if action < 0.3:
        return data[:place]
    if action < 0.6:
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    if action < 0.8:
        return data[:place] + rng.choice((b"{", b"[", b'"', b"\\", b"\xff", b"\x00", b"[" * 3000)) + data[place:]
    return data + data
