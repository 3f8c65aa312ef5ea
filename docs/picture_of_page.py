"""Takes the README's pictures of the page of a server that runs, with ``.[dev]`` and Chromium:

slipstream serve engines/smollm2 --served-model-name SmolLM2-135M-Instruct
python docs/picture_of_page.py http://127.0.0.1:8000

The questions have seeds, so that SmolLM2-135M in 4 bits answers them in the same words each time.
"""

from __future__ import annotations

import shutil
import sys
from io import BytesIO
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

IMAGES = Path(__file__).parent / "images"
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
WIDTH, HEIGHT = 880, 500  # at least; as high as the conversation is
QUESTIONS = {
    "Write a Markdown table with two columns, Country and Capital, "
    "for France, Italy, Spain and Germany.": 11,
    "Write a Python function that reverses a string.": 2,
}


def main() -> None:
    """Write both pictures."""
    IMAGES.mkdir(exist_ok=True)
    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for scheme in SCHEMES:
            (IMAGES / f"page-{scheme}.png").write_bytes(picture(browser, sys.argv[1], scheme))
        browser.close()


def picture(browser: Browser, url: str, scheme: Literal["light", "dark"]) -> bytes:
    """A PNG of the page at ``url`` after the questions: few colours, two pixels for each of its."""
    page = browser.new_page(
        viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme, device_scale_factor=2
    )
    page.goto(url)
    for count, (question, seed) in enumerate(QUESTIONS.items(), 1):
        _ask(page, question, seed)
        expect(page.locator(".assistant .note")).to_have_count(count, timeout=120_000)
    page.get_by_label("Message").blur()
    hidden = page.locator("main").evaluate("e => e.scrollHeight - e.clientHeight")
    page.set_viewport_size({"width": WIDTH, "height": HEIGHT + hidden})
    shown = Image.open(BytesIO(page.screenshot()))
    page.close()
    file = BytesIO()
    shown.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def _ask(page: Page, question: str, seed: int) -> None:
    page.get_by_text("Parameters").click()
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_label("Message").fill(question)
    page.get_by_role("button", name="Send").click()


if __name__ == "__main__":
    main()
