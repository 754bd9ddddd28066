"""``argosy serve`` as users run it: a process, sockets, third-party clients, signals. One server for most of it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import openai
import pytest

from argosy import LLM, RequestOutput, SamplingParams

QUESTIONS = ["17 + 25 = ?", "法国的首都是哪里？", "What is 3 * 14?", "Which is larger, 9 or 12?"]
START_S = 90.0
MAX_TOKENS = 48
LONG_TOKENS = 300  # so that a test can act while requests run

# Processes with deadlines: such tests run one after another.
pytestmark = [pytest.mark.processes, pytest.mark.e2e]


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str]

    def client(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, **options)

    def stop(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(timeout=60)


def start(*flags: str) -> Served:
    command = [sys.executable, "-m", "argosy", "serve", "--port", "0", "--num-threads", "1", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    served = Served(process, "", [])
    found = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            served.lines.append(line)
            if match := re.search(r"listening on (http://\S+)", line):
                served.url = match.group(1)
                found.set()
        found.set()  # it has ended

    threading.Thread(target=read, daemon=True).start()
    assert found.wait(START_S) and served.url, "".join(served.lines)
    return served


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = start()
    yield server
    assert server.stop() == 0, "".join(server.lines[-20:])


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    """Token ids by question, offline."""
    return complete_offline(SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS))


@pytest.fixture(scope="module")
def expected_long() -> dict[str, list[int]]:
    return complete_offline(SamplingParams(temperature=0.0, max_tokens=LONG_TOKENS, ignore_eos=True))


def complete_offline(params: SamplingParams) -> dict[str, list[int]]:
    with LLM(num_threads=1) as llm:
        prompts = [llm.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
        outputs = llm.generate(prompts, params)
    return {question: output.outputs[0].token_ids for question, output in zip(QUESTIONS, outputs, strict=True)}


def ask(served: Served, question: str, **options: object) -> httpx.Response:
    body = {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "return_token_ids": True,
    }
    return httpx.post(f"{served.url}/v1/chat/completions", json=body | options, timeout=60)


def ask_streamed(served: Served, question: str, **options: object) -> list[int]:
    answer = ask(served, question, stream=True, **options)
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [token for event in events[:-1] for c in json.loads(event)["choices"] for token in c.get("token_ids", ())]


def test_tokens_equal_those_offline_alone_streamed_and_in_a_crowd(served: Served, expected: dict) -> None:
    for question in QUESTIONS:
        assert ask(served, question).json()["choices"][0]["token_ids"] == expected[question]
        assert ask_streamed(served, question) == expected[question]
    with ThreadPoolExecutor(16) as pool:
        crowd = [question for question in QUESTIONS for _ in range(6)]
        assert list(pool.map(lambda question: ask_streamed(served, question), crowd)) == [expected[q] for q in crowd]


def test_an_echo_has_the_prompts_log_probabilities_offline(served: Served) -> None:
    """As the SDK reads them, whole and streamed, of a prompt whose prefix is in the cache."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    with LLM(num_threads=1) as llm:
        prompt = llm.encode_chat([{"role": "user", "content": QUESTIONS[1] * 20}])
        (result,) = llm.generate([prompt], params)
    assert isinstance(result, RequestOutput) and result.prompt_logprobs is not None and len(prompt) > 64
    expected = [entry.logprob for entry in result.prompt_logprobs if entry is not None]
    options = {"model": "argosy-tiny", "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 4, "temperature": 0}
    create = served.client().completions.create
    for stream in (False, True):
        pieces = (
            [each.choices[0] for each in create(**options, stream=True)] if stream else [create(**options).choices[0]]
        )
        told = [value for piece in pieces for value in piece.logprobs.token_logprobs]
        assert told[0] is None and len(told) == len(prompt) + 4
        assert told[1 : len(prompt)] == pytest.approx(expected, abs=1e-4)


def test_the_openai_sdk(served: Served) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["argosy-tiny"]
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    chat = client.chat.completions.create(
        model="argosy-tiny", messages=messages, temperature=0, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].message.content.endswith("42") and chat.choices[0].finish_reason == "stop"
    entries = chat.choices[0].logprobs.content
    assert chat.usage.completion_tokens == len(entries) and all(len(entry.top_logprobs) == 2 for entry in entries)
    assert all(entry.logprob == pytest.approx(entry.top_logprobs[0].logprob) for entry in entries)
    stream = client.chat.completions.create(
        model="argosy-tiny", messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat.choices[0].message.content and chunks[-1].usage == chat.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    completion = client.completions.create(model="argosy-tiny", prompt=["1 + 1", "2 + 2"], n=2, max_tokens=4)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="argosy-tiny", messages=messages, temperature=3000)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=messages)


def test_the_openai_sdk_with_grammars(served: Served) -> None:
    client = served.client()
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    parameters = {"type": "object", "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}}}
    schema = parameters | {"required": ["digit"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    options = {"model": "argosy-tiny", "messages": messages, "max_tokens": 200}
    chat = client.chat.completions.create(response_format=wanted, **options)
    assert chat.choices[0].finish_reason == "stop"
    assert json.loads(chat.choices[0].message.content)["digit"] in range(10)
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": schema}}]
    one_call = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False} | options
    choice = client.chat.completions.create(**one_call).choices[0]
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    (call,) = choice.message.tool_calls
    assert call.function.name == "look_up" and json.loads(call.function.arguments)["digit"] in range(10)
    chunks = list(client.chat.completions.create(stream=True, **one_call))
    streamed = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or ()]
    assert json.loads(streamed[0].function.arguments)["digit"] in range(10)
    bomb = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(8000)}}
    started_s = time.monotonic()
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(extra_body={"structured_outputs": {"json": bomb}}, **options)
    assert refused.value.param == "structured_outputs" and time.monotonic() - started_s < 20
    assert client.chat.completions.create(response_format=wanted, **options).choices[0].finish_reason == "stop"


def test_clients_that_leave_free_their_blocks(served: Served) -> None:
    body = {"prompt": "1 2 3", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    for _ in range(4):
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as response:
            next(response.iter_lines())
    deadline_s = time.monotonic() + 5
    while (used := read_metric(served, 'cache_blocks{engine="0",model_name="argosy-tiny",state="used"}')) and (
        time.monotonic() < deadline_s
    ):
        time.sleep(0.1)
    assert used == 0.0
    assert httpx.get(f"{served.url}/load").json() == {"server_load": 0}


def test_only_the_port_listens(served: Served) -> None:
    pids = [served.process.pid, *children_of(served.process.pid)]
    ports = {address for pid in pids for address in listening_addresses(pid)}
    assert ports == {served.url.removeprefix("http://")}


def test_sigterm_finishes_what_was_begun(expected_long: dict) -> None:
    served = start()
    with ThreadPoolExecutor(8) as pool:
        answers = ask_all_long(served, pool)
        assert served.stop() == 0
        assert [answer.result() for answer in answers] == [expected_long[question] for question in QUESTIONS * 2]


def test_a_killed_engine_is_replaced_and_no_token_is_lost(expected_long: dict) -> None:
    served = start("--dp", "2", "--ep", "1")
    try:
        engines = children_of(served.process.pid)
        with ThreadPoolExecutor(8) as pool:
            answers = ask_all_long(served, pool)
            os.kill(engines[0], signal.SIGKILL)
            assert [answer.result() for answer in answers] == [expected_long[question] for question in QUESTIONS * 2]
        deadline_s = time.monotonic() + 30
        while read_metric(served, 'engine_up{engine="0",model_name="argosy-tiny"}') != 1.0:
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
    finally:
        assert served.stop() == 0


def ask_all_long(served: Served, pool: ThreadPoolExecutor) -> list[Future[list[int]]]:
    """Every question twice, all at once; returns when the server has them all."""
    options = {"max_tokens": LONG_TOKENS, "ignore_eos": True}
    answers = [pool.submit(ask_streamed, served, question, **options) for question in QUESTIONS * 2]
    deadline_s = time.monotonic() + 30
    while httpx.get(f"{served.url}/load").json()["server_load"] < len(answers):
        assert time.monotonic() < deadline_s, "the server never had all requests at once"
        time.sleep(0.01)
    return answers


def read_metric(served: Served, name: str) -> float | None:
    text = httpx.get(f"{served.url}/metrics").text
    values = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(f"argosy:{name} ")]
    return float(values[0]) if values else None


def children_of(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(word) for word in file.read().split()]


def listening_addresses(pid: int) -> Iterator[str]:
    """TCP addresses on which a process listens."""
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    for table in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{table}", encoding="ascii") as file:
            for line in file.readlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    host, port = fields[1].split(":")
                    dotted = ".".join(str(int(host[i : i + 2], 16)) for i in (6, 4, 2, 0)) if table == "tcp" else host
                    yield f"{dotted}:{int(port, 16)}"
