"""The playground in a real headless Chromium: several models side by side, with the keyboard, and hostile texts."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from browser import Page, browsing
from reviews import HOSTILE
from serving import Serving, serving
from test_report_page import CONTRAST
from tiny import tiny_tokenizer
from tunegate.serve.jobs import Job

ANSWERS = {
    None: "I am a base.\n\nI talk 你好 a lot.",
    "b3:support": "card_arrival",
    "b3:hostile": HOSTILE[0] + HOSTILE[2],
}
CTRL = 2


def says(job: Job) -> str:
    return ANSWERS.get(job.adapter, "other")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(autouse=True)
def clean(page: Page) -> Iterator[None]:
    page.requests.clear()
    page.errors.clear()
    yield
    page.call("Page.navigate", url="about:blank")


@pytest.fixture
def server() -> Iterator[Serving]:
    with serving(tiny_tokenizer(), says) as found:
        yield found


def opened(page: Page, server: Serving) -> None:
    page.open(server.url + "/")
    page.wait("document.querySelectorAll('.pick').length > 1 && !!document.querySelector('.state.good')")


def ask(page: Page, text: str) -> None:
    page.js("document.querySelector('#prompt').focus()")
    page.type(text)
    for kind in ("rawKeyDown", "keyUp"):
        page.call(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, modifiers=CTRL
        )


def answered(page: Page) -> list[str]:
    page.wait("document.querySelectorAll('.card').length > 0 && !document.querySelector('.running')")
    found: list[str] = page.js("[...document.querySelectorAll('.card .text')].map((text) => text.textContent)")
    return found


def test_base_and_adapter_side_by_side(page: Page, server: Serving) -> None:
    opened(page, server)
    assert page.js("document.activeElement.id") == "prompt"
    assert page.js("document.querySelector('#send').disabled")
    ask(page, "Where is my card?")
    assert answered(page) == [ANSWERS[None], ANSWERS["b3:support"]]
    said = page.js("[...document.querySelectorAll('.card')].map((card) => card.innerText)")
    assert all("tokens/s" in text and "ms to the first text" in text for text in said)
    assert ["base" in said[0], "ship" in said[1]] == [True, True]
    hashes = page.js("[...document.querySelectorAll('.hash')].map((hash) => hash.title)")
    assert hashes == ["b3:base", "b3:support"]
    assert "card_arrival" in page.js("document.querySelector('#spoken').textContent")
    job = server.engine.jobs[-1]
    assert "Where is my card?" in tiny_tokenizer().decode(job.tokens) and job.picking.temperature == 0
    assert all(url.startswith(server.url) for url in page.requests) and not page.errors


def test_models_are_chosen_with_the_keyboard(page: Page, server: Serving) -> None:
    server.catalogue._served["third"] = server.catalogue._made("third", "hold (override: a demo)", "/c")
    opened(page, server)
    page.js("document.activeElement.blur()")
    page.keys("1", "3")  # the base out, the third one in
    assert page.js("[...document.querySelectorAll('.pick :checked')].map((box) => box.value)") == ["support", "third"]
    page.keys("?")
    assert page.js("document.querySelector('#keys').open")
    page.keys("Escape", "/")
    page.wait("document.activeElement.id === 'prompt'")
    ask(page, "1?/")  # in the field, keys are text
    assert answered(page) == ["card_arrival", "other"]
    assert page.js("document.querySelector('#prompt').value").endswith("1?/")
    assert page.js("document.querySelector('.card .chip.hold').textContent") == "hold (override: a demo)"


def test_sampling_and_system_prompt_are_sent(page: Page, server: Serving) -> None:
    opened(page, server)
    page.click("summary")
    page.js("document.querySelector('#system').focus()")
    page.type("Be brief.")
    for name, value in (("temperature", "0.5"), ("tokens", "3"), ("seed", "7")):
        page.js(f"document.querySelector('#{name}').value = '{value}'")
    page.click("#picks input[value=support]")
    ask(page, "hello")
    answered(page)
    job = server.engine.jobs[-1]
    assert (job.picking.temperature, job.picking.seed, job.max_new_tokens, job.adapter) == (0.5, 7, 3, None)
    assert "system\nBe brief." in tiny_tokenizer().decode(job.tokens)
    assert "cut off" in page.js("document.querySelector('.figures').textContent")


def test_answers_can_be_stopped(page: Page, server: Serving) -> None:
    server.engine.pause = 0.2
    opened(page, server)
    ask(page, "hello")
    page.wait("[...document.querySelectorAll('.card .text')].some((text) => text.textContent)")
    page.keys("Escape")
    assert all(len(text) < 12 for text in answered(page))
    assert "stopped" in page.js("document.querySelector('.figures').textContent")
    until = time.monotonic() + 10
    while server.engine.running and time.monotonic() < until:
        time.sleep(0.02)
    assert server.engine.cancelled == 2


def test_what_fails_is_said(page: Page, server: Serving) -> None:
    opened(page, server)
    page.js("document.querySelector('#tokens').value = '100000'")
    ask(page, "hello")
    assert "longer than the context" in answered(page)[0]
    page.js("document.querySelector('#tokens').value = '100'")
    server.engine.dies_after = 3
    ask(page, " again")
    page.wait("document.querySelectorAll('.wrong').length >= 3")
    assert all("engine ended" in text for text in answered(page))
    server.engine.alive = False
    page.js("refresh()")
    page.wait("!!document.querySelector('.state.bad')")


def test_a_server_with_a_key_asks_for_it(page: Page) -> None:
    def guarded(app: Any) -> Any:
        async def guard(scope: Any, receive: Any, send: Any) -> None:
            headers = dict(scope.get("headers") or ())
            if scope["path"].startswith("/v1/") and headers.get(b"authorization") != b"Bearer secret":
                await send({"type": "http.response.start", "status": 401, "headers": []})
                await send({"type": "http.response.body", "body": b"{}"})
            else:
                await app(scope, receive, send)

        return guard

    with serving(tiny_tokenizer(), says, around=guarded) as server:
        page.open(server.url + "/")
        page.wait("!document.querySelector('#lock').hidden")
        page.js("document.querySelector('#key').focus()")
        page.type("secret")
        page.key("Tab")
        page.wait("document.querySelectorAll('.pick').length > 1")
        ask(page, "hello")
        assert answered(page)[1] == "card_arrival"


def test_hostile_texts_are_text(page: Page, server: Serving) -> None:
    made = server.catalogue._made("hostile", HOSTILE[1], HOSTILE[0])
    server.catalogue._served[HOSTILE[0]] = dataclasses.replace(made, name=HOSTILE[0])
    opened(page, server)
    page.click("#picks .pick:nth-child(3) input")
    ask(page, HOSTILE[3])
    assert answered(page)[2] == ANSWERS["b3:hostile"]
    assert page.js("document.querySelectorAll('main img, main script, #owned').length") == 0
    assert page.js("document.title") == "Playground" and not page.errors


def test_many_models_are_found_by_name(page: Page, server: Serving) -> None:
    for n in range(1000):
        server.catalogue._served[f"adapter-{n}"] = server.catalogue._made(f"adapter-{n}", "ship", "/a")
    opened(page, server)
    assert page.js("document.querySelectorAll('.pick').length") == 60
    page.js("document.querySelector('#filter').focus()")
    page.type("adapter-77")
    assert page.js("document.querySelectorAll('.pick').length") == 11
    for n in range(1, 7):
        page.click(f"#picks .pick:nth-child({n}) input")
    ask(page, "hello")
    assert len(answered(page)) == 8  # more than a browser asks at once


@pytest.mark.parametrize("width", [380, 1280])
def test_long_texts_stay_in_their_place(page: Page, server: Serving, width: int) -> None:
    long = "w" * 300 + " \u05e9\u05dc\u05d5\u05dd " * 20
    server.engine.script = lambda job: long
    name = "an-adapter-with-a-name-that-does-not-end-" * 3
    server.catalogue._served[name] = server.catalogue._made(name, "hold (override: " + "why " * 30 + ")", "/c")
    page.resize(width, 860)
    opened(page, server)
    page.click("#picks .pick:nth-child(3) input")
    ask(page, "w" * 2000)
    answered(page)
    assert page.js("document.documentElement.scrollWidth <= innerWidth")
    page.resize(1280, 860)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read(page: Page, server: Serving, scheme: str) -> None:
    """WCAG AA: 4.5 to 1 between text and what is behind it."""
    for standing in ("hold (override: x)", "unverified"):
        server.catalogue._served[standing[:4]] = server.catalogue._made(standing[:4], standing, "/c")
    page.scheme(scheme)
    opened(page, server)
    page.js("document.activeElement.blur()")
    page.keys("3", "4")
    page.click("summary")
    ask(page, "hello")
    answered(page)
    page.wait("document.getAnimations().length === 0")
    selectors = (
        ".pick span, .chip, .text, .figures span, .figures b, .hash, h1, h2, legend, summary, .field, .main, .state"
    )
    found = page.js(CONTRAST % json.dumps(selectors))
    page.scheme("light")
    assert len(found) > 25
    assert all(ratio >= 4.5 for _, ratio in found), [pair for pair in found if pair[1] < 4.5]
