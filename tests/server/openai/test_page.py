"""The page at ``/`` in a real headless Chromium."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tests.server.openai.serving import Running, serving

from slipstream.runtime.testing import counting_engine

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DESKTOP = {"width": 1000, "height": 800}
PHONE = {"width": 360, "height": 640}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium; Debian's package is called chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[Running]:
    # The counting model answers any question with seven tokens.
    with serving(counting_engine(256, delay=0.15)) as running:
        yield running


def open_page(browser: Browser, server: Running, size: dict[str, int] = DESKTOP) -> Page:
    page = browser.new_page(viewport=size)  # type: ignore[arg-type]
    page.set_default_timeout(10_000)
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text("counting")
    return page


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def limit(page: Page, tokens: int) -> None:
    page.get_by_text("Parameters").click()
    page.get_by_label("Most tokens").fill(str(tokens))


def test_an_answer_is_streamed_and_measured(browser: Browser, server: Running) -> None:
    page = open_page(browser, server)
    limit(page, 5)
    ask(page, "hello")
    answer = page.locator(".assistant")
    expect(answer).to_contain_text(";")  # its first token; the others are still to come
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(answer.locator("div")).to_have_text(";!?-_")
    expect(answer.locator(".note")).to_have_text(
        re.compile(r"5 tokens · [\d.]+ tokens/s · first after [\d.]+ s · cut at the limit")
    )


def test_stop_ends_the_request(browser: Browser, server: Running) -> None:
    page = open_page(browser, server)
    ask(page, "hello")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".assistant .note")).to_contain_text("stopped")
    server.wait_idle()


def test_a_conversation_goes_on(browser: Browser, server: Running) -> None:
    page = open_page(browser, server)
    limit(page, 3)
    for count in (1, 2):
        ask(page, "hello")
        expect(page.locator(".assistant .note")).to_have_count(count)
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.post_data or ""))
    ask(page, "more")
    expect(page.locator(".assistant .note")).to_have_count(3)
    assert sent[0].count('"role":"user"') == 3
    assert sent[0].count('"role":"assistant"') == 2
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)


def test_an_error_is_shown_and_not_remembered(browser: Browser, server: Running) -> None:
    page = open_page(browser, server)
    ask(page, "x" * 400)
    expect(page.locator(".bad")).to_contain_text("256")
    limit(page, 2)
    ask(page, "hello")
    expect(page.locator(".assistant .note").last).to_contain_text("2 tokens")


def test_parameters_are_sent(browser: Browser, server: Running) -> None:
    page = open_page(browser, server)
    limit(page, 4)
    for label, value in {"Temperature": "0.5", "Top p": "0.9", "Seed": "7"}.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("System prompt").fill("be kind")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "hello")
    body = json.loads(request.value.post_data or "")
    assert (body["temperature"], body["top_p"], body["seed"]) == (0.5, 0.9, 7)
    assert body["max_completion_tokens"] == 4
    assert body["messages"][0] == {"role": "system", "content": "be kind"}
    expect(page.locator(".assistant .note")).to_contain_text("4 tokens")


def test_a_key_is_asked_for_and_used(browser: Browser) -> None:
    with serving(api_key=("secret",)) as server:
        page = browser.new_page()
        page.goto(server.url)
        expect(page.locator("#model")).to_contain_text("API key")
        page.get_by_text("Parameters").click()
        page.get_by_label("API key").fill("secret")
        page.get_by_label("API key").press("Tab")
        expect(page.locator("#model")).to_have_text("counting")


def test_it_fits_a_phone(browser: Browser, server: Running) -> None:
    page = open_page(browser, server, PHONE)
    limit(page, 100)
    ask(page, "tell me a very long story " * 5)
    expect(page.locator(".assistant .note")).to_contain_text("tokens/s")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    box = page.get_by_role("button", name="Send").bounding_box()
    assert box is not None
    assert box["x"] + box["width"] <= PHONE["width"]
    assert box["y"] + box["height"] <= PHONE["height"]


def test_nothing_comes_from_elsewhere(browser: Browser, server: Running) -> None:
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text("counting")
    assert all(url.startswith((server.url, "data:")) for url in asked)
