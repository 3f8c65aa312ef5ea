"""Forms for tests, and documents driven through the masks that the sampler reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.tiny_models import write_tiny_tokenizer

from slipstream.runtime.engine.step import SamplingRow
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.sampling.sampler import Sampler
from slipstream.runtime.structured.compiler import GrammarCompiler
from slipstream.runtime.structured.grammar import Grammar
from slipstream.runtime.structured.masks import allowed_tokens
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.text.tokenizer import Tokenizer

SCHEMAS = Path(__file__).parents[2] / "fixtures" / "json_schemas" / "schemas.jsonl"
# Wider than the tiny tokenizer, as the logits of many models are.
TINY_VOCAB = 333


def tiny_tokenizer(directory: Path) -> Tokenizer:
    write_tiny_tokenizer(directory)
    return Tokenizer.from_directory(directory)


def schemas() -> Iterator[dict[str, Any]]:
    """Lines of name, schema and tests."""
    for line in SCHEMAS.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def compiled(compiler: GrammarCompiler, **form: Any) -> Grammar:  # noqa: ANN401 - any form
    return compiler.compile(StructuredOutput(**form))


class Driver:
    """Asks the sampler for masks, as an executor does, and takes given tokens as if sampled."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.sampler = Sampler(vocab_size)
        self.vocab_size = vocab_size
        self.params = SamplingParams(structured=StructuredOutput(json_object=True))

    def holds(self, grammar: Grammar, text: str) -> bool:
        """Whether every token of a text may come next, and then the end."""
        constraint = grammar.start()
        row = SamplingRow(self.params, [], [], 0, constraint=constraint)
        for token in self.tokenizer.encode(text, add_special_tokens=False):
            if not self.allowed(row)[token]:
                return False
            constraint.take(token)
        return bool(self.allowed(row)[list(self.tokenizer.eos_token_ids)].all())

    def allowed(self, row: SamplingRow) -> Any:  # noqa: ANN401 - flags, one a token
        self.sampler.constrain([row])
        assert row.mask is not None
        return allowed_tokens(row.mask, self.vocab_size)
