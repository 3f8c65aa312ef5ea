"""The page at ``/`` in a real headless Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from typing import Any

import httpx
import pytest
from docs.picture_of_page import WIDTH, picture
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect
from tests.server.devices import GatedDevice, engine_on
from tests.server.openai.serving import Running, check_aborted, serving

from slipstream.runtime.sampling.params import INTERACTIVE, SamplingParams
from slipstream.runtime.testing import counting_engine

WAIT = 50_000  # milliseconds: less than a test may take
expect.set_options(timeout=WAIT)

DESKTOP = {"width": 1000, "height": 800}
PHONE = {"width": 360, "height": 640}
ANSWER = """Three **rivers**:

1. The *Danube*
   - flows into the Black Sea, which is a long way from its source in the Black Forest
2. The Rhine

| River | Length | Mouth | Where it comes from | What it is called there |
| :-- | --: | --- | --- | --- |
| Danube | 2,850 km | Black Sea | Donaueschingen | Donau |
| Rhine | 1,233 km | North Sea | Lake Toma | Rhein |

```python
def length(river: str) -> int:
    return {"Danube": 2850, "Rhine": 1233, "Loire": 1006, "Ebro": 930, "Tagus": 1007}[river]
```
"""
# What would run, or tell somebody that it was looked at, if it were HTML.
HOSTILE = """<script>window.ran = 1</script> <img src="/ran.png" onerror="window.ran = 1">

<iframe src="javascript:parent.ran = 1"></iframe> <svg onload="window.ran = 1"><style>* {color: red}

[a](javascript:window.ran=1) [b](data:text/html,<script>1</script>) <javascript:alert(1)>
[c](JaVaScRiPt:window.ran=1) [d]( vbscript:x ) ![e](http://127.0.0.1:9/spy.png) [f](/ran)

| <b onclick="window.ran = 1">x</b> | y |
| --- | --- |
| `<script>window.ran = 1</script>` | z |

```html" onload="window.ran = 1
<script>window.ran = 1</script>
```
"""


@pytest.fixture(scope="module")
def slow_server() -> Iterator[Running]:
    # The counting model answers any question with seven tokens.
    with serving(counting_engine(256, delay=0.15)) as running:
        yield running


def open_page(
    browser: Browser, server: Running, size: dict[str, int] = DESKTOP, scheme: str = "light"
) -> Page:
    page = browser.new_page(viewport=size, color_scheme=scheme)  # type: ignore[arg-type]
    page.set_default_timeout(WAIT)
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text(server.service.names[0])
    return page


def answer_with(page: Page, text: str) -> None:
    """Have the server's next answers be ``text``, a token for every five characters."""
    parts = [text[start : start + 5] for start in range(0, len(text), 5)]
    chunks: list[dict[str, Any]] = [
        {
            "choices": [{"index": 0, "delta": {"content": part}}],
            "usage": {"prompt_tokens": 30, "completion_tokens": count},
        }
        for count, part in enumerate(parts, 1)
    ]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"

    def fulfill(route: Route) -> None:
        route.fulfill(content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", fulfill)


def luminance(page: Page, selector: str, field: str) -> float:
    """How bright a colour of an element is, 0 to 255."""
    color: str = page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{field}")
    red, green, blue = map(float, re.findall(r"[\d.]+", color)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def limit(page: Page, tokens: int) -> None:
    page.get_by_text("Parameters").click()
    page.get_by_label("Most tokens").fill(str(tokens))


def test_an_answer_is_streamed_and_measured(browser: Browser) -> None:
    device = GatedDevice()
    with serving(engine_on(device)) as server, device:
        page = open_page(browser, server)
        limit(page, 5)
        device.permits.release()
        ask(page, "hello")
        answer = page.locator(".assistant")
        expect(answer).to_contain_text(";")  # its first token; the others are still to come
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        device.permits.release(10)
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        expect(answer.locator("div")).to_have_text(";!?-_")
        expect(answer.locator(".note")).to_have_text(
            re.compile(r"5 tokens · [\d.]+ tokens/s · first after [\d.]+ s · cut at the limit")
        )


def test_stop_ends_the_request(browser: Browser) -> None:
    device = GatedDevice()
    with serving(engine_on(device)) as server, device:
        page = open_page(browser, server)
        device.permits.release()
        ask(page, "hello")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".assistant .note")).to_contain_text("stopped")
        check_aborted(server, device)


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


def test_an_impossible_parameter_is_shown_and_not_sent(browser: Browser, server: Running) -> None:
    page = open_page(browser, server)
    page.get_by_text("Parameters").click()
    page.get_by_label("Temperature").fill("5")
    page.keyboard.press("Escape")
    expect(page.get_by_label("Temperature")).to_be_hidden()
    ask(page, "hello")
    expect(page.get_by_label("Temperature")).to_be_focused()
    expect(page.locator(".turn")).to_have_count(0)
    page.get_by_label("Temperature").fill("1")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".assistant .note")).to_contain_text("tokens")


def test_a_key_is_asked_for_and_used(browser: Browser) -> None:
    with serving(api_key=("secret",)) as server:
        page = browser.new_page()
        page.goto(server.url)
        expect(page.locator("#model")).to_contain_text("API key")
        page.get_by_text("Parameters").click()
        page.get_by_label("API key").fill("secret")
        page.get_by_label("API key").press("Tab")
        expect(page.locator("#model")).to_have_text("counting")


def test_it_fits_a_phone(browser: Browser, slow_server: Running) -> None:
    page = open_page(browser, slow_server, PHONE)
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_list_a_table_and_code_are_shown_as_such(
    browser: Browser, server: Running, size: dict[str, int], scheme: str
) -> None:
    page = open_page(browser, server, size, scheme)
    answer_with(page, ANSWER)
    ask(page, "Three rivers?")
    expect(page.locator(".assistant .note")).to_contain_text("tokens/s")
    answer = page.locator(".assistant > div")
    expect(answer.locator("strong")).to_have_text("rivers")
    expect(answer.locator("ol > li")).to_have_count(2)
    expect(answer.locator("ol > li em")).to_have_text("Danube")
    expect(answer.locator("ol > li > ul > li")).to_contain_text("Black Sea")
    expect(answer.locator("th").nth(1)).to_have_css("text-align", "right")
    expect(answer.locator("tbody tr").nth(1).locator("td").first).to_have_text("Rhine")
    expect(answer.locator("figcaption span")).to_have_text("python")
    expect(answer.locator("pre")).to_contain_text("def length(river: str) -> int:\n    return")
    # What is too wide scrolls in its own box.
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
    for box in (".table", "pre"):
        found = answer.locator(box).bounding_box()
        assert found is not None and found["x"] >= 0
        assert found["x"] + found["width"] <= size["width"]
    assert page.locator("main").evaluate("e => e.scrollWidth <= e.clientWidth")
    back, text = luminance(page, "body", "backgroundColor"), luminance(page, "pre", "color")
    assert (back < 64 and text > 192) if scheme == "dark" else (back > 192 and text < 64)


def test_code_is_copied(browser: Browser, server: Running) -> None:
    page = open_page(browser, server)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer_with(page, "```sh\necho one\n  echo `two`\n```\nand so on")
    ask(page, "how?")
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "echo one\n  echo `two`"


def test_code_is_copied_where_a_page_has_no_clipboard(browser: Browser, server: Running) -> None:
    page = open_page(browser, server)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer_with(page, "```\na plain page\n```")
    ask(page, "how?")
    page.evaluate("window.kept = navigator.clipboard; "
                  "Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # fmt: skip
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("kept.readText()") == "a plain page"


def test_nothing_of_what_a_model_wrote_is_run_or_fetched(browser: Browser, server: Running) -> None:
    page = open_page(browser, server)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    answer_with(page, HOSTILE)
    ask(page, "attack")
    expect(page.locator(".assistant .note")).to_contain_text("tokens/s")
    answer = page.locator(".assistant > div")
    expect(answer).to_contain_text('<script>window.ran = 1</script> <img src="/ran.png"')
    expect(answer).to_contain_text("[a](javascript:window.ran=1)")
    names = answer.evaluate("e => [...e.querySelectorAll('*')].map((node) => node.localName)")
    assert set(names) <= {"p", "br", "a", "code", "pre", "figure", "figcaption", "span", "button",
                          "div", "table", "thead", "tbody", "tr", "th", "td"}  # fmt: skip
    links = answer.locator("a").evaluate_all("all => all.map((a) => [a.textContent, a.href])")
    assert links == [["e", "http://127.0.0.1:9/spy.png"]]  # to be followed, or not
    assert asked == [f"{server.url}/v1/chat/completions"]
    assert page.evaluate("window.ran") is None


@pytest.mark.parametrize(
    "way",
    [
        "document.body.innerHTML = '<img src=x onerror=\"window.ran = 1\">'",
        "document.body.setAttribute('onclick', 'window.ran = 1'); document.body.click()",
        "eval('window.ran = 1')",
        "const s = document.createElement('script'); s.append('window.ran = 1'); "
        "document.body.append(s)",
        "const s = document.createElement('script'); s.src = 'data:text/javascript,window.ran=1'; "
        "document.body.append(s)",
        "location.href = 'javascript:window.ran = 1'",
    ],
)
def test_the_policy_runs_no_script_that_is_not_the_servers(
    browser: Browser, server: Running, way: str
) -> None:
    page = open_page(browser, server)
    # In the page's own hands: what Playwright evaluates is beyond the policy.
    page.evaluate(
        f"new Promise((end) => setTimeout(() => {{ try {{ {way} }} finally {{ end() }} }}))"
    )
    page.evaluate("new Promise((end) => setTimeout(end, 50))")
    assert page.evaluate("window.ran") is None


def test_speed_and_context_stay_in_sight(browser: Browser, slow_server: Running) -> None:
    page = open_page(browser, slow_server, PHONE)
    expect(page.locator("#context")).to_contain_text("context 0 of 256")
    limit(page, 5)
    ask(page, "hello")
    expect(page.locator(".assistant .note")).to_contain_text("5 tokens")
    expect(page.locator("#speed")).to_have_text(re.compile(r"^[\d.]+ tokens/s$"))
    # The template makes ten tokens of the question.
    expect(page.locator("#context")).to_contain_text("context 15 of 256")
    assert page.locator("meter").evaluate("e => [e.value, e.max]") == [15, 256]
    for part in ("#speed", "#context"):
        expect(page.locator(part)).to_be_in_viewport(ratio=1)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#context")).to_contain_text("context 0 of 256")
    expect(page.locator("#speed")).to_have_text("\N{EN DASH} tokens/s")


@pytest.mark.parametrize(
    ("defaults", "shown"),
    [
        (INTERACTIVE, "temperature 0.7 · top p 0.95 · min p 0.05"),
        ({"temperature": 0.6, "top_k": 20, "min_p": 0}, "temperature 0.6 · top k 20"),
        ({"temperature": 0}, "greedy"),
    ],
)
def test_how_it_samples_is_shown_sent_and_changed(
    browser: Browser, defaults: dict[str, float], shown: str
) -> None:
    params = SamplingParams(**defaults)  # type: ignore[arg-type]
    with serving(replace(counting_engine(), interactive_defaults=params)) as server:
        page = open_page(browser, server, PHONE)
        expect(page.locator("#sampling")).to_have_text(shown)
        assert page.locator("#sampling").evaluate("e => e.scrollWidth <= e.clientWidth")
        limit(page, 2)
        expect(page.get_by_label("Temperature")).to_have_attribute(
            "placeholder", f"{params.temperature:g}"
        )
        with page.expect_request("**/v1/chat/completions") as request:
            ask(page, "hello")
        body = json.loads(request.value.post_data or "")
        names = ("temperature", "top_p", "min_p", "top_k")
        assert {name: body[name] for name in names} == {
            name: getattr(params, name) for name in names
        }
        # What is sampled may end the answer before its limit.
        told = "2 tokens" if shown == "greedy" else re.compile("[12] tokens?")
        expect(page.locator(".assistant .note")).to_contain_text(told)
        page.get_by_text("Parameters").click()
        page.get_by_label("Temperature").fill("1.2")
        expect(page.locator("#sampling")).to_contain_text("temperature 1.2")


def test_the_interface_itself_keeps_openais_defaults() -> None:
    calm = SamplingParams(**INTERACTIVE)  # type: ignore[arg-type]
    with serving(replace(counting_engine(), interactive_defaults=calm)) as server:
        assert server.llm.generation_defaults.temperature == 0
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        answers = [server.post("/v1/chat/completions", body).json() for _ in range(2)]
        assert [a["choices"][0]["message"]["content"] for a in answers] == [";!?-"] * 2


def test_a_long_name_of_a_model_fits_a_phone(browser: Browser) -> None:
    with serving(served_model_name=("a-model-with-quite-a-long-name-" * 4,)) as server:
        page = open_page(browser, server, PHONE)
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        box = page.get_by_role("button", name="New chat").bounding_box()
        assert box is not None and box["x"] + box["width"] <= PHONE["width"]


def test_its_parts_need_no_key_and_nothing_else_is_given(server: Running) -> None:
    with serving(api_key=("secret",)) as guarded:
        for path in ("/", "/page/page.css", "/page/chat.js", "/page/markdown.js"):
            answer = httpx.get(guarded.url + path, timeout=60)
            assert answer.status_code == 200
            assert "script-src 'self'" in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert httpx.get(guarded.url + "/page/settings", timeout=60).status_code == 401
    for name in ("routes.py", "__init__.py", "..%2Fapi.py", "%2e%2e%2fapi.py"):
        assert httpx.get(f"{server.url}/page/{name}", timeout=60).status_code == 404


def test_its_picture_for_the_readme_can_be_taken(browser: Browser, server: Running) -> None:
    raw = picture(browser, server.url, "dark")
    image = Image.open(BytesIO(raw))
    assert image.format == "PNG" and image.width == 2 * WIDTH
    assert len(raw) < 75_000
