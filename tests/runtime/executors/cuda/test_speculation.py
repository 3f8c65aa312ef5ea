"""Drafts on a GPU with a micro engine: in Triton's interpreter, or on a GPU natively."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from tests.runtime.executors.cuda.test_executor import LIMITS, SHAPE
from tests.runtime.speculation.hostile import NAME, HostileProposer, hostile
from tests.tiny_models import save_tiny
from transformers import LlamaConfig

from slipstream import LLM, SamplingParams
from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions
from slipstream.plugins.cuda.launch import interpreting
from slipstream.plugins.linear.cuda import tactics
from slipstream.runtime.executors.cuda import buckets, runner

# What padding computes is undefined, of which NumPy warns in the interpreter.
pytestmark = [pytest.mark.kernel, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
PROMPTS = [[5, 6, 7, 8, 9, 10], [100, 3]]
KINDS: list[dict[str, Any]] = [
    {"temperature": 0, "logprobs": 1, "frequency_penalty": 0.4},
    {"temperature": 1.0, "seed": 5, "top_k": 30},
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = save_tiny(LlamaConfig(**SHAPE), tmp_path_factory.mktemp("micro"))
    build(checkpoint, checkpoint / "engine", BuildOptions(target="cuda", max_seq_len=96))
    return checkpoint / "engine"


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Capturing takes the interpreter seconds, and a GEMV one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "MIXED_TOKENS", (16,))
        patch.setattr(runner, "PREPARED_SEQUENCES", 0)
        if interpreting():
            patch.setattr(tactics, "_GUESS_GEMV_TOKENS", 0)
        yield


def answers(llm: LLM, **more: Any) -> list[list[int]]:  # noqa: ANN401
    params = [SamplingParams(max_tokens=5, ignore_eos=True, **kind, **more) for kind in KINDS]
    outputs = llm.generate(PROMPTS, params)
    for output, kind in zip(outputs, KINDS, strict=True):
        logprobs = output.outputs[0].logprobs
        assert (logprobs is not None and len(logprobs) == 5) == ("logprobs" in kind)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_drafts_change_no_answer(engine: Path, deterministic: bool) -> None:
    """Those that are right, wrong, of no token, too many and none, for two sequences at once."""
    options: dict[str, Any] = {**LIMITS, "deterministic": deterministic, "speculative": NAME}
    options |= {"enable_prefix_caching": False, "num_speculative_tokens": 3}
    with hostile(), LLM(engine, **options) as llm:
        plain = answers(llm, speculative=False)
        assert llm.stats.speculation is not None and not llm.stats.speculation.num_drafts
        texts = [prompt + tokens for prompt, tokens in zip(PROMPTS, plain, strict=True)]
        with patch.object(HostileProposer, "texts", texts):
            assert answers(llm) == plain
        drafts = llm.stats.speculation
    assert drafts is not None and 0 < drafts.num_accepted_tokens < drafts.num_draft_tokens
