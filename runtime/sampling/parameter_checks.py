"""Checks of request parameters: each raises ``InvalidRequestError`` with value and remedy."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slipstream.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Number:
    """The type and range of a numeric parameter, and what to say to who leaves it."""

    kind: type[int] | type[float]
    low: float
    high: float = math.inf
    open_low: bool = False
    optional: bool = False
    remedy: str = ""

    def describe(self) -> str:
        """The accepted values in words, e.g. ``a number in (0, 1]``."""
        noun = "an integer" if self.kind is int else "a number"
        low, high = (str(n) if self.kind is int else f"{n:g}" for n in (self.low, self.high))
        if self.high == math.inf:
            return f"{noun} of at least {low}"
        return f"{noun} in {'(' if self.open_low else '['}{low}, {high}]"

    def json_schema(self) -> dict[str, float]:
        """The accepted values in JSON Schema's words."""
        bounds = {"exclusiveMinimum" if self.open_low else "minimum": self.low}
        return bounds if self.high == math.inf else {**bounds, "maximum": self.high}

    def parse(self, name: str, value: object) -> int | float:
        """Return ``value`` as a plain int or float (NumPy scalars included), or raise."""
        number: int | float | None = None
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            number = int(value)
        elif isinstance(value, numbers.Real) and self.kind is float and not isinstance(value, bool):
            number = float(value)
        if number is not None:
            above = number > self.low if self.open_low else number >= self.low
            if above and number <= self.high and -math.inf < number < math.inf:
                return self.kind(number)
        raise InvalidRequestError(
            f"{name}={value!r:.80} is not {self.describe()}; {self.remedy}", param=field_of(name)
        )


def field_of(place: str) -> str:
    """The parameter that a place in it is of: ``stop_token_ids[3]`` is in ``stop_token_ids``."""
    return place.partition("[")[0].partition(" ")[0]


def check_numbers(holder: object, table: Mapping[str, Number]) -> None:
    """Validate and normalise every numeric attribute of a frozen dataclass."""
    for name, spec in table.items():
        value = getattr(holder, name)
        if not (value is None and spec.optional):
            object.__setattr__(holder, name, spec.parse(name, value))


def check_flag(name: str, value: object) -> None:
    """Accept only True and False."""
    if not isinstance(value, bool):
        raise InvalidRequestError(
            f"{name}={value!r:.80} is not a boolean; use True or False", param=name
        )


def check_strings(name: str, value: object) -> tuple[str, ...]:
    """Accept a string, several, or None; return a tuple without repeats."""
    if value is None:
        return ()
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, Sequence) or isinstance(items, bytes):
        raise InvalidRequestError(
            f"{name}={value!r:.80} is not a string or a list of strings; use e.g. ['###']",
            param=name,
        )
    for item in items:
        if not isinstance(item, str) or not item:
            raise InvalidRequestError(
                f"{name} holds {item!r:.80}, which is not a non-empty string; leave it out",
                param=name,
            )
    return tuple(dict.fromkeys(items))


def check_token_ids(
    name: str, value: object, *, empty_remedy: str | None = None
) -> tuple[int, ...]:
    """Accept several non-negative integers or None; with ``empty_remedy`` at least one."""
    if value is None:
        value = ()
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise InvalidRequestError(
            f"{name}={value!r:.80} is not a list of token ids; use e.g. [2, 50256]",
            param=field_of(name),
        )
    if isinstance(value, Sequence) and set(map(type, value)) == {int} and min(value) >= 0:
        return tuple(value)  # what most are, at a fiftieth of the price
    spec = Number(int, 0, remedy="use token ids of this model's tokenizer")
    ids = tuple(int(spec.parse(f"{name}[{i}]", item)) for i, item in enumerate(value))
    if not ids and empty_remedy:
        raise InvalidRequestError(
            f"{name} is empty, expected at least one token id; {empty_remedy}", param=field_of(name)
        )
    return ids


def check_token_sequences(name: str, value: object) -> tuple[tuple[int, ...], ...]:
    """Accept several non-empty lists of token ids, or None."""
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise InvalidRequestError(
            f"{name}={value!r:.80} is not a list of lists of token ids; use e.g. [[5, 17]]",
            param=name,
        )
    return tuple(
        check_token_ids(f"{name}[{i}]", ids, empty_remedy="leave the empty sequence out")
        for i, ids in enumerate(value)
    )


def check_logit_bias(value: object) -> dict[int, float]:
    """Accept ``{token id: bias}`` with biases in [-100, 100]."""
    if not isinstance(value, Mapping):
        raise InvalidRequestError(
            f"logit_bias={value!r:.80} is not a mapping; use e.g. {{50256: -100.0}}",
            param="logit_bias",
        )
    token = Number(int, 0, remedy="use token ids of this model's tokenizer as keys")
    bias = Number(float, -100, 100, remedy="use -100 to ban a token, 100 to force it")
    return {
        int(token.parse("logit_bias key", key)): float(bias.parse(f"logit_bias[{key!r:.80}]", item))
        for key, item in value.items()
    }
