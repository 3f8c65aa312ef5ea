"""Thoughts, calls of tools and JSON on the page, in a real headless Chromium."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from playwright.sync_api import Browser, Page, Route, expect
from tests.server.openai.serving import Running
from tests.server.openai.test_page import ask, open_page

HOSTILE = "<img src=/ran.png onerror='window.ran = 1'> [a](javascript:window.ran=1)"
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def answer_with(
    page: Page, deltas: Sequence[dict[str, Any]], reason: str = "stop"
) -> list[dict[str, Any]]:
    """Have the server's next answers be these; returns the requests as they will come."""
    asked: list[dict[str, Any]] = []
    chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"

    def fulfill(route: Route) -> None:
        asked.append(json.loads(route.request.post_data or ""))
        route.fulfill(content_type="text/event-stream", body=body)

    page.unroute_all()
    page.route("**/v1/chat/completions", fulfill)
    return asked


def call(index: int, arguments: str, **begun: Any) -> dict[str, Any]:  # noqa: ANN401
    """The delta of a call that begins, or goes on."""
    function = {"arguments": arguments, **({"name": begun["name"]} if begun else {})}
    named = {"id": begun["id"], "type": "function"} if begun else {}
    return {"tool_calls": [{"index": index, **named, "function": function}]}


def test_thoughts_are_folded_and_not_sent_back(browser: Browser, server: Running) -> None:
    page = open_page(browser, server)
    thoughts = [{"reasoning_content": "Let me *see*.\n"}, {"reasoning_content": HOSTILE}]
    asked = answer_with(page, [*thoughts, {"content": "It is **blue**."}])
    ask(page, "why?")
    expect(page.locator(".assistant > div strong")).to_have_text("blue")
    folded = page.locator(".assistant details")
    expect(folded.locator("summary")).to_have_text("Thoughts")
    expect(folded.locator("p")).to_be_hidden()
    folded.locator("summary").click()
    expect(folded.locator("p")).to_be_visible()
    assert folded.locator("p").text_content() == f"Let me *see*.\n{HOSTILE}"
    assert folded.locator("p *").count() == 0 and page.evaluate("window.ran") is None
    ask(page, "and?")
    expect(page.locator(".assistant > div")).to_have_count(2)
    expect(page.locator(".assistant > div").last).to_have_text("It is blue.")
    assert asked[1]["messages"][1] == {"role": "assistant", "content": "It is **blue**."}


def test_an_answer_without_thoughts_has_no_fold(browser: Browser, server: Running) -> None:
    page = open_page(browser, server)
    answer_with(page, [{"content": "yes"}])
    ask(page, "so?")
    expect(page.locator(".assistant > div")).to_have_text("yes")
    expect(page.locator(".assistant details, .assistant .call")).to_have_count(0)


def test_calls_are_shown_and_the_next_message_answers_them(
    browser: Browser, server: Running
) -> None:
    page = open_page(browser, server)
    page.get_by_text("Parameters").click()
    page.get_by_label("Tools").fill(json.dumps(TOOLS))
    page.keyboard.press("Escape")
    begun = call(0, "", id="call_1", name="weather")
    hostile = call(1, HOSTILE, id="call_2", name="<b>x</b>")
    asked = answer_with(
        page, [begun, call(0, '{"city":'), call(0, ' "Oslo"}'), hostile], "tool_calls"
    )
    ask(page, "rain?")
    shown = page.locator(".assistant .call")
    expect(shown).to_have_count(2)
    expect(shown.first.locator("figcaption")).to_have_text("calls weather")
    expect(shown.first.locator("pre")).to_have_text('{"city": "Oslo"}')
    expect(shown.last.locator("figcaption")).to_have_text("calls <b>x</b>")
    expect(shown.last.locator("pre")).to_have_text(HOSTILE)
    assert shown.locator("figcaption *, pre *").count() == 0
    expect(page.locator(".assistant .note")).to_contain_text("your next message is what")
    assert asked[0]["tools"] == TOOLS
    later = answer_with(page, [{"content": "Yes."}])
    ask(page, "it rains")
    expect(page.locator(".assistant > div").last).to_have_text("Yes.")
    _, calls, *answers = later[0]["messages"]
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert calls["tool_calls"][0] == {"id": "call_1", "type": "function", "function": function}
    assert answers == [
        {"role": "tool", "tool_call_id": name, "content": "it rains"}
        for name in ("call_1", "call_2")
    ]


def test_calls_that_are_cut_off_are_not_remembered(browser: Browser, server: Running) -> None:
    page = open_page(browser, server)
    answer_with(page, [call(0, '{"ci', id="call_1", name="weather")], "length")
    ask(page, "rain?")
    expect(page.locator(".assistant .note")).to_contain_text("cut at the limit")
    asked = answer_with(page, [{"content": "Hello."}])
    ask(page, "hi")
    expect(page.locator(".assistant > div").last).to_have_text("Hello.")
    assert asked[0]["messages"] == [{"role": "user", "content": "hi"}]


def test_answers_can_be_held_to_json(browser: Browser, server: Running) -> None:
    page = open_page(browser, server)
    asked = answer_with(page, [{"content": '{"a": "*b*'}, {"content": ' `c`"}'}])
    ask(page, "free")
    expect(page.locator(".assistant em")).to_have_text("b")
    page.get_by_text("Parameters").click()
    page.get_by_label("Answer in JSON").check()
    page.keyboard.press("Escape")
    ask(page, "held")
    held = page.locator(".assistant").last
    expect(held.locator("pre")).to_have_text('{"a": "*b* `c`"}')
    assert [body.get("response_format") for body in asked] == [None, {"type": "json_object"}]
    assert "tools" not in asked[0]


def test_tools_that_are_no_json_are_shown_and_not_sent(browser: Browser, server: Running) -> None:
    page = open_page(browser, server)
    page.get_by_text("Parameters").click()
    page.get_by_label("Tools").fill("[{")
    page.keyboard.press("Escape")
    ask(page, "hello")
    expect(page.get_by_label("Tools")).to_be_focused()
    expect(page.locator(".turn")).to_have_count(0)
