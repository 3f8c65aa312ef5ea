"""From what a caller says of an answer's form to grammars for one engine's tokens."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from slipstream.errors import EngineMismatchError, InvalidRequestError
from slipstream.runtime.structured.gbnf import lark_of
from slipstream.runtime.structured.grammar import Grammar, short
from slipstream.runtime.structured.guard import Guard
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from llguidance._lib import JsonCompileOptions

# Characters of a schema or grammar; the tools of a large agent take a tenth of that.
MAX_TEXT = 512 << 10
_SECONDS = 5.0
# Of what is kept, compiled grammars and characters of their texts.
_MOST_GRAMMARS = 256
_MOST_CHARACTERS = 8 << 20
# As llguidance's LLParserLimits names them: some 50 ms for a lexer, 5 ms for a mask.
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
_JSON_OPTIONS: JsonCompileOptions = {
    "coerce_one_of": False,
    "lenient": False,
}

# Kind, spacing of JSON, text.
_Key = tuple[str, str, str]
# What the library says by a name of its own.
_SCHEMA = "failed to compile JSON schema: "
_PARTS = {_SCHEMA: "JSON schema", "invalid regex": "regex"}
# Where in a grammar one of these stands, and the lines of the grammar.
_PART = re.compile(rf"at \d+\(\d+\): ({'|'.join(_PARTS)})")
_LISTING = re.compile(r"\n *\d+ \| ")
_REASONS = {"NoExtensionBias": "no text is of this form"}


class GrammarCompiler:
    """Compiles each form once and keeps it; safe to use from several threads.

    Where the library cannot know the tokens of a tokenizer, every ``compile`` says so.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """``vocab_size`` is the width of the logits, which may exceed the number of tokens."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = sorted(token for token in tokenizer.eos_token_ids if token < vocab_size)
        self._kept: OrderedDict[_Key, Grammar] = OrderedDict()
        self._characters = 0
        self._lock = threading.Lock()
        self._first = threading.Lock()

    def prepare(self) -> None:
        """Make what all grammars need, while which nothing else of Python runs: a second or two for
        a vocabulary of 100,000 tokens. A tokenizer that cannot have grammars is no error yet."""
        with suppress(EngineMismatchError), self._first:
            _ = self._tokens

    def prepare_aside(self) -> None:
        """Do so in a thread: at the start, and not when others wait for their tokens."""
        threading.Thread(target=self.prepare, name="slipstream-grammars", daemon=True).start()

    def compile(self, output: StructuredOutput) -> Grammar:
        """The grammar of a form.

        Raises ``InvalidRequestError`` for one that cannot be held, naming the keyword, or that is
        too large or too complex, and ``EngineMismatchError`` where no grammar can be had.
        """
        key = (output.kind, json.dumps(output.json_options), output.text)
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                return kept
        if len(output.text) > MAX_TEXT:
            raise InvalidRequestError(
                f"the {_name(output)} has {len(output.text)} characters, and at most {MAX_TEXT} "
                "are compiled; use a smaller one",
                param="structured",
            )
        grammar = self._compiled(output)
        self._keep(key, grammar)
        return grammar

    def _keep(self, key: _Key, grammar: Grammar) -> None:
        with self._lock:
            if key not in self._kept:
                self._characters += len(key[-1])
            self._kept[key] = grammar
            while len(self._kept) > _MOST_GRAMMARS or self._characters > _MOST_CHARACTERS:
                (*_, text), _ = self._kept.popitem(last=False)
                self._characters -= len(text)

    def _compiled(self, output: StructuredOutput) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        with self._first:  # one of them makes it
            tokens = self._tokens
        text = _source(output)
        error = self._guard.check(text)
        if not error:
            matcher = LLMatcher(tokens, text, log_level=0, limits=LLParserLimits(**_LIMITS))
            if not matcher.is_error():
                matcher.compute_bitmask()  # what every continuation begins with
            error = matcher.get_error()
        if error:
            raise _refusal(output, error)
        return Grammar(matcher)

    @cached_property
    def _guard(self) -> Guard:
        special = self._tokenizer.added_tokens
        return Guard(self._vocab_size, special, self._eos, _LIMITS, seconds=_SECONDS)

    @cached_property
    def _tokens(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        text = self._tokenizer.to_json()
        try:
            return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos or None)
        except ValueError as error:
            raise EngineMismatchError(
                f"grammars cannot be had with this model's tokenizer ({error!s:.200}); leave the "
                "structured output out",
                param="structured",
            ) from error


def _name(output: StructuredOutput) -> str:
    return "JSON schema" if output.kind in ("json", "json_object") else output.kind


def _source(output: StructuredOutput) -> str:
    """What llguidance compiles."""
    from llguidance import LLMatcher

    if output.kind == "regex":
        return LLMatcher.grammar_from_regex(output.text)
    if output.kind == "grammar":
        return LLMatcher.grammar_from_lark(lark_of(output.text))
    if output.kind == "choice":
        texts = map(json.dumps, json.loads(output.text))
        # One terminal: thousands of rules would be followed one by one.
        return LLMatcher.grammar_from_lark("start: TEXT\nTEXT: " + " | ".join(texts))
    schema = output.text.strip()
    options = cast("JsonCompileOptions", _JSON_OPTIONS | output.json_options)
    if schema == "true":  # which anything holds
        schema = "{}"
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=options)
    except ValueError as error:
        raise _refusal(output, f"it is no JSON object ({error})") from error


def _refusal(output: StructuredOutput, error: str) -> InvalidRequestError:
    # What it says of its own options is nothing that a caller could do.
    reason = error.split(". Enable 'coerce_one_of'")[0]
    name, part = _name(output), _PART.match(reason)
    if part is not None:  # of a grammar that was made around it, which a caller has not seen
        name, reason = _PARTS[part[1]], _LISTING.split(reason[part.start(1) :])[0]
        reason = reason.removeprefix(_SCHEMA)
    reason = short(reason).removesuffix(".")
    reason = _REASONS.get(reason, reason)
    return InvalidRequestError(
        f"the {name} cannot be held: {reason}. Leave out what it names, or use a simpler one",
        param="structured",
    )
