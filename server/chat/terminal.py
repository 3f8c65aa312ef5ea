"""Where a chat reads and writes: a terminal, or plain streams."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import click

from slipstream.server.chat.markdown import MarkdownStream, Segment
from slipstream.server.text import echo_answer, printable, without_controls

_QUOTES = '"""'
_HISTORY_LINES = 1000


class Terminal(Protocol):
    """The user's side of a chat."""

    def read(self) -> str:
        """The next message or command; ``EOFError`` when there is none."""

    def write(self, text: str) -> None:
        """More of an answer."""

    def think(self, text: str) -> None:
        """More of the thoughts before it."""

    def call(self, text: str) -> None:
        """A call of a tool, with which the answer ends."""

    def end_answer(self) -> None:
        """The answer is complete but for calls."""

    def notice(self, text: str) -> None:
        """Say something that is no answer."""

    def close(self) -> None:
        """Keep what is to be kept."""


class PlainTerminal:
    """Reads lines of standard input and writes answers and calls alone to standard output."""

    def __init__(self) -> None:
        self._thinks = False

    def read(self) -> str:
        """The next message or command."""
        return read_message(_read_stdin_line)

    def write(self, text: str) -> None:
        """More of an answer."""
        self._end_thoughts()
        echo_answer(text, nl=False)

    def think(self, text: str) -> None:
        """Say it on stderr."""
        self._thinks = True
        click.echo(printable(text, keep="\n\t"), err=True, nl=False)

    def call(self, text: str) -> None:
        """A line."""
        echo_answer(text)

    def end_answer(self) -> None:
        """End the line."""
        self._end_thoughts()
        click.echo()

    def _end_thoughts(self) -> None:
        if self._thinks:
            click.echo(err=True)
        self._thinks = False

    def notice(self, text: str) -> None:
        """Say something on stderr."""
        click.echo(printable(text, keep="\n"), err=True)

    def close(self) -> None:
        """Nothing is kept."""


class RichTerminal:
    """Line editing with a history that lasts, and answers with their Markdown styled."""

    def __init__(self, history: Path) -> None:
        # Imported here because rich is slow to import and a plain chat does not need it.
        from rich.console import Console

        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._markdown = MarkdownStream()
        self._history = history
        self._thinks = False
        _load_history(history)

    def read(self) -> str:
        """The next message or command."""
        return read_message(_read_edited_line)

    def write(self, text: str) -> None:
        """More of an answer; what could steer the terminal is shown, not obeyed."""
        self._end_thoughts()
        for segment in self._markdown.feed(without_controls(text)):
            self._print(segment)
        self._console.file.flush()

    def think(self, text: str) -> None:
        """More of the thoughts, dimmed."""
        self._thinks = True
        self._print((without_controls(text), "dim italic"))
        self._console.file.flush()

    def call(self, text: str) -> None:
        """A line that stands out."""
        self._console.print(without_controls(text), style="cyan")

    def end_answer(self) -> None:
        """End the line and leave one empty."""
        self._end_thoughts()
        for segment in self._markdown.finish():
            self._print(segment)
        self._markdown = MarkdownStream()
        self._console.print("\n")

    def notice(self, text: str) -> None:
        """Say something in a dim voice."""
        self._console.print(printable(text, keep="\n"), style="dim")

    def close(self) -> None:
        """Write the history."""
        _save_history(self._history)

    def _end_thoughts(self) -> None:
        if self._thinks:
            self._console.print("\n")
        self._thinks = False

    def _print(self, segment: Segment) -> None:
        text, style = segment
        self._console.print(text, style=style, end="")


def create_terminal() -> Terminal:
    """What fits standard input and output."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return RichTerminal(history_file())
    return PlainTerminal()


def history_file() -> Path:
    """``$XDG_STATE_HOME/slipstream/chat_history``, by default under ``~/.local/state``."""
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "slipstream" / "chat_history"


def read_message(read_line: Callable[[bool], str]) -> str:
    '''One line, or several between """ and """.

    ``read_line`` is told whether it reads on in a message of several lines.
    '''
    line = read_line(False).strip()
    if not line.startswith(_QUOTES):
        return line
    text = line.removeprefix(_QUOTES)
    while _QUOTES not in text:
        text += "\n" + read_line(True)
    return text.partition(_QUOTES)[0].strip("\n")


def _read_stdin_line(more: bool) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _read_edited_line(more: bool) -> str:
    return input("... " if more else ">>> ")


def _load_history(file: Path) -> None:
    try:
        import readline  # its import gives input() line editing; Windows has its own

        readline.set_history_length(_HISTORY_LINES)
        readline.read_history_file(file)
    except (ImportError, OSError):
        return  # the first chat, or a history that cannot be read


def _save_history(file: Path) -> None:
    try:
        import readline

        file.parent.mkdir(parents=True, exist_ok=True)
        readline.write_history_file(file)
    except (ImportError, OSError):
        return  # a chat that cannot keep its history is still a chat
