"""Links, paths, commands and code in README.md and docs/ are real."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from slipstream.server import cli
from slipstream.server.command import resolve

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS]
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()}
ROOT_FILES = {"setup.py", "pyproject.toml", "README.md", "Makefile", "Dockerfile"}

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_COMMAND = re.compile(r"(?:\$ )?(slipstream(?:-build)?(?: .*)?)")
_PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*/?")
_END_OF_COMMAND = ("|", ">", "&&", "||", ";", "&", "\\")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of the fenced blocks."""
    yield from _FENCE.findall(page.read_text(encoding="utf-8"))


def commands() -> Iterator[tuple[str, bool]]:
    """Every command shown: the line, and whether it stands in running text."""
    for page in PAGES:
        lines = [line for line in prose(page).splitlines() if line.startswith("    ")]
        for language, text in blocks(page):
            if language not in ("python", "cpp", "json"):
                lines += text.replace("\\\n", " ").splitlines()
        for line in lines:
            if match := _COMMAND.fullmatch(line.strip()):
                yield match[1], False
        for span in _SPAN.findall(prose(page)):
            if match := _COMMAND.fullmatch(span):
                first, *others = match[1].split(" / ")  # `slipstream build / chat` names two
                yield first, True
                yield from ((f"slipstream {other}", True) for other in others)


def anchors(page: Path) -> set[str]:
    """The fragments by which GitHub names a page's headings."""
    headings = _HEADING.findall(prose(page))
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@each_page
def test_links_resolve(page: Path) -> None:
    links = [link for link in _LINK.findall(prose(page)) if not re.match(r"\w+:", link)]
    for link in links:
        name, _, fragment = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{link} leads nowhere"
        assert not fragment or fragment in anchors(target), f"{link}: no such heading"


@each_page
def test_named_paths_exist(page: Path) -> None:
    spans = {span for span in _SPAN.findall(prose(page)) if _PATH.fullmatch(span)}
    paths = {
        span
        for span in spans
        if span in ROOT_FILES or ("/" in span and span.split("/")[0] in FOLDERS)
    }
    missing = [path for path in sorted(paths) if not any(ROOT.glob(path.rstrip("/")))]
    assert not missing, f"named but not there: {', '.join(missing)}"


@pytest.mark.parametrize(("line", "in_text"), sorted(set(commands())))
def test_commands_parse(line: str, in_text: bool) -> None:
    words = shlex.split(line, comments=True)
    end = next((i for i, word in enumerate(words) if word in _END_OF_COMMAND), len(words))
    program, *words = words[:end]
    command: click.Command = cli.slipstream
    if program == "slipstream-build":
        command = resolve("slipstream.server.commands.build:build")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"{line!r}: there is no command {name}"
        command = found
    if in_text and not words:
        return  # only the command's name
    try:
        command.make_context(line, words)
    except click.UsageError as error:
        pytest.fail(f"{line!r}: {error.format_message()}")
    except click.exceptions.Exit:
        pass  # --help and --version


@each_page
def test_python_compiles(page: Path) -> None:
    for language, text in blocks(page):
        if language == "python":
            compile(text, str(page), "exec")


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_a_page_says_when_to_update_it(page: Path) -> None:
    title, blank, second, *_ = page.read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ") and not blank
    assert re.match(r"\*(Update|Generated)", second), f"{page.name} starts with {second!r}"


def test_pictures_of_the_readme_are_there_and_small() -> None:
    names = re.findall(r'(?:src|srcset)="([^"]+)"', (ROOT / "README.md").read_text())
    assert len(names) == 2
    assert sum((ROOT / name).stat().st_size for name in names) < 150_000
