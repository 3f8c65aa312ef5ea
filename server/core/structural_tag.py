"""Free text in which tags stand, each from its trigger on held to a schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llguidance import StructTag

from slipstream.errors import InvalidRequestError
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.server.core.limits import MAX_TOOLS


def structural_tag(tag: Any, tokenizer: Tokenizer) -> StructuredOutput:  # noqa: ANN401 - JSON
    """The form of ``tag``, decoded JSON; raises ``InvalidRequestError``."""
    if not isinstance(tag, Mapping):
        raise _malformed()
    form = tag.get("format", tag)
    try:
        triggers = [str(trigger) for trigger in form["triggers"]]
        structures = list(_structures(form))
        tags = [_struct_tag(structure, triggers, tokenizer) for structure in structures]
        special = any(t.trigger.startswith("<[") for t in tags)
        grammar = StructTag.to_grammar(tags, assume_special=special)
    except (KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise _malformed() from error
    return StructuredOutput(grammar=grammar)


def _structures(form: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Beginning, schema and end of every tag, in vLLM's older form or xgrammar's newer one."""
    if form.get("at_least_one") or form.get("stop_after_first"):
        raise InvalidRequestError(
            "a structural tag with at_least_one or stop_after_first is not supported by this "
            "server; leave them out, or give a grammar",
            param="structured",
        )
    listed: Sequence[Any] = form["structures"] if "structures" in form else form["tags"]
    if len(listed) > MAX_TOOLS:
        raise InvalidRequestError(
            f"a structural tag has {len(listed)} tags; this server takes {MAX_TOOLS}",
            param="structured",
        )
    for structure in listed:
        content = structure.get("content", {"json_schema": structure.get("schema")})
        yield structure["begin"], content["json_schema"], structure["end"]


def _struct_tag(
    structure: tuple[str, Any, str], triggers: Sequence[str], tokenizer: Tokenizer
) -> StructTag:
    begin, schema, end = structure
    trigger = next((t for t in triggers if t and begin.startswith(t)), None)
    if trigger is None:
        raise _malformed()
    token, rest = tokenizer.token_to_id(trigger), begin[len(trigger) :]
    if token is not None and trigger.startswith("<"):  # one token, which no text is
        trigger = f"<[{token}]>"
    return StructTag(
        trigger=trigger, begin=trigger + rest, grammar=json.dumps(schema or {}), end=end
    )


def _malformed() -> InvalidRequestError:
    return InvalidRequestError(
        "a structural tag is {'type': 'structural_tag', 'triggers': ['<f'], 'structures': "
        "[{'begin': '<f=name>', 'schema': {...}, 'end': '</f>'}]}, or with 'format' of type "
        "triggered_tags; every begin starts with a trigger",
        param="structured",
    )
