"""One service over a fake pool, and an in-memory client."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest

import argosy
from argosy.engine.tokenizer import Tokenizer
from argosy.server.api_server import Service, build_app
from argosy.server.metrics import ServerMetrics
from argosy.server.outputs import RequestBoard
from argosy.server.settings import ServerConfig
from tests.helpers.fake_pool import FakePool
from tests.helpers.grammars import InstantGrammars

MODEL = "argosy-tiny"
ASSETS = Path(argosy.__file__).parent / "assets" / MODEL


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
    token_ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    pool = FakePool(lambda prompt: list(token_ids), tokenizer.eos_token_id)
    metrics = ServerMetrics(MODEL)
    board = RequestBoard(tokenizer, metrics, pool)
    pool.deliver = board.deliver
    service = Service(
        ServerConfig(**settings),
        tokenizer,
        board,
        metrics,
        InstantGrammars(tokenizer),
        model_names=(MODEL,),
        version="1.2.3",
        describe_health=lambda: None,
    )
    service.open(max_model_len=2048, max_num_running=8)
    return Stand(service, pool, tokenizer)
