"""One JSON value that arrives in pieces: how much of it is valid so far."""

from __future__ import annotations

import re
from collections.abc import Callable

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_SPACE = re.compile(r"[ \t\n\r]*")
_HEX = frozenset("0123456789abcdefABCDEF")
_DEEPEST = 128  # Python's own reader ends at about a thousand
_DIGITS = "0123456789"
# A number, character by character: by state, the characters that lead to the next.
_NUMBER = {
    "": {"-": "-", "0": "0", **dict.fromkeys("123456789", "1")},
    "-": {"0": "0", **dict.fromkeys("123456789", "1")},
    "0": {".": ".", "e": "e", "E": "e"},
    "1": {".": ".", "e": "e", "E": "e", **dict.fromkeys(_DIGITS, "1")},
    ".": dict.fromkeys(_DIGITS, ".1"),
    ".1": {"e": "e", "E": "e", **dict.fromkeys(_DIGITS, ".1")},
    "e": {"+": "e+", "-": "e+", **dict.fromkeys(_DIGITS, "e1")},
    "e+": dict.fromkeys(_DIGITS, "e1"),
    "e1": dict.fromkeys(_DIGITS, "e1"),
}
_WHOLE_NUMBERS = ("0", "1", ".1", "e1")
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


class JsonScanner:
    """Takes a value in pieces of any size; linear in its length.

    ``done``: the value is whole. ``failed``: what comes next cannot belong to it; ``taken``: how
    many characters did. Control characters within strings, which models write and JSON forbids,
    are escaped.
    """

    __slots__ = ("_expected", "_stack", "_state", "done", "failed", "taken")

    def __init__(self) -> None:
        """Begin before the value; space may come first."""
        self._stack: list[str] = []
        self._state: Callable[[str, int], int] = self._value
        self._expected = ""  # of a word, a number or an escape
        self.done = False
        self.failed = False
        self.taken = 0

    def scan(self, text: str, at: int) -> tuple[str, int]:
        """The valid JSON from ``at`` on, and where in ``text`` it ends."""
        start, out = at, ""
        self.taken -= at
        while at < len(text) and not self.done and not self.failed:
            if self._state in (self._string, self._key) and text[at] < " ":
                out += text[start:at] + _ESCAPES.get(text[at], f"\\u{ord(text[at]):04x}")
                at = start = at + 1
            else:
                at = self._state(text, at)
        self.taken += at
        return out + text[start:at], at

    def end(self) -> None:
        """Nothing follows: a number is whole if it can be."""
        if self._state == self._number and not self._stack:
            self.done = self._expected in _WHOLE_NUMBERS

    def _value(self, text: str, at: int) -> int:
        at = _end_of_space(text, at)
        char = text[at : at + 1]
        if char == '"':
            self._state = self._string
        elif char in ("{", "["):
            return self._open(char, at)
        elif char in ("t", "f", "n"):
            self._state = self._word
            self._expected = {"t": "rue", "f": "alse", "n": "ull"}[char]
        elif char in _NUMBER[""] and char:
            self._state, self._expected = self._number, _NUMBER[""][char]
        elif char:
            return self._fail(at)
        return at + len(char)

    def _open(self, bracket: str, at: int) -> int:
        if len(self._stack) == _DEEPEST:
            return self._fail(at)
        self._stack.append(bracket)
        self._state = self._first_key if bracket == "{" else self._first_element
        return at + 1

    def _first_key(self, text: str, at: int) -> int:
        at = _end_of_space(text, at)
        return self._close(at) if text[at : at + 1] == "}" else self._next_key(text, at)

    def _next_key(self, text: str, at: int) -> int:
        at = _end_of_space(text, at)
        return self._character(text, at, '"', self._key)

    def _first_element(self, text: str, at: int) -> int:
        at = _end_of_space(text, at)
        return self._close(at) if text[at : at + 1] == "]" else self._value(text, at)

    def _colon(self, text: str, at: int) -> int:
        return self._character(text, _end_of_space(text, at), ":", self._value)

    def _after(self, text: str, at: int) -> int:
        at = _end_of_space(text, at)
        inner = self._stack[-1]
        if text[at : at + 1] == ("}" if inner == "{" else "]"):
            return self._close(at)
        return self._character(text, at, ",", self._next_key if inner == "{" else self._value)

    def _string(self, text: str, at: int) -> int:
        return self._within_string(text, at, self._string)

    def _key(self, text: str, at: int) -> int:
        return self._within_string(text, at, self._key)

    def _within_string(self, text: str, at: int, state: Callable[[str, int], int]) -> int:
        match = _PLAIN.match(text, at)
        assert match is not None
        at = match.end()
        char = text[at : at + 1]
        if char == "\\":
            self._state = self._escape if state == self._string else self._escape_in_key
        elif char == '"' and state == self._string:
            self._end_value()
        elif char == '"':
            self._state = self._colon
        elif char:
            return at  # a control character
        return at + len(char)

    def _escape(self, text: str, at: int) -> int:
        return self._within_escape(text, at, self._string)

    def _escape_in_key(self, text: str, at: int) -> int:
        return self._within_escape(text, at, self._key)

    def _within_escape(self, text: str, at: int, back: Callable[[str, int], int]) -> int:
        char = text[at]
        if self._expected:  # so many digits
            good, self._expected = char in _HEX, self._expected[1:]
        elif char == "u":
            good, self._expected = True, "0000"
        else:
            good = char in '"\\/bfnrt'
        if not good:
            return self._fail(at)
        if not self._expected:
            self._state = back
        return at + 1

    def _word(self, text: str, at: int) -> int:
        if text[at] != self._expected[0]:
            return self._fail(at)
        self._expected = self._expected[1:]
        if not self._expected:
            self._end_value()
        return at + 1

    def _number(self, text: str, at: int) -> int:
        following = _NUMBER[self._expected].get(text[at])
        if following is not None:
            self._expected = following
            return at + 1
        if self._expected not in _WHOLE_NUMBERS:
            return self._fail(at)
        self._end_value()
        return at

    def _end_value(self) -> None:
        self._expected = ""
        self._state = self._after
        self.done = not self._stack

    def _close(self, at: int) -> int:
        self._stack.pop()
        self._end_value()
        return at + 1

    def _character(self, text: str, at: int, char: str, then: Callable[[str, int], int]) -> int:
        if at == len(text):
            return at
        if text[at] != char:
            return self._fail(at)
        self._state = then
        return at + 1

    def _fail(self, at: int) -> int:
        self.failed = True
        return at


def _end_of_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()
