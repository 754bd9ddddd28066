"""A headless Chromium for tests: chromedriver's own HTTP interface (WebDriver), as much of it as tests need.

Where there is no Chromium, tests that ask for one are skipped, unless ARGOSY_REQUIRE_BROWSER=1. Invariant: when a
``Browser`` is closed, chromedriver and all it started are gone.
"""

import base64
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import httpx
import pytest

WAIT_S = 20.0  # generous: other tests may keep the cores busy
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's name for a reference to an element
ENTER, ESCAPE, SHIFT, TAB = "\ue007", "\ue00c", "\ue008", "\ue004"
LEFT, RIGHT, DOWN = "\ue012", "\ue014", "\ue015"
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
_ALIASES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Browser:
    """One window. Elements are named by CSS selectors."""

    def __init__(self, language: str = "en-US") -> None:
        chromium, driver = find_browser()
        self._directory = tempfile.mkdtemp(prefix="argosy-browser-")
        port = _free_port()
        self._process = subprocess.Popen(
            [driver, f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "LANGUAGE": language, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
            start_new_session=True,
        )
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        self._session = ""
        try:
            self._open(chromium, language)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        try:
            if self._session:
                self._http.delete(self._session)
        finally:
            self._http.close()
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            shutil.rmtree(self._directory, ignore_errors=True)

    def open(self, url: str) -> None:
        self._post("url", url=url)

    def run(self, script: str, *arguments: object) -> object:
        """The value that a function's body returns in the page."""
        return self._post("execute/sync", script=script, args=list(arguments))

    def text(self, selector: str) -> str:
        text = self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)
        assert isinstance(text, str)
        return text

    def click(self, selector: str) -> None:
        self._post(f"element/{self._find(selector)}/click")

    def press(self, *keys: str) -> None:
        """On the keyboard, one after another, for whatever has the focus; Shift holds until the next key is up."""
        actions: list[dict[str, str]] = []
        held = ""
        for key in "".join(keys):
            actions.append({"type": "keyDown", "value": key})
            if key == SHIFT:
                held = key
                continue
            actions.append({"type": "keyUp", "value": key})
            if held:
                actions.append({"type": "keyUp", "value": held})
                held = ""
        self._post("actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def wait(self, script: str, *arguments: object, timeout_s: float = WAIT_S) -> object:
        """Until a function's body returns something true in the page; that."""
        deadline_s = time.monotonic() + timeout_s
        while not (value := self.run(script, *arguments)):
            if time.monotonic() > deadline_s:
                raise AssertionError(f"not so within {timeout_s:g} s: {script}\n{self.text('body')}")
            time.sleep(0.02)
        return value

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def prefer(self, theme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.command("Emulation.setEmulatedMedia", features=features)

    def command(self, name: str, **parameters: object) -> object:
        """Of Chromium's own protocol."""
        return self._post("goog/cdp/execute", cmd=name, params=parameters)

    def messages(self) -> list[str]:
        """Errors and warnings on the console since the last call."""
        entries = self._post("se/log", type="browser")
        assert isinstance(entries, list)
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def save_picture(self, path: Path) -> None:
        reply = self.command("Page.captureScreenshot", format="png")
        assert isinstance(reply, dict)
        path.write_bytes(base64.b64decode(reply["data"]))

    def _open(self, chromium: str, language: str) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while True:
            try:
                if self._http.get("/status").json()["value"]["ready"]:
                    break
            except httpx.TransportError:
                assert self._process.poll() is None and time.monotonic() < deadline_s, "chromedriver does not start"
                time.sleep(0.02)
        options = {
            "binary": chromium,
            "args": [*_FLAGS, f"--user-data-dir={self._directory}", f"--lang={language}"],
            "prefs": {"intl.accept_languages": language},
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        reply = self._http.post("/session", json={"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{_value_of(reply)['sessionId']}"  # type: ignore[index, call-overload]

    def _find(self, selector: str) -> str:
        found = self._post("element", using="css selector", value=selector)
        assert isinstance(found, dict)
        return found[ELEMENT]

    def _post(self, path: str, **body: object) -> object:
        return _value_of(self._http.post(f"{self._session}/{path}", json=body))


def find_browser() -> tuple[str, str]:
    """The programs; skips the test if there are none."""
    chromium = next((path for name in _ALIASES if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        reason = "chromium and chromedriver are not installed; ARGOSY_REQUIRE_BROWSER=1 makes this an error"
        if os.environ.get("ARGOSY_REQUIRE_BROWSER") == "1":
            raise RuntimeError(reason)
        pytest.skip(reason)
    return chromium, driver


def _value_of(reply: httpx.Response) -> object:
    value = reply.json()["value"]
    assert reply.is_success, f"{value.get('error')}: {value.get('message')}"
    return value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
