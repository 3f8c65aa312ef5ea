"""The page's renderer of Markdown, in a real browser: what it builds, and that it does so in linear
time and depth whatever a model writes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page
from tests.server.openai.serving import Running

SHOW = """async (texts) => {
    const {MarkdownView} = await import("/page/markdown.js");
    const target = document.createElement("div"), view = new MarkdownView(target);
    for (const text of texts) view.show(text);
    return target;
}"""
HTML = f"async (texts) => (await ({SHOW})(texts)).innerHTML"
# Random pieces, shown as they come and at once: both must be alike, and all text must be there.
GROWING = (
    """async ([pieces, rounds]) => {
    const show = SHOW, wrong = [];
    let state = 1;
    const random = (below) => (state = (state * 48271) % 2147483647) % below;
    for (let round = 0; round < rounds; round++) {
        const texts = [""];
        for (let count = random(14); count >= 0; count--) {
            texts.push(texts.at(-1) + pieces[random(pieces.length)]);
        }
        const [grown, whole] = [await show(texts), await show(texts.slice(-1))];
        const words = (text) => (text.match(/word/g) ?? []).length;
        const isWhole = words(texts.at(-1)) === words(whole.textContent);
        if (grown.innerHTML !== whole.innerHTML || !isWhole) wrong.push(texts.at(-1));
    }
    return wrong;
}"""
).replace("SHOW", SHOW)
PIECES = ["word", " ", "\n", "\n\n", "*", "**", "_", "~~", "`", "```", "\n```py\n", "- ", "\n- ",
          "\n  - ", "1. ", "\n2) ", "> ", "\n> ", "#", "\n## ", "|", "\n|---|:-:|\n", "word|word",
          "[word](", "https://x.y/z", ")", "](", "![", "<", ">", "\\", "---", "\n---\n", "    ",
          "\t", "[ ] ", "\n- [x] ", "é", "😀", "\r\n"]  # fmt: skip


@pytest.fixture(scope="module")
def page(browser: Browser, server: Running) -> Iterator[Page]:
    page = browser.new_page()
    page.goto(server.url)
    yield page
    page.close()


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
        ("# One #\n### Three", "<h2>One</h2><h4>Three</h4>"),
        ("#hashtag", "<p>#hashtag</p>"),
        ("a **b _c_** ~~d~~ `e*f*`", "<p>a <strong>b <em>c</em></strong> <del>d</del> "
         "<code>e*f*</code></p>"),
        ("***both*** snake_case_name 2 * 3 * 4", "<p><em><strong>both</strong></em> "
         "snake_case_name 2 * 3 * 4</p>"),
        (r"\*not\* ``a ` b``", "<p>*not* <code>a ` b</code></p>"),
        ("- a\n- b\n  - c\n\n    d\n- e", "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p>"
         "<p>d</p></li></ul></li><li><p>e</p></li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'),
        # As models write them: a list less far in than it should be, and code between numbers.
        ("1. a\n  - b\n2. c", '<ol start="1"><li><p>a</p><ul><li><p>b</p></li></ul></li>'
         "<li><p>c</p></li></ol>"),
        ("1. a\n\n2. b", '<ol start="1" class="loose"><li><p>a</p></li><li><p>b</p></li></ol>'),
        ("text:\n* a\n* b", "<p>text:</p><ul><li><p>a</p></li><li><p>b</p></li></ul>"),
        ("> a\n> - b\n\nc", "<blockquote><p>a</p><ul><li><p>b</p></li></ul></blockquote><p>c</p>"),
        ("a\n\n---\nb", "<p>a</p><hr><p>b</p>"),
        ("[a *b*](https://x.y/z_(1) \"t\").", '<p><a href="https://x.y/z_(1)" title='
         '"https://x.y/z_(1)" target="_blank" rel="noopener noreferrer">a <em>b</em></a>.</p>'),
        ("[a](/b) [1] ![c", "<p>[a](/b) [1] ![c</p>"),
        ("(https://x.y/z).", '<p>(<a href="https://x.y/z" title="https://x.y/z" target="_blank" '
         'rel="noopener noreferrer">https://x.y/z</a>).</p>'),
        ("a<br>b &lt; <b>", "<p>a<br>b &amp;lt; &lt;b&gt;</p>"),
        ("a | b", "<p>a | b</p>"),
    ],
)  # fmt: skip
def test_markdown_becomes_elements(page: Page, text: str, html: str) -> None:
    assert page.evaluate(HTML, [text]) == html


def test_tables_align_their_columns_and_may_hold_signs(page: Page) -> None:
    html = page.evaluate(HTML, ["a | b\n:-: | --\n`x\\|y` | 1<br>2 | 3\n| only |\n\nend"])
    assert html == (
        '<div class="table"><table><thead><tr><th style="text-align: center;">a</th>'
        '<th style="text-align: left;">b</th></tr></thead><tbody><tr>'
        '<td style="text-align: center;"><code>x|y</code></td>'
        '<td style="text-align: left;">1<br>2</td></tr><tr>'
        '<td style="text-align: center;">only</td></tr></tbody></table></div><p>end</p>'
    )


@pytest.mark.parametrize(
    ("text", "language", "code"),
    [
        ("```python title\n  a\n\n```\n", "python", "  a\n"),
        ("~~~\n```\n~~~", "", "```"),
        ("```\nstill open\n``", "", "still open\n``"),
        ("- a\n\n  ```c\n    b\n  ```", "c", "  b"),
        ("    indented\n\n      more\n\nend", "", "indented\n\n  more"),
    ],
)
def test_code_keeps_every_character(page: Page, text: str, language: str, code: str) -> None:
    found = page.evaluate(
        f"async (texts) => {{ const made = await ({SHOW})(texts); return "
        '["figcaption span", "pre"].map((name) => made.querySelector(name).textContent) }',
        [text],
    )
    assert found == [language, code]


def test_a_growing_text_is_shown_as_the_whole_is(page: Page) -> None:
    assert page.evaluate(GROWING, [PIECES, 1500]) == []


@pytest.mark.parametrize(
    "piece",
    ["*a ", "a* ", "**a_b ", "_a*b_ ", "[", "[a](", "](", "`" * 3 + "a", "``a`", "<", "~~a", "> ",
     "- ", " ", "\\", "|", "|-", "a|\n", "\n", "- a\n", "#", " # ", "*" * 7, "[a](https://x.y ", "http://",
     "(https://a)))", "![a](https://x.y/)", "1. ", "    a\n", "<br", "```\n", "- - ",
     "| a |\n|---|\n"],
)  # fmt: skip
def test_no_text_takes_long_or_nests_deep(page: Page, piece: str) -> None:
    """120,000 characters: what took time by their square would take minutes."""
    page.set_default_timeout(60_000)
    deep = f"""async (text) => {{
        const made = await ({SHOW})([text]);
        let most = 0;
        for (const leaf of made.querySelectorAll("*")) {{
            if (leaf.childElementCount) continue;
            let depth = 0;
            for (let at = leaf; at !== made; at = at.parentElement) depth++;
            most = Math.max(most, depth);
        }}
        return most;
    }}"""
    assert page.evaluate(deep, piece * (120_000 // len(piece))) <= 50
