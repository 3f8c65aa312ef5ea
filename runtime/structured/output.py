"""What an answer must look like, as a caller says it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from slipstream.errors import InvalidRequestError

Kind = Literal["json", "json_object", "regex", "choice", "grammar"]
_KINDS: tuple[Kind, ...] = ("json", "json_object", "regex", "choice", "grammar")
# Between the parts of a JSON text: all that a pretty printer makes, but no endless run of it, which
# small models fall into.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
_MOST_PATTERN = 256
# As json.dumps writes, and most of what models have read.
_ONE_WAY = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """The form of a completion: exactly one of these; raises ``InvalidRequestError`` otherwise.

    json: a JSON schema, as an object or as its text.
    json_object: any JSON object.
    regex: a regular expression that the whole text matches, in the syntax of Rust's ``regex``.
    choice: one of these texts.
    grammar: a context-free grammar in llguidance's dialect of Lark, whose rule ``start`` is all of
        the text; it may name special tokens (``<|end|>``) and hold schemas (``%json {...}``). Or
        in GBNF (``root ::= ...``).

    And of the space between the parts of JSON, vLLM's:

    whitespace_pattern: a regular expression of what may stand there, beside nothing.
    disable_any_whitespace: there is one way, that of ``json.dumps``: ``{"a": 1, "b": 2}``. More
        tokens are then certain before the model is asked, and are appended without it.
    """

    json: str | Mapping[str, Any] | bool | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None

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
        self._check_space()
        text = _text_of(kind, getattr(self, kind))
        _check_unicode(kind, text)
        object.__setattr__(self, "text", text)

    def _check_space(self) -> None:
        pattern = self.whitespace_pattern
        if pattern is None and not self.disable_any_whitespace:
            return
        name = "disable_any_whitespace" if pattern is None else "whitespace_pattern"
        if self.kind not in ("json", "json_object"):
            raise InvalidRequestError(
                f"{name} is of the space in JSON, and the form is a {self.kind}; leave it out",
                param="structured",
            )
        if pattern is None:
            return
        if self.disable_any_whitespace:
            raise InvalidRequestError(
                "whitespace_pattern and disable_any_whitespace exclude each other; give one of "
                "them",
                param="structured",
            )
        if not isinstance(pattern, str) or not 0 < len(pattern) <= _MOST_PATTERN:
            raise InvalidRequestError(
                f"whitespace_pattern is {pattern!r:.80}; give a regular expression of 1 to "
                f"{_MOST_PATTERN} characters, such as ' ?'",
                param="structured",
            )
        _check_unicode("whitespace_pattern", pattern)

    @property
    def json_options(self) -> dict[str, Any]:
        """How llguidance is to space JSON."""
        if self.disable_any_whitespace:
            return dict(_ONE_WAY)
        return {"whitespace_pattern": self.whitespace_pattern or WHITESPACE}

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


def _check_unicode(kind: str, text: str) -> None:
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
