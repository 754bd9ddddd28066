"""The prompt's log probabilities in completions, chat and streams, over a pool that says -i of the token at i."""

import httpx
import pytest

from argosy.engine.prompts import CheckedPrompt
from argosy.engine.tokenizer import Tokenizer
from argosy.messages import TokenLogprobs
from argosy.server.logprobs import MAX_PROMPT_LOGPROBS, describe_logprobs, find_prompt_offsets
from tests.helpers.tiny_tokenizer import build_tiny_backend
from tests.server.test_completions import CHAT, MESSAGES, post, read_events

PROMPT = "6 * 7? 答案 "
LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def complete(stand, **fields: object) -> httpx.Response:
    return post(stand, "/v1/completions", {"prompt": PROMPT, **fields})


def test_echo_with_logprobs_covers_prompt_and_completion(stand) -> None:
    choice = complete(stand, echo=True, logprobs=1).json()["choices"][0]
    ids = stand.tokenizer.encode_prompt(PROMPT)
    logprobs, num_prompt = choice["logprobs"], len(ids)
    assert choice["text"] == PROMPT + "It is 42."
    assert "prompt_logprobs" not in choice
    assert {len(logprobs[name]) for name in LISTS} == {num_prompt + len(stand.tokenizer.encode("It is 42.")) + 1}
    assert logprobs["token_logprobs"][:num_prompt] == [None, *(-float(i) for i in range(1, num_prompt))]
    assert set(logprobs["token_logprobs"][num_prompt:]) == {-0.5}
    assert logprobs["top_logprobs"][0] is None
    other = stand.tokenizer.byte_table(skip_special_tokens=False)[5].decode()
    assert logprobs["top_logprobs"][1] == {logprobs["tokens"][1]: -1.0, other: -0.25}
    for token, offset in zip(logprobs["tokens"][1:-1], logprobs["text_offset"][1:-1], strict=True):
        assert choice["text"][offset:].startswith(token) or "\ufffd" in token
    assert logprobs["text_offset"][num_prompt] == len(PROMPT)


def test_an_echo_of_token_ids_and_of_several_prompts(stand) -> None:
    ids = stand.tokenizer.encode_prompt(PROMPT)
    body = {"prompt": [ids, ids[:3]], "echo": True, "logprobs": 0, "n": 2}
    choices = post(stand, "/v1/completions", body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for choice, num_prompt in zip(choices, (len(ids), len(ids), 3, 3), strict=True):
        told = choice["logprobs"]["token_logprobs"]
        assert told[:num_prompt] == [None, *(-float(i) for i in range(1, num_prompt))] and told[num_prompt] == -0.5
        text, offset = choice["text"], choice["logprobs"]["text_offset"][num_prompt]
        assert text[offset:] == "It is 42."


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_a_streamed_echo_joins_to_the_whole_one(stand, max_tokens: int) -> None:
    body = {"echo": True, "logprobs": 2, "prompt_logprobs": 1, "n": 3, "max_tokens": max_tokens}
    whole = complete(stand, **body).json()
    events = read_events(complete(stand, **body, stream=True, stream_options={"include_usage": True}).text)
    assert events[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [c for event in events for c in event["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        for name in LISTS:
            assert [item for c in mine for item in c["logprobs"][name]] == choice["logprobs"][name]
        assert mine[0]["prompt_logprobs"] == choice["prompt_logprobs"]
        assert not any("prompt_logprobs" in c for c in mine[1:])
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["length"]


def test_max_tokens_0_judges_the_prompt_and_tells_no_token(stand) -> None:
    answer = complete(stand, echo=True, logprobs=1, max_tokens=0, return_token_ids=True).json()
    choice, num_prompt = answer["choices"][0], len(stand.tokenizer.encode_prompt(PROMPT))
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == (PROMPT, "length", [])
    assert choice["logprobs"]["token_logprobs"] == [None, *(-float(i) for i in range(1, num_prompt))]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (num_prompt, 0)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
        ({"echo": True, "logprobs": 21}, "logprobs"),
        ({"prompt": [[7] * 2000] * 128, "prompt_logprobs": 2}, "prompt_logprobs"),
    ],
)
def test_what_is_refused(stand, body: dict, param: str | None) -> None:
    answer = complete(stand, **body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    if "prompt" in body:
        assert str(MAX_PROMPT_LOGPROBS) in answer.json()["error"]["message"]
    assert not stand.pool.running


def expected_entry(stand, token_id: int, position: int) -> dict[str, dict]:
    def text(of: int) -> str:
        return stand.tokenizer.byte_table(skip_special_tokens=False)[of].decode(errors="replace")

    own = {str(token_id): {"logprob": -float(position), "rank": 2, "decoded_token": text(token_id)}}
    return {"5": {"logprob": -0.25, "rank": 1, "decoded_token": text(5)}} | own


def test_prompt_logprobs_have_vllms_shape(stand) -> None:
    ids = stand.tokenizer.encode_prompt(PROMPT)
    told = complete(stand, prompt_logprobs=1).json()["choices"][0]["prompt_logprobs"]
    assert told == [None, *(expected_entry(stand, token_id, i) for i, token_id in enumerate(ids) if i > 0)]
    (chosen,) = complete(stand, prompt_logprobs=0).json()["choices"][0]["prompt_logprobs"][1].values()
    assert chosen["logprob"] == -1.0


def test_chat_tells_them_beside_its_choices(stand) -> None:
    body = {"messages": MESSAGES, "prompt_logprobs": 1, "n": 2}
    whole = post(stand, CHAT, body).json()
    told = whole["prompt_logprobs"]
    assert told[0] is None and [max(entry["rank"] for entry in each.values()) for each in told[1:]] == [2] * (
        whole["usage"]["prompt_tokens"] - 1
    )
    events = read_events(post(stand, CHAT, body | {"stream": True}).text)
    assert [event["prompt_logprobs"] for event in events if "prompt_logprobs" in event] == [told]
    for choice in whole["choices"]:
        deltas = [c["delta"] for event in events for c in event["choices"] if c["index"] == choice["index"]]
        assert "".join(delta.get("content") or "" for delta in deltas) == choice["message"]["content"]


def test_generate_tells_them(stand) -> None:
    ids = stand.tokenizer.encode_prompt(PROMPT)
    body = {"prompt_token_ids": ids, "prompt_logprobs": 0}
    told = post(stand, "/generate", body).json()["prompt_logprobs"]
    assert [None if each is None else each["token_id"] for each in told] == [None, *ids[1:]]
    events = read_events(post(stand, "/generate", body | {"stream": True}).text)
    assert [event["prompt_logprobs"] for event in events if "prompt_logprobs" in event] == [told]


def test_offsets_point_into_the_text_inside_characters_too(tokenizer) -> None:
    text = "a\U0001f9ff b"  # four bytes that no token holds together
    ids = tokenizer.encode(text)
    assert len(ids) > 4
    offsets = list(find_prompt_offsets(tokenizer, CheckedPrompt(text, ids), text))
    assert offsets == [len(tokenizer.decode(ids[:i]).rstrip("\ufffd")) for i in range(len(ids))]


def test_a_begin_of_sentence_that_was_put_in_front_is_no_part_of_the_text() -> None:
    tokenizer = Tokenizer(build_tiny_backend(), bos_token_id=0, eos_token_ids=(1,), adds_bos=True)
    ids = tokenizer.encode_prompt("42 is")
    assert ids[0] == 0
    spelled = tokenizer.decode(ids, skip_special_tokens=False)
    for text, first in (("42 is", 0), (spelled, len(spelled) - len("42 is"))):
        offsets = list(find_prompt_offsets(tokenizer, CheckedPrompt(text, ids), text))
        assert offsets[:2] == [0, first] and offsets == sorted(offsets)
    assert list(find_prompt_offsets(tokenizer, CheckedPrompt(None, ids), "42 is"))[:2] == [0, 0]


def test_of_tokens_with_one_text_the_likeliest_is_told(tokenizer) -> None:
    parts = [token_id for token_id in tokenizer.encode("\U0001f9ff") if len(tokenizer.token_bytes(token_id)) == 1]
    first, second, third = dict.fromkeys(parts[:3])
    entry = TokenLogprobs(first, -3.0, 3, [second, third], [-0.5, -0.75])
    told = describe_logprobs(tokenizer, [first], [entry], [0], 2)
    assert told["top_logprobs"] == [{"\ufffd": -0.5}] and told["token_logprobs"] == [-3.0]
