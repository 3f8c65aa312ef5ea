"""Greedy tokens of SmolLM2 in float32 are those of transformers, however the work is scheduled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from slipstream import SamplingParams
from slipstream.builder.build import build
from slipstream.builder.engine import open_engine
from slipstream.builder.options import BuildOptions
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.loading import load
from slipstream.runtime.request import RequestOutput
from slipstream.runtime.request_factory import RequestFactory

pytestmark = pytest.mark.real_model
OUTPUT_TOKENS = 32
GREEDY = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
SHARED = "The history of computing begins long before the electronic machines of today. " * 4
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics are",
    "Q: What is 17 + 25?\nA:",
    "Dear Sir or Madam,\n\nI am writing to",
    "List five fruits:\n1.",
    "Il était une fois",
    "SELECT name, age FROM users WHERE",
    "The quick brown fox",
    "In 1969, humans first",
    '{"name": "Ada", "born":',
    "Water boils at",
    "To make bread you need",
    "日本の首都は",
    "import numpy as np\n\n",
    SHARED + "The abacus",
    SHARED + "Charles Babbage",
    SHARED + "In the 1940s",
    SHARED + "Ada Lovelace",
]


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> PreTrainedModel:
    """The model as transformers reads it, in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    return model


@pytest.fixture(scope="module")
def dense_engine(
    reference: PreTrainedModel, smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The unquantized float32 engine of the same weights."""
    checkpoint = tmp_path_factory.mktemp("smollm2-float32")
    weights = {
        name: tensor for name, tensor in reference.state_dict().items() if name != "lm_head.weight"
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        checkpoint / "model.safetensors",
    )
    config = {
        key: value
        for key, value in reference.config.to_dict().items()
        if key != "quantization_config"
    }
    (checkpoint / "config.json").write_text(json.dumps(config, default=str))
    AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name).save_pretrained(
        checkpoint
    )
    build(checkpoint, checkpoint / "engine", BuildOptions())
    (checkpoint / "model.safetensors").unlink()
    return checkpoint / "engine"


def run(
    engine: Path,
    prompts: Sequence[str],
    stagger: int = 0,
    params: SamplingParams = GREEDY,
    **options: object,
) -> tuple[list[RequestOutput], EngineLoop]:
    """Complete prompts; one more arrives every ``stagger`` steps (0: all at once)."""
    loaded = load(engine, options)
    loop, factory = EngineLoop(loaded), RequestFactory(loaded)
    waiting = [
        factory.request(prompt, params, request_id=str(i), output_kind="final")
        for i, prompt in enumerate(prompts)
    ]
    done: dict[str, RequestOutput] = {}
    step = 0
    while waiting or loop.has_work:
        arrivals = 0 if stagger and step % stagger else 1 if stagger else len(waiting)
        for request in waiting[:arrivals]:
            loop.add_request(request)
        waiting = waiting[arrivals:]
        done |= {output.request_id: output for output in loop.step() if output.finished}
        step += 1
    loop.shutdown()
    return [done[str(i)] for i in range(len(prompts))], loop


_EXPECTED: dict[tuple[int, ...], list[int]] = {}


def assert_greedy(
    reference: PreTrainedModel, outputs: Sequence[RequestOutput], length: int = OUTPUT_TOKENS
) -> None:
    """Each token is the one transformers finds most likely after everything before it."""
    for output in outputs:
        prompt, tokens = output.prompt_token_ids, output.outputs[0].token_ids
        assert len(tokens) == length
        key = (*prompt, *tokens)
        if key not in _EXPECTED:
            with torch.no_grad():
                logits = reference(torch.tensor([key])).logits[0]
            _EXPECTED[key] = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert tokens == _EXPECTED[key], output.prompt


def test_alone(reference: PreTrainedModel, dense_engine: Path) -> None:
    few = PROMPTS[::4]
    outputs, _ = run(dense_engine, few, max_batch_size=1, enable_prefix_caching=False)
    assert_greedy(reference, outputs)


def test_batch_of_16_with_staggered_arrivals(
    reference: PreTrainedModel, dense_engine: Path
) -> None:
    outputs, _ = run(dense_engine, PROMPTS, stagger=3, max_batch_size=16)
    assert_greedy(reference, outputs)


@pytest.mark.slow
def test_prefill_in_chunks_of_16(reference: PreTrainedModel, dense_engine: Path) -> None:
    outputs, _ = run(dense_engine, PROMPTS, max_num_tokens=16, max_batch_size=4)
    assert_greedy(reference, outputs)


@pytest.mark.slow
def test_prefix_hits(reference: PreTrainedModel, dense_engine: Path) -> None:
    outputs, _ = run(dense_engine, PROMPTS, stagger=6, max_batch_size=2)
    shared = [
        output
        for output in outputs
        if output.prompt is not None and output.prompt.startswith(SHARED)
    ]
    assert all(output.num_cached_tokens >= 32 for output in shared[1:])
    assert_greedy(reference, outputs)


def test_preemption(reference: PreTrainedModel, dense_engine: Path) -> None:
    page_bytes = 32 * 30 * 2 * 3 * 64 * 4
    outputs, loop = run(dense_engine, PROMPTS, kv_cache_bytes=12 * page_bytes, max_batch_size=8)
    assert loop.stats.num_preemptions > 0
    assert_greedy(reference, outputs)


def test_onnxruntime_alone(reference: PreTrainedModel, smollm2_gguf: Path, tmp_path: Path) -> None:
    """Target onnxruntime, without an operator of ours: chunks beside decodes, in slots. The codes
    of the file stay codes, and x is not rounded: the tokens are those of its weights."""
    options = BuildOptions(target="onnxruntime", dtype="float32", max_seq_len=512)
    manifest = build(smollm2_gguf, tmp_path / "engine", options)
    assert manifest.quantization == "checkpoint"
    few = replace(GREEDY, max_tokens=8)
    limits = {"max_batch_size": 2, "max_num_tokens": 32}
    outputs, _ = run(tmp_path / "engine", PROMPTS[::16], stagger=2, params=few, **limits)
    assert_greedy(reference, outputs, length=8)


def test_logprobs_of_the_quantized_engine(reference: PreTrainedModel, smollm2_engine: Path) -> None:
    """The 4-bit engine, which rounds activations to 8 bits, scores prompts almost as the float32
    model does."""
    assert open_engine(smollm2_engine).manifest.quantization == "checkpoint"
    loaded = load(smollm2_engine, {"enable_prefix_caching": False})
    loop, factory = EngineLoop(loaded), RequestFactory(loaded)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    request = factory.request(SHARED, params, output_kind="final")
    loop.add_request(request)
    outputs: list[RequestOutput] = []
    while loop.has_work:
        outputs += loop.step()
    loop.shutdown()
    assert outputs[-1].prompt_logprobs is not None
    ours = np.array([entry.logprob for entry in outputs[-1].prompt_logprobs if entry is not None])
    tokens = torch.tensor([request.prompt_token_ids])
    with torch.no_grad():
        theirs = (
            reference(tokens)
            .logits[0, :-1]
            .log_softmax(-1)
            .gather(1, tokens[0, 1:, None])[:, 0]
            .numpy()
        )
    assert abs(float(ours.mean() - theirs.mean())) < 0.02
