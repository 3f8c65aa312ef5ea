"""JSON of answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
# Elements of a list that are written at once: the encoder holds the interpreter's lock meanwhile.
_PART = 64


def dump(value: Any) -> bytes:  # noqa: ANN401 - JSON
    """Compact JSON in UTF-8; long lists of a few objects' fields are written part by part."""
    return "".join(_pieces(value)).encode()


def _pieces(value: Any) -> Iterator[str]:  # noqa: ANN401 - JSON
    if isinstance(value, dict) and value:
        for mark, (name, item) in zip(chain("{", repeat(",")), value.items(), strict=False):
            yield f"{mark}{_encode(name)}:"
            yield from _pieces(item)
        yield "}"
    elif isinstance(value, list) and len(value) > _PART:
        for begin in range(0, len(value), _PART):
            yield "," if begin else "["
            yield _encode(value[begin : begin + _PART])[1:-1]
        yield "]"
    else:
        yield _encode(value)
