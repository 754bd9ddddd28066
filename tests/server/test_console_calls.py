"""Tool calls in the console's playground, in a headless Chromium over a fake pool."""

import json
from collections.abc import Callable

from argosy.models.deepseek.encoding import (
    CALLS_END,
    CALLS_START,
    INVOKE_END,
    INVOKE_START,
    PARAMETER_END,
    PARAMETER_START,
)
from tests.helpers.browser import ENTER
from tests.server.conftest import IS_ANSWERED

TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
READ_CALLS = """
const texts = (call) => [...call.querySelectorAll('code, pre')].map((part) => part.textContent);
return [...document.querySelectorAll('.call')].map(texts);
"""


def write_calls(name: str, values: list[str]) -> str:
    """As the model writes them."""
    parameters = [f'{PARAMETER_START} name="key" string="true">{value}{PARAMETER_END}' for value in values]
    calls = "".join(f'{INVOKE_START} name="{name}">\n{each}\n{INVOKE_END}\n' for each in parameters)
    return f"\n\n{CALLS_START}\n{calls}{CALLS_END}"


def test_tool_calls_are_shown_as_they_come_and_kept(open_page: Callable) -> None:
    values = ['<img src=x onerror="alert(1)">', "7"]
    scene = open_page(text="I will look." + write_calls("look_up", values))
    browser, stand = scene.browser, scene.stand
    stand.pool.is_held = True
    browser.run("document.getElementById('tools').value = arguments[0]", json.dumps(TOOLS))
    browser.press("What is it?", ENTER)
    assert '"look_up"' in scene.wait_for_request()
    while browser.run("return document.querySelectorAll('.call').length") == 0:
        scene.step()
    assert len(browser.run(READ_CALLS)) == 1
    assert browser.run("return document.querySelector('.answer').ariaBusy") == "true"
    scene.release()
    browser.wait(IS_ANSWERED, 1)
    assert [[name, json.loads(text)] for name, text in browser.run(READ_CALLS)] == [
        ["look_up", {"key": value}] for value in values
    ]
    assert browser.run("return document.querySelector('.answer-body > .text').textContent") == "I will look."
    assert browser.run("return document.querySelectorAll('.turn img').length") == 0
    assert browser.run("return document.querySelector('#announcer').textContent").count("Tool call look_up") == 2
    stand.pool.is_held = True
    browser.press("And now?", ENTER)
    assert write_calls("look_up", values) in scene.wait_for_request()
    scene.release()
    browser.wait(IS_ANSWERED, 2)


def test_a_call_alone_is_an_answer_and_its_name_is_text(open_page: Callable) -> None:
    scene = open_page(text=write_calls("<b>f</b>", ["1"]))
    browser, stand = scene.browser, scene.stand
    browser.run("document.getElementById('tools').value = arguments[0]", json.dumps(TOOLS))
    browser.press("Hello", ENTER)
    browser.wait(IS_ANSWERED, 1)
    assert browser.run(READ_CALLS) == [["<b>f</b>", '{"key": "1"}']]
    assert browser.run("return document.querySelectorAll('.turn b').length") == 0
    stand.pool.is_held = True
    browser.press("More", ENTER)
    assert "Hello" in scene.wait_for_request()
    scene.release()
    browser.wait(IS_ANSWERED, 2)


def test_arguments_that_come_in_pieces_are_joined(open_page: Callable) -> None:
    browser = open_page().browser
    shown = browser.run(
        "const view = new AnswerView('x'); document.querySelector('#turns').append(view.turn);"
        "const take = (index, f, id) => view.take({ tool_calls: [{ index, id, function: f }] });"
        "take(0, { name: 'f', arguments: '' }, 'a'); take(0, { arguments: '{\"k\"' }); take(0, { arguments: ': 1}' });"
        "take(1, { name: 'g', arguments: '{}' }, 'b'); return view.message"
    )
    calls = [("a", "f", '{"k": 1}'), ("b", "g", "{}")]
    expected = [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in calls]
    assert shown == {"role": "assistant", "content": "", "tool_calls": expected}
    assert browser.run(READ_CALLS) == [["f", '{"k": 1}'], ["g", "{}"]]


def test_tools_that_are_no_json_are_told_at_their_field(open_page: Callable) -> None:
    scene = open_page()
    browser = scene.browser
    browser.run("document.getElementById('tools').value = '[{'")
    browser.press("Hello", ENTER)
    browser.wait(IS_ANSWERED, 1)
    assert browser.text(".error").startswith("Tools: this is not JSON")
    assert browser.run("return document.querySelector('[aria-invalid=true]').id") == "tools"
    browser.run("document.getElementById('tools').value = '{}'")
    scene.expected_errors = 1  # the answer 400
    browser.click(".error button")
    browser.wait("return document.querySelector('.error')?.textContent.startsWith('tools: ')")
    assert browser.run("return document.querySelector('[aria-invalid=true]').id") == "tools"
