"""SmolLM2 says the same with and without drafts, greedy and drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipstream import LLM, SamplingParams

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

_CODE = "def area(width, height):\n    return width * height\n\n\n"
_PROMPTS = [
    f"```python\n{_CODE}```\nThe same again:\n```python\n",
    "List the numbers from one to thirty: one, two, three,",
    "Once upon a time",
]


@pytest.mark.parametrize("count", ["auto", 3, 7])
def test_drafts_change_no_answer(smollm2_engine: Path, count: int | str) -> None:
    params = [
        SamplingParams(temperature=temperature, seed=index, max_tokens=80, repetition_penalty=1.05)
        for index, temperature in enumerate((0.0, 0.8, 1.0))
    ]
    found = []
    for options in ({}, {"speculative": "ngram", "num_speculative_tokens": count}):
        with LLM(smollm2_engine, kv_cache_bytes=64 << 20, **options) as llm:
            outputs = llm.generate(_PROMPTS * 3, [each for each in params for _ in _PROMPTS])
            found.append([output.outputs[0].token_ids for output in outputs])
            stats = llm.stats.speculation
    assert found[0] == found[1]
    assert stats is not None and stats.num_accepted_tokens > 0
