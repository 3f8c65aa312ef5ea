"""Structured output through ``LLM`` and ``AsyncLLM``, on engines that know nothing of it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slipstream.errors import InvalidRequestError
from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.llm import LLM
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.structured.compiler import GrammarCompiler
from slipstream.runtime.structured.grammar import Grammar
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.testing import counting_engine

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["person", "animal"]},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


def fits(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == list(SCHEMA["properties"])
        and len(value["name"]) <= 8
        and 0 <= value["age"] <= 150
        and value["kind"] in ("person", "animal")
        and len(value["tags"]) <= 2
    )


@pytest.fixture(scope="module", params=[True, False], ids=["jumps", "steps"])
def tiny(request: pytest.FixtureRequest, tiny_engine: Path) -> Iterator[LLM]:
    with LLM(tiny_engine, enable_jump_decoding=request.param, kv_cache_bytes=16 << 20) as llm:
        yield llm


def test_a_random_model_answers_in_form(tiny: LLM) -> None:
    params = SamplingParams(
        structured=StructuredOutput(json=SCHEMA), temperature=1, seed=3, n=4, max_tokens=300
    )
    (output,) = tiny.generate("the cat", params)
    ended = [each.text for each in output.outputs if each.finish_reason == "stop"]
    assert ended and all(map(fits, ended))


def test_jumping_gives_the_same_answers(tiny_engine: Path) -> None:
    """Greedy and drawn, among plain requests, with little memory: some are preempted."""
    answers = []
    for jumps in (True, False):
        options: dict[str, Any] = {"enable_jump_decoding": jumps, "max_batch_size": 6}
        with LLM(tiny_engine, kv_cache_bytes=1 << 20, **options) as llm:
            params = [
                SamplingParams(
                    structured=StructuredOutput(json=SCHEMA) if index % 3 else None,
                    temperature=index % 2,
                    seed=index,
                    max_tokens=120,
                    frequency_penalty=0.5 if index == 4 else 0,
                    stop=['"kind'] if index == 5 else (),
                )
                for index in range(8)
            ]
            outputs = llm.generate(["the dog"] * 8, params)
            answers.append([(o.outputs[0].text, o.outputs[0].token_ids) for o in outputs])
    assert answers[0] == answers[1]


def test_a_form_that_cannot_be_held_is_refused_before_anything_runs(tiny: LLM) -> None:
    params = SamplingParams(structured=StructuredOutput(json={"not": {}}))
    with pytest.raises(InvalidRequestError, match="not") as caught:
        tiny.generate(["a", "b"], [SamplingParams(max_tokens=1), params])
    assert caught.value.param == "structured"
    assert tiny.stats.num_running == tiny.stats.num_waiting == 0


@pytest.mark.real_model
def test_smollm2_answers_in_form(smollm2_engine: Path) -> None:
    with LLM(smollm2_engine) as llm:
        params = SamplingParams(
            structured=StructuredOutput(json=SCHEMA), temperature=1, seed=1, n=3, max_tokens=80
        )
        prompt = "Describe a dog named Rex in JSON."
        (output,) = llm.chat([{"role": "user", "content": prompt}], params)
    assert all(each.finish_reason == "stop" and fits(each.text) for each in output.outputs)


def test_grammars_are_compiled_off_the_event_loop_and_the_engines_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[str] = []
    told = threading.Event()
    compiling = GrammarCompiler._compiled

    def watched(self: GrammarCompiler, output: StructuredOutput) -> Grammar:
        threads.append(threading.current_thread().name)
        assert told.wait(60)  # others go on meanwhile
        return compiling(self, output)

    monkeypatch.setattr(GrammarCompiler, "_compiled", watched)

    async def text(llm: AsyncLLM, **params: Any) -> str:  # noqa: ANN401
        chosen = SamplingParams(temperature=0, max_tokens=4, **params)
        async for output in llm.generate("ab", chosen, output_kind="final"):
            return output.outputs[0].text
        raise AssertionError("no answer")

    async def both() -> tuple[str, str]:
        async with AsyncLLM.from_engine(counting_engine()) as llm:
            form = StructuredOutput(choice=["hello"])
            held = asyncio.create_task(text(llm, structured=form))
            plain = await text(llm)
            told.set()
            return plain, await held

    assert asyncio.run(both()) == ("cdef", "hell")
    assert threads and all(name.startswith("slipstream-grammar") for name in threads)
