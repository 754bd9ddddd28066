"""One service over a fake pool, and an in-memory client."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import httpx
import pytest

from argosy.engine.tokenizer import Tokenizer
from argosy.server.api_server import Service, build_app
from tests.helpers.fake_pool import FakePool
from tests.helpers.socket_server import ASSETS, build_service


@dataclass
class Stand:
    """A server without sockets and engines."""

    service: Service
    pool: FakePool
    tokenizer: Tokenizer

    def client(self, **headers: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=build_app(self.service))
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(ASSETS)


@pytest.fixture
def build_stand(tokenizer: Tokenizer) -> Callable[..., Stand]:
    return partial(_build_stand, tokenizer)


@pytest.fixture
def stand(build_stand: Callable[..., Stand]) -> Stand:
    return build_stand()


def _build_stand(tokenizer: Tokenizer, text: str = "It is 42.", **settings: object) -> Stand:
    return Stand(*build_service(tokenizer, text, **settings), tokenizer)
