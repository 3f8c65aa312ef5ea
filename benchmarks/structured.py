"""What structured output costs beside a device, and what forced tokens save.

    python benchmarks/structured.py ENGINE --json benchmarks/results/structured.json
    python benchmarks/structured.py ENGINE --rounds 1 --step-ms 0 --answers 1024  # its steps

The device is the counting model with steps of 8 ms, which takes its own time beside the host, once
with and once without running ahead; it answers as a model would that writes a valid document of
the schema, of those in ``--schemas``. The vocabulary is that of ``ENGINE``, an engine's directory.
So many answers, 64 at once:

    plain   without a form
    steps   held to the schema of its document, a step a token
    jumps   the same with forced tokens appended
    one way the same, held to one way of spacing JSON (``disable_any_whitespace``)

All take turns in every round; reported are medians of tokens a second over rounds, and the steps of
the device, which no load of the machine changes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpu_peers import cpu_name

from slipstream import LLM, SamplingParams
from slipstream.builder.engine import open_engine
from slipstream.errors import InvalidRequestError
from slipstream.runtime.engine.step import SamplingRow, StepBatch, StepResult
from slipstream.runtime.executors.counting import CountingExecutor, counting_contract
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.structured.compiler import GrammarCompiler
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.testing import counting_engine
from slipstream.runtime.text.tokenizer import Tokenizer

SCHEMAS = Path(__file__).parents[1] / "tests" / "fixtures" / "json_schemas" / "schemas.jsonl"
STREAMS = 64
_PAGE_SIZE = 16
_MOST_TOKENS = 400
Document = tuple[StructuredOutput, list[int]]


class Writer(CountingExecutor):
    """Goes on with the document whose number is a prompt's first token, and checks nothing: that
    would take the host longer than a step."""

    documents: list[list[int]]

    def _run(self, planned: StepBatch, excused: bool) -> StepResult:
        tokens = [self._token(row) for row in planned.sampling]
        return StepResult(tokens, [None] * len(tokens))

    def _token(self, row: SamplingRow) -> int:
        document = self.documents[row.prompt[0]]
        return document[min(row.position, len(document) - 1)]


@dataclass(frozen=True)
class Case:
    """A way to answer."""

    runs_ahead: bool
    kind: str
    step_seconds: float

    @property
    def name(self) -> str:
        return f"{self.kind} {'ahead' if self.runs_ahead else 'in turn'}"


def documents(tokenizer: Tokenizer, vocab_size: int, schemas: Path, answers: int) -> list[Document]:
    """Valid documents of schemas that are held, one an answer, each ending with the end's token."""
    compiler, found = GrammarCompiler(tokenizer, vocab_size), list[Document]()
    opener = gzip.open if schemas.suffix == ".gz" else open
    with opener(schemas, "rt", encoding="utf-8") as file:
        cases = [json.loads(line) for line in file]
    for case in cases:
        form = StructuredOutput(json=case["schema"])
        try:
            compiler.compile(form)
        except InvalidRequestError:
            continue
        for test in case["tests"]:
            text = json.dumps(test["data"], ensure_ascii=False)
            tokens = tokenizer.encode(text, add_special_tokens=False)
            if test["valid"] and 20 <= len(tokens) < _MOST_TOKENS:
                found.append((form, [*tokens, min(tokenizer.eos_token_ids)]))
    # The longest come first, so that all end at about the same time.
    chosen = [found[i % len(found)] for i in range(answers)]
    return sorted(chosen, key=lambda answer: -len(answer[1]))


def engine_of(case: Case, tokenizer: Tokenizer, vocab_size: int) -> LoadedEngine:
    """A counting engine with a model's vocabulary."""
    pages = STREAMS * (_MOST_TOKENS // _PAGE_SIZE + 2)
    engine = counting_engine(
        pages,
        page_size=_PAGE_SIZE,
        max_batch_size=STREAMS,
        max_seq_len=_MOST_TOKENS + 8,
        enable_jump_decoding=case.kind in ("jumps", "one way"),
    )
    graphs, caches = counting_contract(_PAGE_SIZE, vocab_size)
    device = Writer(pages, graphs, caches, delay=case.step_seconds, runs_ahead=case.runs_ahead)
    return replace(
        engine, executor=device, caches=caches, tokenizer=tokenizer, vocab_size=vocab_size
    )


def form_of(case: Case, form: StructuredOutput) -> StructuredOutput | None:
    """The form of a document in a case."""
    if case.kind == "plain":
        return None
    return replace(form, disable_any_whitespace=True) if case.kind == "one way" else form


def measure(
    case: Case, tokenizer: Tokenizer, vocab_size: int, texts: list[Document]
) -> tuple[float, int]:
    """Tokens a second, after one run to warm up, and steps."""
    engine = engine_of(case, tokenizer, vocab_size)
    assert isinstance(engine.executor, Writer)
    engine.executor.documents = [tokens for _, tokens in texts]
    prompts = [[index, 1, 2] for index in range(len(texts))]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=_MOST_TOKENS,
            structured=form_of(case, form),
        )
        for form, _ in texts
    ]
    with LLM.from_engine(engine) as llm:
        llm.generate(prompts, params)
        begin, steps = time.perf_counter(), engine.executor.steps
        outputs = llm.generate(prompts, params)
        seconds, steps = time.perf_counter() - begin, engine.executor.steps - steps
    return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds, steps


def main() -> None:
    """Run, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", type=Path)
    parser.add_argument("--schemas", type=Path, default=SCHEMAS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--answers", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    vocab_size = open_engine(options.engine).manifest.vocab_size
    tokenizer = Tokenizer.from_directory(options.engine, vocab_size)
    texts = documents(tokenizer, vocab_size, options.schemas, options.answers)
    kinds = ("plain", "steps", "jumps", "one way")
    cases = [Case(ahead, kind, options.step_ms / 1000) for ahead in (True, False) for kind in kinds]
    rounds: dict[str, list[float]] = {case.name: [] for case in cases}
    steps: dict[str, int] = {}
    for number in range(options.rounds):
        for case in cases:
            rate, steps[case.name] = measure(case, tokenizer, vocab_size, texts)
            rounds[case.name].append(rate)
            print(f"round {number + 1}: {case.name}: {rate:.0f} tokens/s", flush=True)
    rates = {name: statistics.median(measured) for name, measured in rounds.items()}
    report: dict[str, Any] = {"cpu": cpu_name(), "streams": STREAMS, "step_ms": options.step_ms}
    report["answers"] = options.answers
    report["device_steps"] = steps
    if options.step_ms:  # else they are those of the host
        report |= {"tokens_per_second": rates, "rounds": rounds}
    for ahead in ("ahead", "in turn"):
        plain, held, jumps, one_way = (rates[f"{kind} {ahead}"] for kind in kinds)
        _, most, fewer, fewest = (steps[f"{kind} {ahead}"] for kind in kinds)
        report[ahead] = {
            "gain_by_jumps_in_steps": most / fewer - 1,
            "gain_by_one_way_in_steps": most / fewest - 1,
        }
        if options.step_ms:
            report[ahead] |= {
                "loss": 1 - held / plain,
                "gain_by_jumps": jumps / held - 1,
                "gain_by_one_way": one_way / held - 1,
            }
        figures = "  ".join(f"{name} {value:.1%}" for name, value in report[ahead].items())
        print(f"{ahead}: {figures}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
