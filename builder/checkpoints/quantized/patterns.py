"""Regular expressions of a foreign config.json, in time linear in the name they are matched with.

Python's own can take forever. Rust's crate ``regex``, which pydantic brings, cannot, and bounds
what it compiles; it has no references to groups and no look-around. A look-ahead at the very start,
as in ``^(?!.*experts).*``, is an expression of its own.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from slipstream.weights.json import Fields, shortened

if TYPE_CHECKING:
    from pydantic_core import SchemaValidator

# Those of real files have some hundred characters.
_LONGEST = 4_000
_AHEAD = ("(?!", "(?=")
# What hides a parenthesis (a character that is escaped, a class), or is one, or an alternative.
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*+\]|[()|]", re.DOTALL)


def matches(pattern: str, module: str, settings: Fields, key: str) -> bool:
    """Whether a regular expression of ``settings[key]`` fits the start of a module's name.

    CheckpointError for what is none, or has look-around elsewhere or references to groups.
    """
    try:
        if len(pattern) > _LONGEST:
            raise ValueError(f"it has more than {_LONGEST} characters")
        expressions = _compiled(pattern)
    except ValueError as error:
        reason = str(error).strip().rpartition("\n")[2].strip().removeprefix("error: ")
        raise settings.origin.error(
            f"{settings.origin.file}: {settings.path}{key} has the pattern {shortened(pattern)}, "
            f"which is no regular expression that can be matched ({reason}); "
            f"{settings.origin.remedy}"
        ) from error
    return all(found.isinstance_python(module) is wanted for found, wanted in expressions)


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> tuple[tuple[SchemaValidator, bool], ...]:
    """The expressions that the start of a name must fit, and those that it must not."""
    ahead, rest = [], pattern
    while (inner := rest.lstrip("^")).startswith(_AHEAD) and (end := _end_of_group(inner)):
        ahead.append((_expression(inner[3 : end - 1]), inner.startswith("(?=")))
        rest = inner[end:]
    return (*ahead, (_expression(rest), True))


def _expression(pattern: str) -> SchemaValidator:
    # Imported here: few checkpoints have patterns.
    from pydantic_core import SchemaError, SchemaValidator, core_schema

    try:
        # Alone first: one that closes a group too many would be whole within a group.
        for text in (pattern, f"^(?:{pattern})"):
            schema = core_schema.str_schema(pattern=text, regex_engine="rust-regex")
            validator = SchemaValidator(schema)
    except SchemaError as error:
        raise ValueError(str(error)) from error
    return validator


def _end_of_group(pattern: str) -> int:
    """Where the group ends that an expression begins with; 0 if that is not all of an alternative,
    or no group."""
    depth, end = 0, 0
    for token in _TOKEN.finditer(pattern):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if depth == 0 and token[0] == "|":
            return 0
        if depth == 0 and not end:
            end = token.end()
    return end
