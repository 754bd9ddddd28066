"""The console over a real server of two ranks: an answer from the keyboard, and the deployment's own numbers."""

import os
import time

import httpx
import pytest

from tests.helpers.browser import DOWN, ENTER, RIGHT, Browser, find_browser
from tests.server.test_serve import start

pytestmark = [pytest.mark.processes, pytest.mark.e2e]


def test_the_console_of_a_real_deployment() -> None:
    find_browser()  # else the server would be started to be skipped
    served = start("--dp", "2")
    browser = Browser()
    try:
        browser.open(served.url)
        browser.run("document.getElementById('temperature').value = '0'")
        browser.press("17 + 25 = ?", ENTER)
        answer = browser.wait("return document.querySelector('.answer[aria-busy=false] .text')?.textContent")
        assert isinstance(answer, str) and answer.endswith("42")
        browser.click("#to-deployment")
        told = _wait_for_counters(served.url)
        loads = told["experts"]["tokens"]
        busy, idle = sorted(told["replicas"], key=lambda replica: replica["num_dummy_steps"])
        assert busy["num_dummy_steps"] == 0 and len(loads) == 4 and len(loads[0]) == 32
        browser.wait("return JSON.stringify(latest.experts?.tokens) === JSON.stringify(arguments[0])", loads)
        assert [len(replica["recent_steps"]) for replica in (busy, idle)] == [
            busy["num_steps"],
            idle["num_dummy_steps"],
        ]
        browser.run("document.querySelector('#heat-map').focus()")
        browser.press(RIGHT, RIGHT, DOWN)
        assert browser.text("#heat-readout").startswith(f"Layer 1, expert 1: {loads[1][1]:,} tokens")
        shown = browser.text("#heat-imbalance").split()
        assert shown == [f"{32 * max(layer) / sum(layer):.2f}×" for layer in loads]
        pids = [rank["pid"] for rank in told["ranks"]]
        assert len(set(pids)) == 2 and all(os.path.exists(f"/proc/{pid}") for pid in pids)
        assert all(f"process {pid}" in browser.text("#nodes") for pid in pids)
        assert browser.text("#figure-step").endswith(" ms")
        assert browser.messages() == []
    finally:
        browser.close()
        assert served.stop() == 0


def _wait_for_counters(url: str) -> dict:
    """``/deployment`` once the experts' counters have caught up: they are told at a slower beat.

    Each token goes to 8 experts of each layer: prompt, answer, and one for every dummy step.
    """
    deadline_s = time.monotonic() + 20
    while True:
        told: dict = httpx.get(f"{url}/deployment").json()
        num_tokens = sum(each["num_scheduled_tokens"] + each["num_dummy_steps"] for each in told["replicas"])
        sums = [sum(layer) for layer in told["experts"]["tokens"]]
        if num_tokens and sums == [8 * num_tokens] * len(sums):
            return told
        assert time.monotonic() < deadline_s, (num_tokens, sums)
        time.sleep(0.1)
