"""Whether schemas of a file are held: their documents, through the masks that the sampler reads.

    python benchmarks/structured_schemas.py ENGINE SCHEMAS [--json results.json]

``ENGINE`` is an engine's directory, of which only the tokenizer is read; ``SCHEMAS`` has a JSON
object a line, ``{"name", "schema", "tests": [{"valid", "data"}]}``, and may be compressed
(``.gz``). Of every schema: refused, with the reason, or held; of every document of one that is
held, in three styles of writing: allowed token by token and then ended, or not.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from slipstream.builder.engine import open_engine
from slipstream.errors import InvalidRequestError
from slipstream.runtime.engine.step import SamplingRow
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.sampling.sampler import Sampler
from slipstream.runtime.structured.compiler import GrammarCompiler
from slipstream.runtime.structured.grammar import Grammar
from slipstream.runtime.structured.masks import allowed_tokens
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.text.tokenizer import Tokenizer

_STYLES: tuple[dict[str, Any], ...] = ({}, {"separators": (",", ":")}, {"indent": 2})
_FORM = SamplingParams(structured=StructuredOutput(json_object=True))


class Checker:
    """Counts what becomes of schemas and documents, and times first masks and all masks."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.compiler = GrammarCompiler(tokenizer, vocab_size)
        self.compiler.prepare()
        self.sampler = Sampler(vocab_size)
        self.first: list[float] = []
        self.masks: list[float] = []
        self.reasons: Counter[str] = Counter()
        self.wrong: dict[str, list[str]] = {"accepted": [], "refused": []}
        self.held = 0

    def check(self, case: dict[str, Any]) -> None:
        """One line of the file."""
        begin = time.perf_counter()
        try:
            grammar = self.compiler.compile(StructuredOutput(json=case["schema"]))
        except InvalidRequestError as error:
            self.reasons[str(error)[:100]] += 1
            return
        self._mask(SamplingRow(_FORM, [], [], 0, constraint=grammar.start()))
        self.first.append(time.perf_counter() - begin)
        self.held += 1
        for test in case["tests"]:
            for style in _STYLES:
                text = json.dumps(test["data"], ensure_ascii=False, **style)
                if self._holds(grammar, text) != test["valid"]:
                    self.wrong["refused" if test["valid"] else "accepted"].append(case["name"])

    def _holds(self, grammar: Grammar, text: str) -> bool:
        constraint = grammar.start()
        row = SamplingRow(_FORM, [], [], 0, constraint=constraint)
        for token in self.tokenizer.encode(text, add_special_tokens=False):
            begin = time.perf_counter()
            allowed = self._mask(row)[token]
            self.masks.append(time.perf_counter() - begin)
            if not allowed:
                return False
            constraint.take(token)
        return bool(self._mask(row)[list(self.tokenizer.eos_token_ids)].any())

    def _mask(self, row: SamplingRow) -> Any:  # noqa: ANN401 - flags, one a token
        self.sampler.constrain([row])
        assert row.mask is not None
        return allowed_tokens(row.mask, self.vocab_size)

    def report(self, total: int) -> dict[str, Any]:
        """All figures; times in milliseconds."""
        masks = sorted(self.masks)
        return {
            "schemas": total,
            "held": self.held,
            "wrongly_accepted": self.wrong["accepted"],
            "wrongly_refused": self.wrong["refused"],
            "first_mask_ms_median": round(1000 * statistics.median(self.first), 3),
            "mask_ms_median": round(1000 * statistics.median(masks), 4),
            "mask_ms_p99": round(1000 * masks[len(masks) * 99 // 100], 3),
            "reasons": dict(self.reasons.most_common()),
        }


def main() -> None:
    """Check, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", type=Path)
    parser.add_argument("schemas", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    engine = open_engine(options.engine)
    tokenizer = Tokenizer.from_directory(options.engine, engine.manifest.vocab_size)
    checker = Checker(tokenizer, engine.manifest.vocab_size)
    opener = gzip.open if options.schemas.suffix == ".gz" else open
    with opener(options.schemas, "rt", encoding="utf-8") as file:
        cases = [json.loads(line) for line in file]
    for case in cases:
        checker.check(case)
    report = checker.report(len(cases))
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
