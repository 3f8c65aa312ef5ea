"""``speculative_config``: what vLLM's users write of speculation, as options of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.weights.json import Fields, Origin, option_fields

NAME = "speculative_config"
_ORIGIN = Origin(NAME, "see docs/speculation.md", InvalidRequestError)
# Where ours has another name.
_METHODS = {"draft_model": "draft"}
_INTEGERS = ("num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max")


def spelled_out(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with ``speculative_config``, an object or its JSON, as fields of
    ``RuntimeConfig``.

    Raises ``InvalidRequestError`` for keys that mean nothing here, values of another type, and what
    is said twice.
    """
    others = {name: value for name, value in options.items() if name != NAME}
    if options.get(NAME) is None:
        return others
    found = _read(option_fields(options[NAME], NAME, _ORIGIN))
    twice = sorted(name for name in found if others.get(name) is not None)
    if twice:
        raise InvalidRequestError(
            f"{NAME} says what {', '.join(twice)} is, and so does an option of its own; leave out "
            "one of the two",
            param=NAME,
        )
    return {**others, **found}


def _read(config: Fields) -> dict[str, Any]:
    known = ("method", "model", *_INTEGERS)
    unknown = sorted(set(config.values) - set(known))
    if unknown:
        raise _ORIGIN.refusal(f"has {unknown[0]!r}; known keys are {', '.join(known)}")
    method = config.text("method")
    found: dict[str, Any] = {"speculative": _METHODS.get(method, method)}
    if config.has("model"):
        found["speculative_model"] = config.text("model")
    return found | {each: config.integer(each, minimum=1) for each in _INTEGERS if config.has(each)}
