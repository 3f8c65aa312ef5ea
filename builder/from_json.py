"""Dataclasses from parsed JSON, strictly: every field is there, of its type, and no other."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from slipstream.weights.json import is_integer, shortened

T = TypeVar("T")
_BITS = 63  # of an integer


def from_json(kind: type[T], value: object) -> T:
    """A dataclass of such dataclasses, tuples, dictionaries by name, literals, enumerations and
    plain values; fields of type ``Any`` take what is there.

    Raises ValueError that names the field and says what is wrong with it.
    """
    made: T = _read(kind, value, "")
    return made


def _read(kind: Any, value: object, place: str) -> Any:  # noqa: ANN401 - a type and its value
    origin = get_origin(kind) or kind
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _read_fields(kind, value, place)
    if origin in (Union, types.UnionType):
        return _read_any(get_args(kind), value, place)
    if origin is tuple:
        return _read_items(get_args(kind), value, place)
    if origin is dict:
        entries = _typed(dict, value, place)
        of = get_args(kind)[1]
        return {name: _read(of, entry, _inside(place, name)) for name, entry in entries.items()}
    if origin is Literal:
        return _choice(get_args(kind), value, place)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(_choice([member.value for member in kind], value, place))
    return _typed(kind, value, place)


def _read_fields(kind: Any, value: object, place: str) -> Any:  # noqa: ANN401 - any dataclass
    raw: Mapping[str, object] = _typed(dict, value, place)
    hints = _hints(kind)
    for name in (*hints, *raw):
        if (name in hints) != (name in raw):
            wrong = "is missing" if name in hints else "is unknown"
            raise ValueError(f"{_inside(place, name)} {wrong}")
    return kind(**{name: _read(hints[name], raw[name], _inside(place, name)) for name in hints})


def _read_any(kinds: tuple[Any, ...], value: object, place: str) -> Any:  # noqa: ANN401
    for kind in kinds:
        try:
            return _read(kind, value, place)
        except ValueError as error:
            problem = error
    raise problem


def _read_items(kinds: tuple[Any, ...], value: object, place: str) -> tuple[Any, ...]:
    items = _typed(list, value, place)
    if kinds[-1] is ...:
        kinds = (kinds[0],) * len(items)
    if len(kinds) != len(items):
        raise ValueError(f"{place} has {len(items)} items, not {len(kinds)}")
    pairs = enumerate(zip(kinds, items, strict=True))
    return tuple(_read(kind, item, f"{place}[{at}]") for at, (kind, item) in pairs)


def _choice(known: Any, value: object, place: str) -> object:  # noqa: ANN401 - a sequence
    if value not in known:
        raise ValueError(f"{place} is {shortened(value)}, not one of {', '.join(map(str, known))}")
    return value


def _typed(kind: type[Any], value: object, place: str) -> Any:  # noqa: ANN401 - of that type
    if isinstance(value, int) and value.bit_length() > _BITS:
        raise ValueError(f"{place} is {shortened(value)}")
    if kind is float and is_integer(value):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} is {value}, not a finite number")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {dict: "an object", list: "a list", types.NoneType: "null"}
        raise ValueError(f"{place} is {shortened(value)}, not {names.get(kind, kind.__name__)}")
    return value


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _inside(place: str, name: str) -> str:
    return f"{place}.{name:.80}" if place else f"{name:.80}"
