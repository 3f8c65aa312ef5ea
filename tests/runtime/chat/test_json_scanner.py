"""Values that arrive in pieces, against Python's own reader."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from slipstream.runtime.chat.json_scanner import JsonScanner

_PARTS = [*'{}[]",:-+.eE01 \\u9ntf', "true", "null", "false", "\n", '"a"', '": ', "1e5", "\\u00e9"]
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=8,
)


def _scanned(text: str, size: int) -> tuple[str, JsonScanner]:
    scanner, out = JsonScanner(), ""
    for start in range(0, len(text), size):
        if not scanner.done and not scanner.failed:
            out += scanner.scan(text[start : start + size], 0)[0]
    scanner.end()
    return out, scanner


@given(_VALUES, st.integers(1, 9), st.sampled_from([None, 1]))
def test_it_takes_what_json_is(value: object, size: int, indent: int | None) -> None:
    text = json.dumps(value, indent=indent)
    out, scanner = _scanned(text, size)
    assert out == text
    assert scanner.done
    assert scanner.taken == len(text)


@given(st.lists(st.sampled_from(_PARTS), max_size=12).map("".join), st.integers(1, 4))
def test_it_takes_nothing_else(text: str, size: int) -> None:
    out, scanner = _scanned(text, size)
    assert _scanned(text, len(text) or 1)[0] == out
    if scanner.done:
        json.loads(out)
        return
    try:
        json.loads(text, strict=False)
    except ValueError:
        return
    raise AssertionError(text)


def test_depth_is_bounded_and_control_characters_are_escaped() -> None:
    assert _scanned("[" * 1000, 7)[1].failed
    assert json.loads(_scanned('"a\n\t\x01"', 1)[0]) == "a\n\t\x01"
