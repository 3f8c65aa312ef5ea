"""A model that answers by rules, for suites that wait for the right call of the right tool.

    python -m tests.server.by_rules ENGINE --port 8000 [--thinks]

Tokenizer and vocabulary are those of ``ENGINE``, an engine's directory. The model says the first
text that its form allows of: calls of the tools it is shown, with arguments made from their schemas
and the question (not after what a tool returned), a joke in JSON where it is asked for one, and a
sentence. With ``--thinks`` it has thoughts before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tests.runtime.chat.templates import QWEN

from slipstream.builder.engine import open_engine
from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.engine.step import SamplingRow, StepBatch, StepResult, TokenLogprobs
from slipstream.runtime.executors.counting import (
    CountingExecutor,
    CountingStep,
    counting_contract,
)
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.structured.masks import MaskFiller, allowed_tokens
from slipstream.runtime.testing import counting_engine
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.server.anthropic.api import ANTHROPIC
from slipstream.server.core.http.listener import bind
from slipstream.server.core.http.process import server_of
from slipstream.server.core.options import ServerOptions
from slipstream.server.ollama.api import OLLAMA
from slipstream.server.openai.api import OPENAI
from slipstream.server.responses.api import RESPONSES

SENTENCE = "It is 72 degrees — «très» fine 😀."
JOKE = '{"setup": "Why do cats purr?", "punchline": "They can."}'
_THOUGHTS = "<think>\nLet me see.\n</think>\n\n"
# What goes on with a value whose text no rule has.
_ENDS = ('"}', '"', '"}}', '",', "}", "]", ", ", '":', ":", "3", '{"', "a")
_PAGES, _PAGE_SIZE = 4096, 16


def example(schema: Mapping[str, Any], question: str, name: str = "") -> Any:  # noqa: ANN401 - JSON
    """A value of a schema; of a number or a name, the one in the question."""
    if "enum" in schema:
        return schema["enum"][0]
    for union in ("anyOf", "allOf"):
        if union in schema:
            return example(schema[union][0], question, name)
    match schema.get("type"):
        case "object":
            fields = schema.get("properties", {})
            return {key: example(value, question, key) for key, value in fields.items()}
        case "array":
            return [example(schema.get("items", {}), question)]
        case "integer" | "number":
            found = re.search(r"\d+", question)
            return int(found[0]) if found else 3
        case "boolean":
            return True
    quoted = re.search("'([^']+)'", question)
    if "San Francisco" in question and name == "location":
        return "San Francisco"
    return quoted[1] if quoted and name == "customer_name" else "some text"


def answers(prompt: str) -> Iterator[str]:
    """What the model would say to a prompt in the format of Hermes, the best first."""
    *_, last, _ = prompt.split("<|im_start|>")
    role, _, question = last.partition("\n")
    shown = re.findall(r'\{"type": "function", "function": .*?\}(?=\{"type": "func|Answer)', prompt)
    calls = []
    for tool in (json.loads(each)["function"] for each in shown):
        given = example(tool.get("parameters") or {"type": "object"}, question)
        call = json.dumps({"name": tool["name"], "arguments": given}, ensure_ascii=False)
        calls.append(f"<tool_call>\n{call}\n</tool_call>")
    if role != "tool":
        yield from calls
    yield from (JOKE, SENTENCE) if "joke" in question.lower() else (SENTENCE, JOKE)
    yield from calls


class ByRules(CountingExecutor):
    """Says what ``answers`` give; it keeps no context and checks none."""

    tokenizer: Tokenizer
    thinks: bool

    def constrain(self, step: CountingStep) -> None:
        """Forms were looked at before."""

    def _run(self, planned: StepBatch, excused: bool) -> StepResult:
        tokens = [self._say(row) for row in planned.sampling]
        rows = zip(tokens, planned.sampling, strict=True)
        return StepResult(tokens, [_logprobs(token, row) for token, row in rows])

    def _say(self, row: SamplingRow) -> int:
        allowed = np.ones(self._vocab_size, np.bool_)
        if row.constraint is not None:
            filler = MaskFiller(self._vocab_size)
            mask = np.zeros((1, filler.words), np.int32)
            filler.fill([row.constraint], mask)
            allowed = allowed_tokens(mask[0], self._vocab_size)
        end = min(row.eos_token_ids)
        said = self.tokenizer.decode(list(row.output), skip_special_tokens=False)
        prompt = self.tokenizer.decode(list(row.prompt), skip_special_tokens=False)
        before = _THOUGHTS if self.thinks else ""
        for text in answers(prompt):
            next_token = self._next_token(row, before + text, said, end, allowed)
            if next_token is not None:
                return next_token
        if row.constraint is None or allowed[end]:
            return end
        for text in _ENDS:
            token, *more = self.tokenizer.encode(text, add_special_tokens=False)
            if not more and allowed[token]:
                return token
        return int(np.flatnonzero(allowed)[0])

    def _next_token(
        self, row: SamplingRow, text: str, said: str, end: int, allowed: np.ndarray[Any, Any]
    ) -> int | None:
        """What comes next of a text that was begun, if its form allows that."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        count = len(row.output)
        if tokens[:count] != list(row.output):  # a form may have forced others for the same text
            if not text.startswith(said):
                return None
            tokens, count = self.tokenizer.encode(text[len(said) :], add_special_tokens=False), 0
        token = tokens[count] if count < len(tokens) else end
        return token if allowed[token] else None


def _logprobs(token: int, row: SamplingRow) -> TokenLogprobs | None:
    count = row.params.logprobs
    if count is None:
        return None
    others = {500 + i: (-2.0 - i, 2 + i) for i in range(max(0, count - 1))}
    return TokenLogprobs(token, -0.5, 1, {token: (-0.5, 1), **others})


def engine_by_rules(directory: Path, *, thinks: bool = False) -> LoadedEngine:
    """An engine with the tokenizer of another one's directory."""
    vocab_size = open_engine(directory).manifest.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "hermes.jinja"
        template.write_text(QWEN if thinks else QWEN.replace("think", "thought"))
        tokenizer = Tokenizer.from_directory(directory, vocab_size, template)
    graphs, caches = counting_contract(_PAGE_SIZE, vocab_size)
    device = ByRules(_PAGES, graphs, caches)
    device.tokenizer, device.thinks = tokenizer, thinks
    return replace(
        counting_engine(_PAGES, page_size=_PAGE_SIZE, max_batch_size=32, max_seq_len=8192),
        executor=device,
        caches=caches,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        generation_defaults=SamplingParams(temperature=0),
    )


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--thinks", action="store_true")
    options = parser.parse_args()
    llm = AsyncLLM.from_engine(engine_by_rules(options.engine, thinks=options.thinks))

    async def serve() -> None:
        settings = ServerOptions(served_model_name=("rules",))
        server = server_of(llm, settings, [OPENAI, RESPONSES, ANTHROPIC, OLLAMA])
        await server.serve([bind("127.0.0.1", options.port)])

    asyncio.run(serve())


if __name__ == "__main__":
    main()
