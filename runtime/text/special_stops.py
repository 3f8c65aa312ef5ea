"""Stop strings that hold special tokens, which a text without special tokens never shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from weakref import ref

from slipstream.runtime.text.tokenizer import Tokenizer

_MARKS = range(0xD800, 0xE000)  # surrogates, which no decoded text has


@dataclass(frozen=True, slots=True)
class SpecialStops:
    """Puts a mark into the text for every special token that a stop string names, so that the
    string is found there, and takes the marks out again.

    ``marks`` are characters by token id, ``stops`` the strings to look for, each with the one that
    was given.
    """

    stops: Mapping[str, str]
    marks: Mapping[int, str] = field(default_factory=dict)

    def shown(self, text: str) -> str:
        """``text`` without marks."""
        for mark in self.marks.values():
            text = text.replace(mark, "")
        return text

    def shown_with(self, text: str, stop: str) -> str:
        """The same for a text that ends with ``stop``, one of ``stops``, which stays whole."""
        return self.shown(text[: -len(stop)]) + self.stops[stop]


def special_stops(
    tokenizer: Tokenizer, stops: tuple[str, ...], *, skipped: bool, shown: tuple[str, ...] = ()
) -> SpecialStops:
    """How to look for ``stops`` where special tokens but those ``shown`` are ``skipped``, or none
    is."""
    if not skipped:
        return SpecialStops(_as_given(stops))
    return _special_stops(ref(tokenizer), stops, shown)


def _as_given(stops: tuple[str, ...]) -> dict[str, str]:
    return {stop: stop for stop in stops}


# Each of the n completions of a request asks. A tokenizer whose engine is closed is not kept.
@lru_cache(maxsize=16)
def _special_stops(
    kept: ref[Tokenizer], stops: tuple[str, ...], shown: tuple[str, ...]
) -> SpecialStops:
    tokenizer, given = kept(), _as_given(stops)
    assert tokenizer is not None, "who asks holds it"
    every = "\n".join(stops)
    hidden = tokenizer.special_token_ids.difference(map(tokenizer.token_to_id, shown))
    names = {i: tokenizer.id_to_token(i) or "" for i in hidden}
    named = sorted(
        (i for i in names if names[i] and names[i] in every), key=lambda i: -len(names[i])
    )
    marks = {token: chr(mark) for token, mark in zip(named, _MARKS, strict=False)}
    for stop in stops:
        marked = stop
        for token, mark in marks.items():
            marked = marked.replace(names[token], mark)
        given.setdefault(marked, stop)
    return SpecialStops(given, marks)
