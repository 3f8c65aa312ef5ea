"""Grammars in llguidance's dialect of Lark, piece by piece."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from slipstream.runtime.structured.gbnf import lark_of
from slipstream.runtime.structured.output import WHITESPACE, StructuredOutput

_ANY = "/(?s:.*)/"


class Grammar:
    """Rules by name; an expression is text that may stand in one.

    ``tokens`` are the ids of texts that are one token each and never written otherwise.
    """

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens
        self._rules: list[str] = []
        self._known: dict[str, str] = {}
        self._others: list[dict[str, str]] = []
        marks = sorted(tokens, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, marks)) + ")") if marks else None

    def rule(self, body: str, options: str = "") -> str:
        """Add a rule, or find it; returns its name."""
        return self._add("r", body, options)

    def terminal(self, body: str) -> str:
        """The same for a terminal."""
        return self._add("T", body, "")

    def _add(self, prefix: str, body: str, options: str) -> str:
        text = f"{options}: {body}"
        if text not in self._known:
            self._known[text] = f"{prefix}{len(self._known)}"
            self._rules.append(self._known[text] + text)
        return self._known[text]

    def literal(self, text: str) -> str:
        """Exactly ``text``, with tokens where it has them."""
        parts = [text] if self._split is None else self._split.split(text)
        return " ".join(self._part(part) for part in parts if part) or '""'

    def _part(self, text: str) -> str:
        token = self._tokens.get(text)
        return json.dumps(text, ensure_ascii=False) if token is None else f"<[{token}]>"

    def is_token(self, text: str) -> bool:
        """Whether ``text`` is one token."""
        return text in self._tokens

    def schema(self, schema: Any) -> str:  # noqa: ANN401 - JSON
        """A JSON value that ``schema`` describes, with as much space in it as others have."""
        if isinstance(schema, Mapping):
            schema = bounded(schema, **schema.get("x-guidance", {}))
        return self._json(schema)

    def _json(self, schema: Any) -> str:  # noqa: ANN401 - JSON
        return self.rule(f"%json {json.dumps(schema, ensure_ascii=False)}")

    def text(self) -> str:
        """Any text, without tokens of their own."""
        return self.rule(self.terminal(_ANY))

    def text_without(self, *marks: str) -> str:
        """Any text in which none of ``marks`` stands."""
        written = [mark for mark in marks if not self.is_token(mark)]
        if not written:
            return self.text()
        return self.rule(
            self.terminal(_ANY + "".join(f" & ~/(?s:.*{_regex(m)}.*)/" for m in written))
        )

    def until(self, mark: str, most_tokens: int | None = None, held: Sequence[str] = ()) -> str:
        """Any text and ``mark``, which comes after ``most_tokens`` at the latest; or a text that
        matches all of ``held``."""
        if held:
            return self._held_until(mark, held)
        bound = "" if most_tokens is None else f"max_tokens={most_tokens}"
        if self.is_token(mark):
            body = self.rule(self.terminal(_ANY), f"[{bound}]" if bound else "")
            return f"{body} {self.literal(mark)}"
        ends = self.rule(f"/(?s:.*){_regex(mark)}/", f"[lazy,{bound}]" if bound else "[lazy]")
        if not bound:
            return ends
        # Where the bound ends both, the first goes on; so the mark is written.
        within = self.terminal(f"{_ANY} & ~/(?s:.*){_regex(mark)}(?s:.*)/")
        return f"({self.rule(within, f'[{bound}]')} {self.literal(mark)} | {ends})"

    def _held_until(self, mark: str, held: Sequence[str]) -> str:
        """As one lexeme, up to the token in the mark: what may be text could be its beginning."""
        parts = [mark] if self._split is None else self._split.split(mark, maxsplit=1)
        text = " & ".join(f"/{_slashed(each)}/" for each in held)
        end = next(part for part in parts[::-1] if part).strip()
        text += f" & ~/(?s:.*){_regex(end)}(?s:.*)/"
        body = f"({text}) {quoted(parts[0])}" if parts[0] else text
        if len(parts) == 1:
            return self.rule(self.terminal(body), "[lazy]")
        return f"{self.rule(self.terminal(body))} {self.literal(mark[len(parts[0]) :])}"

    def wanted(self, wanted: StructuredOutput) -> str:
        """The form that a caller asks for."""
        match wanted.kind:
            case "json" | "json_object":
                return self._wanted_json(wanted.text, wanted.json_options)
            case "regex":
                return self.rule(self.terminal(f"/{_slashed(wanted.text)}/"))
            case "choice":
                texts = map(quoted, json.loads(wanted.text))
                return self.rule(self.terminal(" | ".join(texts)))
            case "grammar":
                self._others.append({"name": "wanted", "lark_grammar": lark_of(wanted.text)})
                return "@wanted"

    def _wanted_json(self, text: str, options: Mapping[str, Any]) -> str:
        try:
            schema = json.loads(text)
        except (ValueError, RecursionError):
            return self.rule(f"%json {text}")  # refused when it is compiled, with the reason
        if schema is True:  # which anything holds
            schema = {}
        if isinstance(schema, Mapping):
            schema = {**schema, "x-guidance": options}
        return self._json(schema)

    def finish(self, start: str) -> StructuredOutput:
        """The whole."""
        text = "\n".join([f"start: {start}", *self._rules])
        if self._others:
            text = json.dumps({"grammars": [{"lark_grammar": text}, *self._others]})
        return StructuredOutput(grammar=text)


def bounded(schema: Mapping[str, Any], **options: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    """A schema whose texts have as much space in them as others have, and no options but these."""
    return {**schema, "x-guidance": {**options, "whitespace_pattern": WHITESPACE}}


def alternatives(expressions: Sequence[str]) -> str:
    """One of them."""
    return expressions[0] if len(expressions) == 1 else "(" + " | ".join(expressions) + ")"


def quoted(text: str) -> str:
    """Exactly ``text``, without tokens of their own."""
    return json.dumps(text, ensure_ascii=False)


def _regex(text: str) -> str:
    return _slashed(re.escape(text).replace("\n", "n"))


def _slashed(regex: str) -> str:
    """A regular expression as it may stand between slashes."""
    return re.sub(r"\\.|/|\n", _escaped, regex, flags=re.DOTALL)


def _escaped(found: re.Match[str]) -> str:
    return {"/": "\\/", "\n": "\\n", "\\\n": "\\n"}.get(found[0], found[0])
