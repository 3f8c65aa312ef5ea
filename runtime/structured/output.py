"""What an answer must look like, as a caller says it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from slipstream.errors import InvalidRequestError

Kind = Literal["json", "json_object", "regex", "choice", "grammar"]
_KINDS: tuple[Kind, ...] = ("json", "json_object", "regex", "choice", "grammar")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """The form of a completion: exactly one of these; raises ``InvalidRequestError`` otherwise.

    json: a JSON schema, as an object or as its text.
    json_object: any JSON object.
    regex: a regular expression that the whole text matches, in the syntax of Rust's ``regex``.
    choice: one of these texts.
    grammar: a context-free grammar in llguidance's dialect of Lark, whose rule ``start`` is all of
        the text; it may name special tokens (``<|end|>``) and hold schemas (``%json {...}``).
    """

    json: str | Mapping[str, Any] | bool | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    kind: Kind = field(init=False, repr=False, compare=False)
    # What is compiled, and found again: schemas as JSON.
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Validate, and turn what was given into text."""
        given = [kind for kind in _KINDS if getattr(self, kind) not in (None, False)]
        if self.json is False:  # the schema that nothing holds
            given.append("json")
        if len(given) != 1:
            raise InvalidRequestError(
                f"a structured output is one of {', '.join(_KINDS)}; {given or 'none'} was given",
                param="structured",
            )
        (kind,) = given
        object.__setattr__(self, "kind", kind)
        text = _text_of(kind, getattr(self, kind))
        _check_unicode(kind, text)
        object.__setattr__(self, "text", text)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StructuredOutput:
        """Build from decoded JSON, where null means left out; unknown names are refused."""
        known = [f.name for f in fields(cls) if f.init]
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise InvalidRequestError(
                f"structured output has an unknown field {unknown[0]!r:.80}; known are "
                f"{', '.join(known)}",
                param="structured",
            )
        return cls(**{name: value for name, value in values.items() if value is not None})


def _text_of(kind: Kind, value: Any) -> str:  # noqa: ANN401 - checked here
    if kind == "json" and not isinstance(value, str):
        return _json_text(value)
    if kind == "json_object":
        return '{"type":"object"}'
    if kind == "choice":
        texts = isinstance(value, Sequence) and not isinstance(value, str)
        if not texts or not value or not all(isinstance(text, str) for text in value):
            raise InvalidRequestError(
                f"choice is {value!r:.80}; give a list of texts", param="structured"
            )
        return _json_text(list(value))
    if not isinstance(value, str):
        raise InvalidRequestError(f"{kind} is {value!r:.80}; give a text", param="structured")
    return value


def _check_unicode(kind: Kind, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"the text of {kind} is not valid Unicode ({error.reason} at {error.start}); remove "
            "lone surrogates",
            param="structured",
        ) from error


def _json_text(value: Any) -> str:  # noqa: ANN401 - JSON
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"the schema cannot be expressed as JSON ({error}); use text, numbers, booleans, lists "
            "and dicts",
            param="structured",
        ) from error
