"""What a JSON body holds, told from its bytes."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from slipstream.server.core.http.structure import JsonSize

TEXTS = st.text(alphabet='a,:[]{}"\\\\é\n', max_size=6)
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def counted(value: object) -> tuple[int, int]:
    """Commas, and lists, objects and fields."""
    if not isinstance(value, list | dict):
        return 0, 0
    inner = [counted(item) for item in (value.values() if isinstance(value, dict) else value)]
    fields = len(value) if isinstance(value, dict) else 0
    commas = max(0, len(value) - 1)
    return commas + sum(c for c, _ in inner), 1 + fields + sum(k for _, k in inner)


@given(value=VALUES, sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), ascii=st.booleans())
def test_values_and_keys_are_counted_in_any_pieces(
    value: object, sizes: list[int], ascii: bool
) -> None:
    body, size = json.dumps(value, ensure_ascii=ascii).encode(), JsonSize()
    at, turn = 0, 0
    while at < len(body):
        step = sizes[turn % len(sizes)]
        size.feed(body[at : at + step])
        at, turn = at + step, turn + 1
    assert (size.values, size.keys) == counted(value)
