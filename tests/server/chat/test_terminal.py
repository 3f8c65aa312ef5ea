from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from slipstream.server import text
from slipstream.server.chat.terminal import (
    PlainTerminal,
    RichTerminal,
    Terminal,
    history_file,
    read_message,
)

Q = '"""'


def read(*lines: str) -> tuple[str, list[bool]]:
    """The message, and what was asked for with each line."""
    asked: list[bool] = []
    rest = iter(lines)

    def read_line(more: bool) -> str:
        asked.append(more)
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    return read_message(read_line), asked


def test_a_line_is_a_message() -> None:
    assert read("  hello ") == ("hello", [False])


@pytest.mark.parametrize(
    "lines",
    [(f"{Q}one", f"two{Q}"), (Q, "one", "two", Q), (f"{Q}one", "two", f"{Q} ignored")],
)
def test_quotes_enclose_several_lines(lines: tuple[str, ...]) -> None:
    text, asked = read(*lines)
    assert text == "one\ntwo"
    assert asked == [False] + [True] * (len(lines) - 1)


def test_indentation_inside_is_kept() -> None:
    assert read(Q, "def f():", "    return 1", Q)[0] == "def f():\n    return 1"


def test_quotes_may_open_and_close_in_one_line() -> None:
    assert read(f"{Q}one{Q}") == ("one", [False])


def test_the_end_inside_quotes_is_the_end() -> None:
    with pytest.raises(EOFError):
        read(Q, "one")


def test_the_history_is_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert history_file() == Path("/state/slipstream/chat_history")
    monkeypatch.setenv("XDG_STATE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert history_file() == Path("/home/me/.local/state/slipstream/chat_history")


def test_a_notice_shows_what_it_quotes_and_obeys_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    PlainTerminal().notice("the template refused: \x1b[2Jx\nsecond")
    assert capsys.readouterr().err == "the template refused: \\x1b[2Jx\nsecond\n"


@pytest.mark.parametrize("kind", ["plain", "rich"])
def test_an_answer_steers_no_terminal(
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(text, "sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))
    terminal: Terminal = PlainTerminal() if kind == "plain" else RichTerminal(tmp_path / "history")
    terminal.think("\x1b]0;thought\x07")
    terminal.write("\x1b]0;title\x07\x9b31mred\rover\x08\x7f 👩‍💻")
    terminal.end_answer()
    shown = r"\x1b]0;title\x07\x9b31mred\x0dover\x08\x7f 👩‍💻"
    out, err = capsys.readouterr()
    thoughts, answer = (err, out) if kind == "plain" else out.split("\n\n", 1)
    assert thoughts.strip() == r"\x1b]0;thought\x07"
    assert answer.strip() == shown
    terminal.call("f(\x1b[2J)")
    assert capsys.readouterr().out == "f(\\x1b[2J)\n"
