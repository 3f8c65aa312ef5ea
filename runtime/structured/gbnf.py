"""Grammars in GBNF, as llama.cpp and xgrammar read them."""

from __future__ import annotations

import re

from slipstream.errors import InvalidRequestError

# Characters; 25 µs each.
_MOST = 1 << 15
_RULE = re.compile(r"^[ \t]*[A-Za-z_][\w-]*[ \t]*::=", re.MULTILINE)


def lark_of(grammar: str) -> str:
    """The grammar in llguidance's Lark, where it is in GBNF (``root ::= ...``); raises
    ``InvalidRequestError``."""
    if not _RULE.search(grammar):
        return grammar
    if len(grammar) > _MOST:
        raise _refused(f"it has {len(grammar)} characters, and at most {_MOST} are read in GBNF")
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(grammar)
    except RecursionError as error:
        raise _refused("it is nested too deep") from error
    except Exception as error:
        raise _refused(str(error)) from error


def _refused(reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"the grammar in GBNF cannot be read: {reason[:300]}. Correct it, or give one in Lark",
        param="structured",
    )
