"""Texts that stand as they are, without quotes, held to what a JSON schema says of a string."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from slipstream.errors import InvalidRequestError

_DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_TIME = (
    r"([01][0-9]|2[0-3]):[0-5][0-9]:([0-5][0-9]|60)(\.[0-9]+)?"
    r"([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
# Of JSON Schema's, those that tools use.
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[Tt]{_TIME}",
    "email": rf"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@{_LABEL}(\.{_LABEL})*",
    "hostname": rf"{_LABEL}(\.{_LABEL})*",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "uuid": r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "uri": r"[A-Za-z][A-Za-z0-9+.-]*:[A-Za-z0-9._~:/?#@!$&'()*+,;=%\[\]-]+",
}
# A character that is escaped, a class of them, or one.
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)


def conditions(schema: Mapping[str, Any], *, strict: bool) -> list[str]:
    """Expressions that a text must match as a whole, all of them.

    What cannot be held is left out, or for ``strict`` raises ``InvalidRequestError``.
    """
    found = []
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if least or most != "":
        found.append(f"(?s:.{{{least},{most}}})")
    for name, made in (("pattern", _whole), ("format", _FORMATS.get)):
        given = schema.get(name)
        if given is None:
            continue
        expression = made(given) if isinstance(given, str) else None
        if expression is not None:
            found.append(expression)
        elif strict:
            raise InvalidRequestError(
                f"{name} {given!r:.80} cannot be held in this model's form of calls; leave it out, "
                "or strict",
                param="tools",
            )
    return found


def _whole(pattern: str) -> str | None:
    """An expression of a whole text in which ``pattern`` is found; None: there is none."""
    branches, depth = [""], 0
    for token in _TOKEN.findall(pattern):
        depth += (token == "(") - (token == ")")
        if token == "|" and depth == 0:
            branches.append("")
        else:
            branches[-1] += token
    found = [_anchored(branch) for branch in branches]
    known = [each for each in found if each is not None]
    return "|".join(known) if len(known) == len(found) else None


def _anchored(branch: str) -> str | None:
    tokens = _TOKEN.findall(branch)
    begin, end = tokens[:1] == ["^"], tokens[-1:] == ["$"]
    inner = tokens[begin : len(tokens) - end]
    if any(token in ("^", "$", r"\b", r"\B") for token in inner) or _looks_around(inner):
        return None
    lead, tail = ("" if begin else "(?s:.*)"), ("" if end else "(?s:.*)")
    return f"{lead}(?:{''.join(inner)}){tail}"


def _looks_around(tokens: list[str]) -> bool:
    """Whether there is a look ahead or back, or what a group has matched is asked for again."""
    text = "".join(" " if token[0] in "\\[" and len(token) > 1 else token for token in tokens)
    return bool(re.search(r"\(\?<?[=!]", text)) or any(re.match(r"\\[1-9k]", t) for t in tokens)
