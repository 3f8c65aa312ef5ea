"""Schemas whose objects have the properties that they name, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Keywords that hold a schema, a list of them, or some by name. What other keywords hold is data.
_ONE = ("items", "additionalItems", "contains", "not", "if", "then", "else", "propertyNames")
_LISTS = ("anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# With these, an object has properties that other schemas name.
_JOINED = frozenset({"allOf", "$ref"})


def without_others(schema: Mapping[str, Any]) -> dict[str, Any]:
    """``schema``, at most as deep as Python goes, with ``additionalProperties`` false wherever
    properties are named and it does not say itself; parts of an ``allOf``, which each know some of
    the properties, and what has a ``$ref`` beside its own stay as they are."""
    made = dict(schema)
    for name in _ONE:
        if isinstance(made.get(name), Mapping):
            made[name] = without_others(made[name])
    for name in _LISTS:
        if isinstance(made.get(name), list):
            made[name] = [without_others(s) if isinstance(s, Mapping) else s for s in made[name]]
    for name in _NAMED:
        if isinstance(made.get(name), Mapping):
            made[name] = {
                key: without_others(inner) if isinstance(inner, Mapping) else inner
                for key, inner in made[name].items()
            }
    named = "properties" in made or "patternProperties" in made
    if named and not _JOINED & made.keys():
        made.setdefault("additionalProperties", False)
    return made
