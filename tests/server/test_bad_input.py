"""Nonsense gets a 4xx with an error object that names the field, and starts nothing."""

import asyncio
import json
import logging
import random
from collections.abc import Iterable

import httpx
import pytest

from argosy.server.errors import ApiError
from argosy.server.json_body import read_json
from tests.helpers.bad_requests import bad_bodies
from tests.helpers.body_mutations import mutated_requests

CASES = list(bad_bodies())
GROUPS = sorted({group for group, _, _, _ in CASES})
NUM_MUTATIONS = 1000
JSON_HEADERS = {"content-type": "application/json"}


def send(stand, requests: Iterable[tuple[str, bytes]]) -> list[httpx.Response]:
    """One after another; a good one at the end, which must be answered."""

    async def go() -> list[httpx.Response]:
        async with stand.client() as client:
            answers = [await client.post(path, content=body, headers=JSON_HEADERS) for path, body in requests]
            good = await client.post("/v1/completions", json={"prompt": "a"})
            assert good.status_code == 200 and good.json()["choices"][0]["text"] == "It is 42."
            return answers

    return asyncio.run(go())


def check_refusal(answer: httpx.Response) -> dict:
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert len(answer.content) < 2000  # no refusal repeats what it was sent
    return error


def test_the_table_is_long() -> None:
    assert len(CASES) >= 300


@pytest.mark.parametrize("group", GROUPS)
def test_bad_bodies_are_refused_by_field(stand, group: str) -> None:
    cases = [case for case in CASES if case[0] == group]
    answers = send(stand, [(path, body) for _, path, body, _ in cases])
    for (_, path, body, field), answer in zip(cases, answers, strict=True):
        where = f"{path} {body[:120]!r}: {answer.text[:200]}"
        assert 400 <= answer.status_code < 500, where
        error = check_refusal(answer)
        if field is not None:
            assert (error["param"] or "").split(".")[0].split("[")[0] == field, where
    assert not stand.pool.running and not stand.service.board.num_requests


def test_unknown_model(stand) -> None:
    (answer,) = send(stand, [("/v1/completions", b'{"prompt": "a", "model": "gpt-9"}')])
    assert answer.status_code == 404 and check_refusal(answer)["code"] == "model_not_found"


def test_a_field_given_twice_is_named(stand) -> None:
    (answer,) = send(stand, [("/v1/completions", b'{"prompt": "a", "n": 1, "n": 2}')])
    assert check_refusal(answer)["param"] == "n"


@pytest.mark.parametrize("prompt", [[5] * 3000, "a b c " * 5000, "a" * 1_000_000])
def test_too_long_a_prompt_says_both_numbers(stand, prompt: object) -> None:
    (answer,) = send(stand, [("/v1/completions", json.dumps({"prompt": prompt}).encode())])
    error = check_refusal(answer)
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt" and "2048" in error["message"]


def test_more_values_than_any_model_takes_are_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", lambda *arguments, **options: pytest.fail("parsed"))
    with pytest.raises(ApiError, match="more than 1048576 values") as refused:
        read_json(b"[" + b"0," * (2**20 + 1) + b"0]")
    assert refused.value.status == 400


def test_mutated_bodies_never_break_the_server(stand, caplog: pytest.LogCaptureFixture) -> None:
    requests = list(mutated_requests(random.Random(7), NUM_MUTATIONS))
    with caplog.at_level(logging.ERROR):
        answers = send(stand, requests)
    for (path, body), answer in zip(requests, answers, strict=True):
        assert answer.status_code < 500, f"{path} {body[:200]!r}: {answer.text[:200]}"
        if answer.status_code != 200:
            check_refusal(answer)
    assert not caplog.records
    assert 0.02 < sum(answer.status_code == 200 for answer in answers) / len(answers) < 0.9  # both kinds were tried
    assert not stand.pool.running and not stand.service.board.num_requests
