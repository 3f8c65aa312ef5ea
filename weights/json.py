"""Foreign JSON, read by the types that its fields must have.

What others wrote is data to be checked: whatever is wrong with it ends as one typed error that says
which file and key, what stands there, what belongs there, and what to do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import Repr
from typing import TypeGuard

from slipstream.errors import CheckpointError, InvalidRequestError, SlipstreamError

# The largest files of their kind are indexes and headers of a quarter of a million tensors, of
# 25 MB and half a million values; what is far beyond would take gigabytes to parse.
MAX_BYTES = 1 << 25
MAX_VALUES = 1_000_000
MAX_DEPTH = 100
_MAX_INTEGER = 2**63 - 1
_NO_DEFAULT: Mapping[str, object] = {}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value comes from: ``file`` is named by every error, ``remedy`` ends it, and
    ``error`` is its type."""

    file: str | Path
    remedy: str = "download it again"
    error: type[SlipstreamError] = CheckpointError

    def refusal(self, found: str) -> SlipstreamError:
        """The error that says ``found`` of the file."""
        return self.error(f"{self.file} {found}; {self.remedy}")


@dataclass(frozen=True, slots=True)
class Fields:
    """An object of a file, every field of which is read by its type.

    A field that is null counts as missing. A missing one is ``default``, or an error where there
    is none; the ``optional_`` methods give None. ``path`` leads to the object inside of the file,
    as ``quantization_config.``. Every method raises ``origin.error`` for a value of another type
    or out of range.
    """

    values: Mapping[str, object]
    origin: Origin
    path: str = field(default="", kw_only=True)

    def has(self, key: str) -> bool:
        """Whether there is a value."""
        return self.values.get(key) is not None

    def refusal(self, key: str, expected: str) -> SlipstreamError:
        """The error for a value that is not what was expected."""
        return self.origin.error(
            f"{self.origin.file}: {self.path}{key:.80} is {shortened(self.values.get(key))}; "
            f"expected {expected}: {self.origin.remedy}"
        )

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, str):
            return value
        raise self.refusal(key, "text")

    def optional_text(self, key: str) -> str | None:
        """A string, or None."""
        return self.text(key) if self.has(key) else None

    def choice(self, key: str, choices: Sequence[str], default: str | None = None) -> str:
        """One of some strings."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, str) and value in choices:
            return value
        raise self.refusal(key, f"one of {', '.join(choices)}")

    def integer(
        self,
        key: str,
        default: int | None = None,
        *,
        minimum: int = 0,
        maximum: int = _MAX_INTEGER,
    ) -> int:
        """An integer in a range; true and false are none."""
        value = self.values.get(key)
        value = default if value is None else value
        if is_integer(value) and minimum <= value <= maximum:
            return value
        upper = "" if maximum == _MAX_INTEGER else f" and at most {maximum}"
        raise self.refusal(key, f"an integer of at least {minimum}{upper}")

    def optional_integer(self, key: str, *, minimum: int = 0) -> int | None:
        """An integer in a range, or None."""
        return self.integer(key, minimum=minimum) if self.has(key) else None

    def number(self, key: str, default: float | None = None, *, positive: bool = False) -> float:
        """A finite number."""
        value = self.values.get(key)
        value = default if value is None else value
        number = _finite(value)
        if number is not None and (number > 0 or not positive):
            return number
        raise self.refusal(key, "a positive number" if positive else "a finite number")

    def optional_number(self, key: str, *, positive: bool = False) -> float | None:
        """A finite number, or None."""
        return self.number(key, positive=positive) if self.has(key) else None

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool):
            return value
        raise self.refusal(key, "true or false")

    def fields(self, key: str, default: Mapping[str, object] | None = None) -> Fields:
        """An object; errors about its fields name this key, too."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, Mapping):
            return Fields(value, self.origin, path=f"{self.path}{key:.80}.")
        raise self.refusal(key, "an object")

    def optional_fields(self, key: str) -> Fields | None:
        """An object, or None."""
        return self.fields(key) if self.has(key) else None

    def fields_by_name(self, key: str) -> dict[str, Fields]:
        """An object of objects; none where it is missing."""
        inner = self.fields(key, _NO_DEFAULT)
        return {name: inner.fields(name) for name in inner.values}

    def texts_by_name(self, key: str) -> dict[str, str]:
        """An object of strings."""
        inner = self.fields(key)
        return {name: inner.text(name) for name in inner.values}

    def sequence(self, key: str, default: Sequence[object] | None = None) -> tuple[object, ...]:
        """A list of anything."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            return tuple(value)
        raise self.refusal(key, "a list")

    def texts(self, key: str, default: Sequence[str] | None = None) -> tuple[str, ...]:
        """A list of strings."""
        values = self.sequence(key, default)
        texts = tuple(value for value in values if isinstance(value, str))
        if len(texts) == len(values):
            return texts
        raise self.refusal(key, "a list of texts")

    def integers(
        self, key: str, default: Sequence[int] | None = None, *, minimum: int = 0
    ) -> tuple[int, ...]:
        """A list of integers."""
        values = self.sequence(key, default)
        integers = tuple(v for v in values if is_integer(v) and minimum <= v <= _MAX_INTEGER)
        if len(integers) == len(values):
            return integers
        raise self.refusal(key, f"a list of integers of at least {minimum}")

    def numbers(self, key: str, default: Sequence[float] | None = None) -> tuple[float, ...]:
        """A list of finite numbers."""
        values = self.sequence(key, default)
        numbers = tuple(number for number in map(_finite, values) if number is not None)
        if len(numbers) == len(values):
            return numbers
        raise self.refusal(key, "a list of finite numbers")

    def list_of_fields(self, key: str) -> tuple[Fields, ...]:
        """A list of objects."""
        items = {f"{key}[{i}]": value for i, value in enumerate(self.sequence(key))}
        inner = Fields(items, self.origin, path=self.path)
        return tuple(inner.fields(name) for name in items)


def read_fields(path: Path, origin: Origin | None = None) -> Fields:
    """The object in a file of JSON; by default CheckpointError says to download it again."""
    origin = origin or Origin(path)
    return parse_fields(_read(path, origin), origin)


def read_text(path: Path, origin: Origin | None = None) -> str:
    """The UTF-8 text of a file, such as a chat template."""
    origin = origin or Origin(path)
    try:
        return _read(path, origin).decode("utf-8")
    except ValueError as error:
        raise origin.refusal(f"cannot be read ({error})") from error


def _read(path: Path, origin: Origin) -> bytes:
    try:
        size = path.stat().st_size
        data = b"" if size > MAX_BYTES else path.read_bytes()
    except (OSError, ValueError) as error:
        raise origin.refusal(f"cannot be read ({error})") from error
    if size > MAX_BYTES:
        raise origin.refusal(f"has {size} bytes, which no file of its kind has")
    return data


def parse_fields(data: bytes, origin: Origin) -> Fields:
    """The object that UTF-8 bytes spell."""
    value = parse(data, origin)
    if not isinstance(value, dict):
        raise origin.refusal(f"is not a JSON object but {shortened(value)}")
    return Fields(value, origin)


def option_fields(config: object, name: str, origin: Origin) -> Fields:
    """An option that is an object, or its JSON; raises ``InvalidRequestError`` for anything else,
    and what ``origin`` says for JSON that cannot be read."""
    if isinstance(config, str):
        return parse_fields(config.encode(), origin)
    if isinstance(config, Mapping):
        return Fields(config, origin)
    raise InvalidRequestError(
        f"{name} is a {type(config).__name__}; it must be an object, or its JSON", param=name
    )


def parse(data: bytes, origin: Origin) -> object:
    """The value that UTF-8 bytes spell.

    Refused besides what is no JSON: more than about ``MAX_VALUES`` values, values nested deeper
    than ``MAX_DEPTH``, halves of surrogate pairs, and a key that an object has twice with different
    values. Numbers out of range are infinite and not refused before somebody reads them.
    """
    # Counted before anything is made of them: an empty list is 2 bytes here and 64 in memory.
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise origin.refusal(f"has more than {MAX_VALUES} values, which no file of its kind has")
    try:
        value: object = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
        _check(value)
    except RecursionError:
        raise origin.refusal("cannot be read (it is nested too deep)") from None
    except ValueError as error:
        raise origin.refusal(f"cannot be read ({error})") from error
    return value


def shortened(value: object) -> str:
    """A value as an error shows it."""
    return _SHORT.repr(value)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a JSON value is an integer, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_file_name(text: str) -> bool:
    """Whether a text names a file of the directory that it is read from, and nothing outside."""
    short = len(text.encode(errors="replace")) < 256  # as on every file system
    return short and text not in ("", ".", "..") and not {"/", "\0"} & set(text)


class _Short(Repr):
    """A few levels, elements and characters."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxstring, self.maxother = 2, 6, 80, 80

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print an integer of thousands of digits.
        return repr(x) if x.bit_length() < 128 else f"an integer of {x.bit_length()} bits"


_SHORT = _Short()


def _finite(value: object) -> float | None:
    try:
        number = float(value) if is_integer(value) or isinstance(value, float) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in pairs:
        if key in values and values[key] != value:
            raise ValueError(f"{shortened(key)} stands there twice, with different values")
        values[key] = value
    return values


def _check(value: object) -> None:
    """ValueError for what is nested too deep or is no Unicode."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for item in level:
            if isinstance(item, str):
                if not item.isascii():
                    item.encode("utf-8")
            elif isinstance(item, dict):
                inner += item
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level = inner
    if level:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
