"""How long a text of a template would be, told before it is made.

A width, a repetition or a replacement makes any amount of text from a few characters. Whatever a
template calls is looked up here first: what it would make at most, in characters, is refused where
it is more than any prompt has. An element of a list counts as many characters as it takes bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, KeysView, Mapping, ValuesView
from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import SandboxedFormatter

MAX_CHARACTERS = 1 << 24  # of one text, which may take four bytes each
MAX_ELEMENTS = 1 << 18  # of the lists in a value: more than a request may hold
_MAX_BITS = 4096
_MAX_DIGITS = 100_000  # that a number is rounded to
_ELEMENT = 64
_GROWTH = 6  # of a character as HTML or as JSON
_CASED = 3  # of a character by what no table has: in capitals
_ESCAPE = 10  # of a character as Python writes it where it cannot be shown: \U000e0001
# Characters of what takes long, and that no template of a model has more of: texts for some
# filters, forms with fields, digits of a number.
_RARE = 1 << 16
# A width and a precision after % or a name in brackets, in "%(name)5.2f".
_CONVERSION = re.compile(r"[%)][#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")
# One that writes its value as Python does, "%r" or "%a".
_ESCAPING = re.compile(r"[%)][#0\- +*.\dhlL]*[ra]")
_NUMBER = re.compile(r"\d+")
_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_LISTS = (list, tuple, dict, ItemsView, KeysView, ValuesView)

Size = Callable[..., int]


class TemplateLimitError(jinja2.TemplateError):
    """A template did more than any needs to."""


def refuse_if(too_much: bool) -> None:
    """Raise ``TemplateLimitError``."""
    if too_much:
        raise TemplateLimitError("it asks for more characters or digits than any prompt has")


class Weight(NamedTuple):
    """What the lists in a value have in all, each as often as it is there: a list of a list twice,
    and so on, is small until it is written."""

    elements: int
    characters: int
    depth: int


def weigh(value: Any) -> Weight:  # noqa: ANN401 - any value of a template
    """The weight of a value, which is refused if it would be too long when it is written."""
    elements = characters = depth = 0
    level = [value]
    while level:
        below: list[Any] = []
        for each in level:
            if isinstance(each, str):
                characters += len(each)
            elif isinstance(each, int):
                characters += each.bit_length() // 3
            elif isinstance(each, _LISTS):
                elements += len(each)
                refuse_if(elements > MAX_ELEMENTS)
                below += each
                if isinstance(each, dict):
                    below += each.values()
        refuse_if(characters > MAX_CHARACTERS)
        level, depth = below, depth + 1
    return Weight(elements, characters, depth)


def check_method(text: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:  # noqa: ANN401
    """Raise ``TemplateLimitError`` where a method of a text would make too much."""
    refuse_if(_METHODS.get(name, _grown)(text, *args, **kwargs) > MAX_CHARACTERS)


def check_filter(name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:  # noqa: ANN401
    """The same of a filter or test."""
    refuse_if(_FILTERS.get(name, _grown)(value, *args, **kwargs) > MAX_CHARACTERS)


def check_operator(operator: str, left: Any, right: Any) -> None:  # noqa: ANN401
    """The same of an operator."""
    size = _OPERATORS.get(operator)
    refuse_if(size is not None and size(left, right) > MAX_CHARACTERS)


def check_joined(parts: tuple[Any, ...]) -> None:
    """The same of texts that are put together."""
    refuse_if(sum(map(_written, parts)) > MAX_CHARACTERS)


class MeasuringFormatter(SandboxedFormatter):
    """Formats as the sandbox does, and refuses a field that would be too long, or all together."""

    _size = 0

    def vformat(self, form: str, args: Any, kwargs: Any) -> str:  # noqa: ANN401
        """The whole text; every field of its form takes time."""
        refuse_if(len(form) > _RARE)
        return super().vformat(form, args, kwargs)

    def convert_field(self, value: Any, conversion: Any) -> Any:  # noqa: ANN401
        """A value as ``!s``, ``!r`` or ``!a`` wants it."""
        refuse_if(conversion is not None and _escaped(value) > MAX_CHARACTERS)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:  # noqa: ANN401
        """A field, after its width, precision and value have been counted."""
        self._size += _written(value) + _numbers_in(format_spec)
        refuse_if(self._size > MAX_CHARACTERS)
        return super().format_field(value, format_spec)


def _written(value: Any) -> int:  # noqa: ANN401
    """The most characters that a value has as text; in a list, some are written as escapes."""
    if isinstance(value, str):
        return len(value)
    return _escaped(value)


def _escaped(value: Any) -> int:  # noqa: ANN401
    """The same, of a text in quotes, too."""
    weight = weigh(value)
    return _ESCAPE * weight.characters + _ELEMENT * (weight.elements + 1)


def _shown(value: Any, *_: Any) -> int:  # noqa: ANN401
    return _written(value)


def _cased(value: Any, *_: Any) -> int:  # noqa: ANN401
    return _CASED * _written(value)


def _marked_up(value: Any, *_: Any) -> int:  # noqa: ANN401
    return _GROWTH * _written(value)


def _grown(*args: Any, **kwargs: Any) -> int:  # noqa: ANN401
    return _CASED * sum(len(each) for each in (*args, *kwargs.values()) if isinstance(each, str))


def _whole(value: Any) -> int:  # noqa: ANN401
    return value if isinstance(value, int) else 0


def _padded(text: Any, width: Any = 80, *_: Any) -> int:  # noqa: ANN401
    return max(_written(text), _whole(width))


def _expanded(text: str, tabsize: Any = 8) -> int:  # noqa: ANN401
    return len(text) + text.count("\t") * _whole(tabsize)


def _replaced(text: Any, old: Any, new: Any, count: Any = None, *_: Any) -> int:  # noqa: ANN401
    size = _written(text)
    text, old = str(text), str(old)
    found = text.count(old) if old else len(text) + 1
    if isinstance(count, int) and count >= 0:
        found = min(found, count)
    return size + found * _written(new)


def _translated(text: str, table: Any = None) -> int:  # noqa: ANN401
    values = table.values() if isinstance(table, dict) else ()
    return len(text) * max((_written(each) for each in values), default=1)


def _joined_by(text: str, parts: Any = ()) -> int:  # noqa: ANN401
    return _joined(parts, text)


def _joined(parts: Any, text: Any = "", *_: Any, **__: Any) -> int:  # noqa: ANN401
    if isinstance(parts, str) or not hasattr(parts, "__len__"):
        return _written(parts) + (len(parts) if isinstance(parts, str) else 0) * _written(text)
    weigh(parts)
    return sum(map(_written, parts)) + len(parts) * (_ELEMENT + _written(text))


def _split(text: str, sep: Any = None, *_: Any, **__: Any) -> int:  # noqa: ANN401
    pieces = text.count(sep) if isinstance(sep, str) and sep else len(text) // 2
    return len(text) + _ELEMENT * pieces


def _lines(text: str, *_: Any, **__: Any) -> int:  # noqa: ANN401
    return len(text) + _ELEMENT * sum(map(text.count, _BREAKS))


def _indented(text: Any, width: Any = 4, *_: Any, **__: Any) -> int:  # noqa: ANN401
    lines: str = str(text)
    each = len(width) if isinstance(width, str) else _whole(width)
    return _lines(lines) + (lines.count("\n") + 1) * each


def _listed(value: Any, *_: Any, **__: Any) -> int:  # noqa: ANN401
    return _ELEMENT * len(value) if isinstance(value, str) else 0


def _filled(value: Any, count: Any, fill: Any = None) -> int:  # noqa: ANN401
    return _listed(value) + _ELEMENT * _whole(count)


def _rounded(value: Any, precision: Any = 0, *_: Any) -> int:  # noqa: ANN401
    return MAX_CHARACTERS + 1 if abs(_whole(precision)) > _MAX_DIGITS else 0


def _json(
    value: Any,  # noqa: ANN401
    ensure_ascii: Any = False,  # noqa: ANN401
    indent: Any = None,  # noqa: ANN401
    separators: Any = None,  # noqa: ANN401
    sort_keys: Any = False,  # noqa: ANN401
) -> int:
    weight = weigh(value)
    each = _ELEMENT + sum(len(s) for s in separators or () if isinstance(s, str))
    each += weight.depth * (len(indent) if isinstance(indent, str) else _whole(indent))
    growth = 2 * _GROWTH if ensure_ascii else _GROWTH
    return growth * weight.characters + (2 * weight.elements + 1) * each


def _rare(*args: Any, **kwargs: Any) -> int:  # noqa: ANN401
    value, *others = [_written(each) for each in (*args, *kwargs.values())]
    return MAX_CHARACTERS + 1 if value > _RARE else value * (_GROWTH + sum(others))


def _printed(text: Any, *args: Any, **kwargs: Any) -> int:  # noqa: ANN401
    """Of ``text % values``; a number that is named ``*`` stands among the values."""
    if not isinstance(text, str):
        return _written(text)
    refuse_if(len(text) > _RARE)
    written = _escaped if _ESCAPING.search(text) else _written
    conversions = _CONVERSION.findall(text)
    widest = max((abs(_whole(each)) for each in args), default=0)
    numbers = [n for pair in conversions for n in pair if n]
    size = len(text) + sum(widest if n == "*" else _numbers_in(n) for n in numbers)
    size += sum(map(written, args))
    longest = max(map(written, kwargs.values()), default=0)  # each as often as it is named
    return size + len(conversions) * longest


def _numbers_in(text: str) -> int:
    """The sum of what may be widths."""
    found = _NUMBER.findall(text)
    return sum(int(n) if len(n) < 10 else MAX_CHARACTERS + 1 for n in found)


def _sum(left: Any, right: Any) -> int:  # noqa: ANN401
    both = isinstance(left, str) and isinstance(right, str)
    return len(left) + len(right) if both else 0


def _product(left: Any, right: Any) -> int:  # noqa: ANN401
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, str) and isinstance(times, int):
            return len(sequence) * times
        if isinstance(sequence, list | tuple) and isinstance(times, int):
            refuse_if(len(sequence) * times > MAX_ELEMENTS)
    whole = isinstance(left, int) and isinstance(right, int)
    refuse_if(whole and left.bit_length() + right.bit_length() > _MAX_BITS)
    return 0


def _power(left: Any, right: Any) -> int:  # noqa: ANN401
    whole = isinstance(left, int) and isinstance(right, int)
    refuse_if(whole and left.bit_length() * right > _MAX_BITS)
    return 0


def _remainder(left: Any, right: Any) -> int:  # noqa: ANN401
    if not isinstance(left, str):
        return 0
    if isinstance(right, dict):
        return _printed(left, **{str(key): value for key, value in right.items()})
    return _printed(left, *(right if isinstance(right, tuple) else (right,)))


_OPERATORS: Mapping[str, Size] = {
    "+": _sum,
    "*": _product,
    "**": _power,
    "%": _remainder,
}
_METHODS: Mapping[str, Size] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _padded),
    **dict.fromkeys(("split", "rsplit"), _split),
    "expandtabs": _expanded,
    "replace": _replaced,
    "translate": _translated,
    "join": _joined_by,
    "splitlines": _lines,
}
_FILTERS: Mapping[str, Size] = {
    **dict.fromkeys(
        ("groupby", "list", "map", "max", "min", "reject", "rejectattr", "select", "selectattr",
         "sort", "sum", "unique"), _listed),
    **dict.fromkeys(
        ("filesizeformat", "forceescape", "int", "pprint", "striptags", "truncate", "urlencode",
         "urlize", "wordcount", "wordwrap", "xmlattr"), _rare),
    **dict.fromkeys(("capitalize", "lower", "title", "upper"), _cased),
    **dict.fromkeys(("e", "escape"), _marked_up),
    **dict.fromkeys(("safe", "string", "trim"), _shown),
    **dict.fromkeys(("batch", "slice"), _filled),
    "center": _padded,
    "format": _printed,
    "indent": _indented,
    "join": _joined,
    "replace": _replaced,
    "round": _rounded,
    "tojson": _json,
}  # fmt: skip
