"""Causes of published CVEs in inference servers, one by one: each is shown not to be here.

Sockets and foreign users are in ``test_internal_ports.py``, huge heads and bodies in ``test_connections.py``, bounds of
fields in ``test_bad_input.py``, admin routes in ``test_gate.py``.
"""

import ast
import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import argosy
from argosy.server.gate import ADMIN_PATHS, Gate
from argosy.server.settings import ServerConfig

ROOT = Path(argosy.__file__).parent
# Modules that make objects, or run code, of bytes.
UNSAFE_MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "yaml",
    "jinja2",
}
UNSAFE_NAMES = {"eval", "exec", "compile", "__import__"}
# Of torch, transformers and ZeroMQ: methods that unpickle, or run what a model brings along.
UNSAFE_CALLS = {"recv_pyobj", "send_pyobj", "all_gather_object", "broadcast_object_list", "gather_object"}
UNSAFE_CALLS |= {
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
    "unsafe_load",
    "load_state_dict_from_url",
}
EVERYWHERE = {"0.0.0.0", "::", "tcp://*"}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Names of called functions; of methods, with what stands before, as far as that has a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            yield ast.unparse(node.func), node


def test_nothing_is_unpickled_and_no_text_becomes_code() -> None:
    found = []
    for path, tree in sources():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path}: import {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES]
        for name, _ in calls(tree):
            last = name.rpartition(".")[2]
            if name in UNSAFE_NAMES or last in UNSAFE_CALLS:
                found.append(f"{path}: {name}()")
    assert not found


def test_no_file_of_a_user_is_loaded_by_torch() -> None:
    found = [f"{path}: {name}" for path, tree in sources() for name, _ in calls(tree) if name == "torch.load"]
    assert not found


def test_no_code_of_a_model_is_run() -> None:
    """``auto_map`` names Python files beside the weights; they are neither imported nor asked for."""
    found = []
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                found.append(f"{path}: trust_remote_code")
            if isinstance(node, ast.Constant) and node.value == "auto_map":
                found.append(f"{path}: auto_map")
    assert not found


def test_no_address_means_everywhere_by_default() -> None:
    assert ServerConfig().host == "127.0.0.1" and ServerConfig().is_loopback
    found = []
    for path, tree in sources():
        documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in EVERYWHERE and id(node) not in documented:
                found.append(f"{path}:{node.lineno}: {node.value}")
    assert not found


def test_keys_are_compared_in_constant_time() -> None:
    """Every comparison in the gate that has a key in it is hmac's."""
    tree = ast.parse((ROOT / "server" / "gate.py").read_text(encoding="utf-8"))
    compared = [name for name, _ in calls(tree) if name == "hmac.compare_digest"]
    assert len(compared) == 2
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and not isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            words = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            words |= {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
            assert not words & {"given", "known", "_keys", "_admin_key"}, ast.unparse(node)


@pytest.mark.parametrize("path", ["/abort_requests", "/%61bort_requests", "/abort_requests/", "//abort_requests"])
@pytest.mark.parametrize("authorization", [None, "Bearer", "Bearer ", "Bearer key", "Basic YWRtaW4=", "Bearer admin x"])
def test_admin_routes_open_to_the_admin_key_alone(build_stand, path: str, authorization: str | None) -> None:
    stand = build_stand(api_key=("key",), admin_api_key="admin")

    async def go() -> int:
        async with stand.client() as client:
            headers = {} if authorization is None else {"authorization": authorization}
            return (await client.post(path, json={"all": True}, headers=headers)).status_code

    assert asyncio.run(go()) in (401, 404, 405)
    assert set(ADMIN_PATHS) == {"/abort_requests"}


def test_every_route_needs_a_key_unless_it_is_named(build_stand) -> None:
    """Also a route that somebody adds and forgets."""
    stand = build_stand(api_key=("key",))
    called = []

    async def app(scope: object, receive: object, send: object) -> None:
        called.append(scope)

    async def go() -> list[int]:
        statuses: list[int] = []

        async def send(message: dict) -> None:
            statuses.extend([message["status"]] if "status" in message else [])

        async def receive() -> dict:
            return {"type": "http.request"}

        scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": "/forgotten", "headers": []}
        await Gate(app, stand.service.settings, lambda *_: None)(scope, receive, send)
        return statuses

    assert asyncio.run(go()) == [401] and not called


@pytest.mark.parametrize(
    "kwargs",
    [{"tokenize": False}, {"tokenize": True}, {"add_bos": False}, {"chat_template": "{{ 1 }}"}, {"messages": []}],
)
def test_template_arguments_cannot_change_the_encoding(stand, kwargs: dict) -> None:
    body = {"messages": [{"role": "user", "content": "a"}]}

    async def go() -> list[tuple[int, str]]:
        async with stand.client() as client:
            answers = [
                await client.post("/v1/chat/completions", json=body | {"chat_template_kwargs": kwargs}),
                await client.post("/v1/chat/completions", json=body | {"chat_template": "{{ 1 }}"}),
                await client.post("/tokenize", json=body | {"chat_template_kwargs": kwargs}),
            ]
            return [(each.status_code, each.text) for each in answers]

    for status, text in asyncio.run(go()):
        assert status == 400 and "chat_template" in str(json.loads(text)["error"]["param"])
