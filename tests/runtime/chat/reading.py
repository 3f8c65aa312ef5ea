"""What tests of dialects share: a tokenizer of bytes and markers, and turns from streams."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import llguidance
import tokenizers

from slipstream.runtime.chat.dialect import Dialect
from slipstream.runtime.chat.events import AssistantTurn, OutputParser
from slipstream.runtime.chat.options import ChatOptions, Tool
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.runtime.text.tokenizer_settings import TokenizerSettings

WEATHER = Tool(
    "get_weather",
    "The weather of a city.",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Which."},
            "days": {"type": "integer", "description": "How many."},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
    strict=True,
)
CLOCK = Tool("now", "The time.", {"type": "object", "properties": {}}, strict=True)
TOOLS = (WEATHER, CLOCK)
WITH_TOOLS = ChatOptions(tools=TOOLS)


def byte_tokenizer(template: str, *special: str, added: Sequence[str] = ()) -> Tokenizer:
    """A token a byte, special tokens, added ones that are not special, and a chat template."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", *special])
    backend.add_tokens(list(added))
    settings = TokenizerSettings({"eos_token": "<eos>"}, chat_templates={"default": template})
    return Tokenizer(backend, settings)


@cache
def _compiler(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(
        tokenizer._backend.to_str(), eos_token=tokenizer.token_to_id("<eos>")
    )


def matcher(tokenizer: Tokenizer, form: StructuredOutput) -> llguidance.LLMatcher:
    """What holds tokens to a grammar."""
    assert form.kind == "grammar"
    made = llguidance.LLMatcher(_compiler(tokenizer), form.text)
    assert not made.is_error(), made.get_error()
    return made


def allows(tokenizer: Tokenizer, form: StructuredOutput, text: str) -> bool:
    """Whether a grammar takes all of ``text``, and the end after it."""
    held = matcher(tokenizer, form)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return held.try_consume_tokens(tokens) == len(tokens) and held.is_accepting()


def turn(parser: OutputParser, pieces: Sequence[str]) -> AssistantTurn:
    """What a parser makes of a text in pieces, with ids left out."""
    whole = AssistantTurn()
    for piece in pieces:
        for event in parser.push(piece):
            whole.add(event)
    for event in parser.finish():
        whole.add(event)
    for call in whole.calls:
        assert call.call_id
        call.call_id = ""
    return whole


def read(dialect: Dialect, text: str, prompt: str = "") -> AssistantTurn:
    """The turn of a text that comes at once, with all tools given."""
    return turn(dialect.parser(WITH_TOOLS, prompt), [text])
