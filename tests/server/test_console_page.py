"""The console in a headless Chromium, over a fake pool: keyboard, streaming, stopping, errors, words, widths."""

import json
from collections.abc import Callable

import pytest

from argosy.server.errors import ApiError
from tests.helpers.browser import DOWN, ENTER, ESCAPE, RIGHT, SHIFT, TAB
from tests.helpers.played_engines import PlayedEngines
from tests.server.conftest import IS_ANSWERED

IS_READY = "return document.querySelector('#status').dataset.state === 'ready'"


def test_a_message_is_written_sent_and_answered_from_the_keyboard(open_page: Callable) -> None:
    scene = open_page()
    browser, stand = scene.browser, scene.stand
    stand.pool.is_held = True
    assert browser.run("return document.activeElement.id") == "message"
    browser.press("Hello,", SHIFT, ENTER, "how much?", ENTER)
    assert "Hello,\nhow much?" in scene.wait_for_request()
    assert browser.run("return [document.querySelector('#send').hidden, document.querySelector('#message').value]") == [
        True,
        "",
    ]
    token_ids = stand.tokenizer.encode("It is 42.")
    for number in range(1, len(token_ids) + 1):
        scene.step()
        text = stand.tokenizer.decode(token_ids[:number])
        browser.wait("return document.querySelector('.answer .text')?.textContent === arguments[0]", text)
        assert browser.run("return document.querySelector('.answer').ariaBusy") == "true"
    scene.step()
    browser.wait(IS_ANSWERED, 1)
    meta = {
        kind: browser.text(f"[data-meta={kind}]").split(" ")
        for kind in ("ttft", "rate", "tokens")  # "first token 8.1 ms", "52 tokens/s", "5 tokens"
    }
    assert float(meta["ttft"][2]) > 0 and meta["ttft"][3] == "ms"
    assert float(meta["rate"][0].replace(",", "")) > 0
    assert meta["tokens"][0] == str(len(token_ids) + 1)
    assert browser.run("return document.querySelector('#announcer').textContent") == "Answer: It is 42."
    assert browser.run("return document.activeElement.id") == "message"


def test_escape_stops_and_the_conversation_goes_on(open_page: Callable) -> None:
    scene = open_page()
    browser, stand = scene.browser, scene.stand
    stand.pool.is_held = True
    browser.press("First", ENTER)
    scene.wait_for_request()
    scene.step()
    browser.wait("return document.querySelector('.answer .text')?.textContent")
    browser.press(ESCAPE)
    browser.wait(IS_ANSWERED, 1)
    while not stand.pool.aborted:
        browser.run("return 0")
    assert browser.text("[data-meta=end]") == "stopped by you"
    kept = browser.run("return document.querySelector('.answer .text').textContent")
    assert kept and kept != "It is 42."
    browser.press("Second", ENTER)
    prompt = scene.wait_for_request()
    assert "First" in prompt and f"{kept}<" in prompt and prompt.index("First") < prompt.index("Second")
    scene.release()
    browser.wait(IS_ANSWERED, 2)
    browser.click("#new-conversation")
    assert browser.run("return document.querySelectorAll('.turn').length") == 0
    stand.pool.is_held = True
    browser.press("Third", ENTER)
    assert "First" not in scene.wait_for_request()
    browser.click("#stop")
    browser.wait(IS_ANSWERED, 1)


def test_settings_reach_the_model_and_reasoning_stands_apart(open_page: Callable) -> None:
    scene = open_page(text="Six times seven.</think>It is 42.")
    browser, stand = scene.browser, scene.stand
    stand.pool.is_held = True
    fields = {"temperature": "0.5", "top_p": "0.9", "top_k": "7", "max_tokens": "99", "seed": "11"}
    for name, value in {"system": "Be brief.", **fields}.items():
        browser.run("document.getElementById(arguments[0]).focus()", name)
        browser.press(value)
    browser.click("#thinking")
    browser.run("document.getElementById('message').focus()")
    browser.press("How much?", ENTER)
    prompt = scene.wait_for_request()
    assert "Be brief." in prompt and prompt.endswith("<think>")
    (running,) = stand.pool.running.values()
    params = running.request.sampling_params
    assert [getattr(params, name) for name in fields] == [0.5, 0.9, 7, 99, 11]
    for _ in range(3):
        scene.step()
    browser.wait("return document.querySelector('.reasoning')?.open")
    scene.release()
    browser.wait(IS_ANSWERED, 1)
    assert browser.run("return document.querySelector('.reasoning .text').textContent") == "Six times seven."
    assert browser.run("return document.querySelector('.answer-body > .text').textContent") == "It is 42."
    assert browser.run("return document.querySelector('.reasoning').open") is False


def test_errors_are_the_servers_words_at_the_field_at_fault(open_page: Callable) -> None:
    scene = open_page()
    scene.expected_errors = 1  # the answer 400
    browser = scene.browser
    browser.run("document.getElementById('temperature').value = '3000'")
    browser.press("Hello", ENTER)
    browser.wait(IS_ANSWERED, 1)
    assert browser.text(".error").startswith("temperature: Input should be less than or equal to 100")
    assert browser.run("return document.querySelector('[aria-invalid=true]').id") == "temperature"
    browser.run("document.getElementById('temperature').value = 'warm'")
    browser.click(".error button")
    browser.wait("return document.querySelector('.error')?.textContent.startsWith('Temperature: “warm” is not')")
    browser.run("document.getElementById('temperature').value = '0'")
    browser.click(".error button")
    browser.wait("return document.querySelector('.answer .text')?.textContent === 'It is 42.'")
    assert browser.run("return document.querySelectorAll('.turn').length") == 1
    assert browser.run("return document.querySelector('[aria-invalid=true]')") is None


def test_an_error_in_the_stream_is_shown_behind_what_came(open_page: Callable) -> None:
    scene = open_page(admin_api_key="admin")
    browser, stand = scene.browser, scene.stand
    stand.pool.is_held = True
    browser.press("Hello", ENTER)
    scene.wait_for_request()
    scene.step()
    browser.wait("return document.querySelector('.answer .text')?.textContent")
    scene.served.call(lambda: [each.feed.fail(_lost()) for each in stand.service.board._entries.values()])
    browser.wait(IS_ANSWERED, 1)
    assert browser.text(".error").startswith("the engine is lost")
    assert browser.text(".answer .text") and browser.text(".request-id").startswith("Request ")


def test_what_a_model_writes_is_never_markup(open_page: Callable) -> None:
    text = "<img src=x onerror=alert(1)><b>bold</b>"
    scene = open_page(text=text)
    browser = scene.browser
    browser.press("Hello <i>you</i>", ENTER)
    browser.wait(IS_ANSWERED, 1)
    assert browser.run("return document.querySelector('.answer .text').textContent") == text
    assert browser.run("return document.querySelectorAll('.turn img, .turn b, .turn i').length") == 0
    for script in ("document.body.innerHTML = '<b>'", "document.body.setAttribute('onclick', 'x')"):
        assert browser.run(f"try {{ {script}; return false }} catch (error) {{ return error.name }}") == "TypeError"
    scene.expected_errors = 2  # the policy says so on the console


def test_a_key_is_asked_for_and_kept_in_the_tab(open_page: Callable) -> None:
    scene = open_page(api_key=("secret-key",), engines=PlayedEngines())
    browser = scene.browser
    browser.wait("return !document.querySelector('#key-bar').hidden")
    scene.expected_errors = 1  # the answer 401
    browser.run("document.querySelector('#key-field').focus()")
    browser.press("secret-key", ENTER)
    browser.wait(IS_READY)
    assert browser.run("return document.querySelector('#key-bar').hidden")
    browser.run("document.querySelector('#message').focus()")
    browser.press("Hello", ENTER)
    browser.wait("return document.querySelector('.answer .text')?.textContent === 'It is 42.'")
    assert browser.run("return [Object.values(sessionStorage), Object.values(localStorage)]") == [["secret-key"], []]


def test_languages(open_page: Callable) -> None:
    scene = open_page(engines=PlayedEngines())
    browser = scene.browser
    browser.press("Hello", ENTER)
    browser.wait(IS_ANSWERED, 1)
    words = browser.run("return WORDS")
    assert isinstance(words, dict) and words["en"].keys() == words["zh"].keys()
    assert browser.run("return document.documentElement.lang") == "en"
    browser.click("#language")
    assert browser.run("return document.documentElement.lang") == "zh-Hans"
    shown = browser.run(
        "return [...document.querySelectorAll('[data-word]')].map((e) => [e.dataset.word, e.innerText])"
    )
    assert isinstance(shown, list) and len(shown) > 40
    only_english = [name for name, text in shown if text and text.isascii() and words["en"][name] != words["zh"][name]]
    assert not only_english
    assert browser.text("#send") == "发送" and browser.text(".answer .who") == "模型"
    browser.open(scene.served.url)
    assert browser.text("#to-deployment") == "部署"
    browser.run("localStorage.clear()")
    agent = browser.run("return navigator.userAgent")
    browser.command("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage="zh-CN")
    browser.open(scene.served.url)
    assert browser.text("#send") == "发送"
    browser.command("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage="en-US")


def test_themes(open_page: Callable) -> None:
    scene = open_page()
    browser = scene.browser
    background = "return getComputedStyle(document.body).backgroundColor"
    light = browser.run(background)
    browser.prefer("dark")
    browser.wait(f"{background} !== arguments[0]", light)
    dark = browser.run(background)
    browser.click("#theme")
    assert browser.run(background) == light
    browser.open(scene.served.url)
    assert browser.run(background) == light
    browser.click("#theme")
    assert browser.run(background) == dark
    for name in ("soft", "ink", "accent", "warm"):
        assert browser.run(CONTRAST, f"--{name}") >= 4.5


def test_the_focus_goes_through_the_page_in_reading_order(open_page: Callable) -> None:
    scene = open_page()
    browser = scene.browser
    browser.run("document.getElementById('skip').focus()")
    order = [browser.run("return document.querySelector('a, button, input, textarea, summary, [tabindex]').id")]
    for _ in range(18):
        browser.press(TAB)
        order.append(browser.run("return document.activeElement.id || document.activeElement.className"))
        outline = browser.run(
            "const e = document.activeElement.closest('.writing') ?? document.activeElement;"
            "const s = getComputedStyle(e); return s.outlineStyle !== 'none' || s.borderColor"
        )
        assert outline
    expected = ["skip", "to-playground", "to-deployment", "key-button", "language", "theme", *["sample"] * 3]
    expected += [
        "message",
        "send",
        "new-conversation",
        "",
        "system",
        "tools",
        "thinking",
        "temperature",
        "max_tokens",
        "top_p",
    ]
    assert order == expected


@pytest.mark.parametrize("width", [360, 1600])
def test_it_fits(open_page: Callable, width: int) -> None:
    engines = PlayedEngines(dp_size=4, tp_size=4, ep_size=16, nnodes=2, num_layers=58, num_experts=256)
    scene = open_page(engines=engines, text="A very long word: " + 60 * "abcdefgh")
    browser = scene.browser
    browser.resize(width, 800)
    browser.run("document.getElementById('message').value = arguments[0]", 300 * "x")
    browser.press(ENTER)
    browser.wait(IS_ANSWERED, 1)
    for view in ("playground", "deployment"):
        browser.click(f"#to-{view}")
        browser.wait("return !document.getElementById(`${arguments[0]}-view`).hidden", view)
        if view == "deployment":
            browser.wait("return document.querySelectorAll('#heat-layers span').length === 58")
        assert browser.run("return document.documentElement.scrollWidth") <= width
        outside = browser.run(
            "return [...document.querySelectorAll('button, input, textarea, nav a')].filter((e) => {"
            "  const { left, right } = e.getBoundingClientRect();"
            "  return e.checkVisibility() && (right > arguments[0] || left < 0);"
            "}).map((e) => e.id)",
            width,
        )
        assert outside == []


def test_the_deployment_is_drawn_with_its_numbers(open_page: Callable) -> None:
    engines = PlayedEngines(dp_size=4, tp_size=2, ep_size=4, num_engines=2, states={})
    scene = open_page("/#deployment", engines=engines)
    browser = scene.browser
    browser.wait("return document.querySelectorAll('.rank').length === 8")
    places = browser.run("return [...document.querySelectorAll('.rank')].map((e) => e.innerText.split(/\\s+/))")
    assert isinstance(places, list)
    assert places[5] == ["5", "Ready", "dp", "2", "tp", "1", "ep", "1", "process", "5005", "sent", "1.0", "GB"]
    assert browser.text("#figure-running") == str(12 + 13 + 14 + 15) and browser.text("#figure-waiting") == "6"
    assert browser.text("#figure-prefix") == "25%" and browser.text("#figure-cache") == "32%"
    steps = sorted(sum(engines.steps, []))
    assert browser.text("#figure-step") == f"{500 * (steps[191] + steps[192]):.0f} ms"
    assert browser.run("return document.querySelectorAll('#steps canvas').length") == 4
    assert browser.run(COUNT_COLORS, "#steps canvas") >= 3  # nothing, work, dummies
    engines.states[1] = "restarting"
    browser.wait("return document.querySelectorAll('.rank[data-state=restarting]').length === 4")
    assert browser.text("#status-text") == "Restarting" and "engine 1 (pid 4001) died" in browser.text("#engines")


def test_the_heat_map_shows_and_reads_every_expert(open_page: Callable) -> None:
    engines = PlayedEngines(dp_size=2, tp_size=2, ep_size=4, num_layers=3, num_experts=16)
    scene = open_page("/#deployment", engines=engines)
    browser = scene.browser
    browser.wait("return document.querySelectorAll('#heat-layers span').length === 3")
    loads = [sum((rank[layer] for rank in engines.loads), []) for layer in range(3)]
    ratios = [max(line) * 16 / sum(line) for line in loads]
    assert browser.text("#heat-imbalance").split() == [f"{ratio:.2f}×" for ratio in ratios]
    worst = ratios.index(max(ratios))
    busiest = loads[worst].index(max(loads[worst]))
    label = browser.run("return document.querySelector('#heat-map').getAttribute('aria-label')")
    assert isinstance(label, str) and f"Most uneven: layer {worst}, {ratios[worst]:.2f}×" in label
    colors = browser.run(READ_CELLS)
    assert isinstance(colors, list)
    assert colors[worst][busiest] == browser.run("return parseColor(color('heat-top'))")
    order = sorted(range(16), key=lambda expert: loads[0][expert])
    assert len({json.dumps(each) for line in colors for each in line}) > 30
    assert _distance(colors[0][order[0]], colors[0][order[1]]) < _distance(colors[0][order[0]], colors[0][order[-1]])
    browser.run("document.querySelector('#heat-map').focus()")
    browser.press(RIGHT, RIGHT, *[RIGHT] * 5, DOWN)
    mean = sum(loads[1]) / 16
    assert browser.text("#heat-readout") == (
        f"Layer 1, expert 6: {loads[1][6]:,} tokens, {loads[1][6] / mean:.2f}× the mean (ep rank 1)"
    )
    browser.run("document.querySelector('label[for=span-minute]').click()")
    browser.wait("return document.querySelector('#experts').hidden")  # nothing new came meanwhile
    for rank in engines.loads:
        rank[2][0] += 4
    browser.wait("return !document.querySelector('#experts').hidden")
    assert browser.text("#heat-imbalance").split() == ["1.00×", "1.00×", "4.00×"]


CONTRAST = """
const style = getComputedStyle(document.documentElement);
const light = (name) => parseColor(style.getPropertyValue(name).trim())
  .map((part) => part / 255).map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
  .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
const [one, two] = [light(arguments[0]), light('--paper')].sort((a, b) => b - a);
return (one + 0.05) / (two + 0.05);
"""
COUNT_COLORS = """
const canvas = document.querySelector(arguments[0]);
const pixels = new Uint32Array(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.buffer);
return new Set(pixels).size;
"""
# The colour in the middle of each cell, by layer and expert.
READ_CELLS = """
const canvas = document.querySelector('#heat-map');
const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
return heatMap.tokens.map((counts, layer) => counts.map((_, expert) => {
  const [left, width] = heatMap.column(expert);
  const x = Math.round((left + width / 2) * devicePixelRatio);
  const y = Math.round((layer + 0.5) * heatMap.rowHeight * devicePixelRatio);
  return [...data.slice(4 * (y * canvas.width + x), 4 * (y * canvas.width + x) + 3)];
}));
"""


def _distance(one: list[int], two: list[int]) -> float:
    return sum((a - b) ** 2 for a, b in zip(one, two, strict=True)) ** 0.5


def _lost() -> ApiError:
    return ApiError(503, "the engine is lost")
