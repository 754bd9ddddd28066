"""One service over a fake pool: an in-memory client of it, and its console in a browser."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import httpx
import pytest

from argosy.engine.tokenizer import Tokenizer
from argosy.server.api_server import Service, build_app
from tests.helpers.browser import Browser
from tests.helpers.fake_pool import FakePool
from tests.helpers.http_server import ServedApp
from tests.helpers.played_engines import PlayedEngines
from tests.helpers.socket_server import ASSETS, build_service

IS_ANSWERED = "return document.querySelectorAll('.answer[aria-busy=false]').length === arguments[0]"


@dataclass
class Stand:
    """A server without sockets and engines."""

    service: Service
    pool: FakePool
    tokenizer: Tokenizer

    def client(self, **headers: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=build_app(self.service))
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


@dataclass
class Scene:
    """The page of one server."""

    browser: Browser
    stand: Stand
    served: ServedApp
    expected_errors: int = 0  # answers that the browser itself calls errors on its console

    def step(self) -> None:
        self.served.call(self.stand.pool.step)

    def release(self) -> None:
        self.stand.pool.is_held = False
        self.step()

    def wait_for_request(self) -> str:
        """The prompt of the only request under way."""
        pool = self.stand.pool
        self.browser.wait("return document.querySelector('.answer[aria-busy=true]')")
        while not pool.running:
            self.browser.run("return 0")  # a moment
        (running,) = pool.running.values()
        return self.stand.tokenizer.decode(running.request.prompt_token_ids, skip_special_tokens=False)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(ASSETS)


@pytest.fixture
def build_stand(tokenizer: Tokenizer) -> Callable[..., Stand]:
    return partial(_build_stand, tokenizer)


@pytest.fixture
def stand(build_stand: Callable[..., Stand]) -> Stand:
    return build_stand()


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def open_page(window: Browser, build_stand: Callable[..., Stand]) -> Iterator[Callable[..., Scene]]:
    """Of a server with these settings; afterwards the console must hold no error that was not expected."""
    scenes: list[Scene] = []

    def open_it(path: str = "/", *, engines: PlayedEngines | None = None, **settings: object) -> Scene:
        stand = build_stand(**settings)
        stand.service.engines = engines
        scene = Scene(window, stand, ServedApp(build_app(stand.service)).__enter__())
        scenes.append(scene)
        window.resize(1280, 900)
        window.prefer("light")
        window.open(scene.served.url + path)
        return scene

    yield open_it
    window.open("about:blank")
    for scene in scenes:
        scene.served.__exit__(None, None, None)
    messages = window.messages()
    assert len(messages) == sum(scene.expected_errors for scene in scenes), messages


def _build_stand(tokenizer: Tokenizer, text: str = "It is 42.", **settings: object) -> Stand:
    return Stand(*build_service(tokenizer, text, **settings), tokenizer)
