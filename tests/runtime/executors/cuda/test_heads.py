"""Heads on a GPU: in Triton's interpreter, with products and attention in torch, or natively."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tests.eagle3_heads import (
    MASK_TOKEN,
    Arrays,
    forward,
    fused,
    random_tensors,
    save_head,
    specforge,
)
from tests.runtime.executors.cuda.torch_kernels import in_torch
from tests.runtime.executors.test_cpu_head import states
from tests.runtime.speculation.test_eagle3 import counting

from slipstream import LLM, SamplingParams
from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions
from slipstream.plugins.cuda.launch import interpreting
from slipstream.runtime.executors.cuda import buckets, runner
from slipstream.runtime.executors.cuda.device import Device
from slipstream.runtime.executors.cuda.executor import CUDAExecutor
from slipstream.runtime.speculation.eagle3 import DeviceHeadProposer
from slipstream.runtime.speculation.proposer import Guessed

# What padding computes is undefined, of which NumPy warns in the interpreter.
pytestmark = [pytest.mark.kernel, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
LIMITS: dict[str, Any] = {
    "max_batch_size": 2,
    "max_num_tokens": 16,
    "max_seq_len": 96,
    "kv_cache_bytes": 1 << 19,
    "speculative": "eagle3",
}
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Nothing is captured before it is wanted, and then not run once more."""
    with pytest.MonkeyPatch.context() as patch, in_torch() if interpreting() else nullcontext():
        patch.setattr(buckets, "MIXED_TOKENS", (16,))
        if interpreting():
            patch.setattr(runner.StepRunner, "capture", lambda *_: None)
            patch.setattr(Device, "capture", lambda _, work: work)
        yield


def built(directory: Path, checkpoint: Path, config: dict[str, Any], tensors: Arrays) -> Path:
    head = save_head(directory / "head", config, tensors)
    options = BuildOptions(target="cuda", max_seq_len=96, speculative_model=str(head))
    build(checkpoint, directory / "engine", options)
    return directory / "engine"


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which token i + 7 comes after i, and a head that is always right."""
    directory = tmp_path_factory.mktemp("knowing")
    return built(directory, *counting(directory, 32, 1))


@pytest.mark.parametrize("length", [3, "auto"])
def test_a_head_that_knows_is_believed(knowing: Path, length: int | str) -> None:
    """After a prompt in chunks, in a batch, and where the last pages end."""
    prompts = [[1] * 20, [2] * 3]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(knowing, **LIMITS, num_speculative_tokens=length) as llm:
        outputs = llm.generate(prompts, params)
        stats = llm.stats.speculation
    for prompt, output in zip(prompts, outputs, strict=True):
        counted = [(prompt[0] + 7 * i) % 32 for i in range(1, 13)]
        assert output.outputs[0].token_ids == counted
    assert stats is not None and stats.num_accepted_tokens == stats.num_draft_tokens
    assert stats.num_draft_tokens >= (12 if length == 3 else 1)


def test_a_device_that_leads_draws_and_penalizes_as_the_host_knows_it(knowing: Path) -> None:
    """Where runs of drafts are right and then wrong, as nobody expects what penalties make."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 2.0, "seed": 4, "repetition_penalty": 1.5, "frequency_penalty": 2.0},
        {"temperature": 2.0, "seed": 3, "logprobs": 1},
    ]
    params = [SamplingParams(max_tokens=24, ignore_eos=True, **kind) for kind in kinds]
    prompts, found = [[11, 5, 30, 2, 9, 16, 1], [2] * 3], []
    for speculative in ("off", "eagle3"):
        options = {**LIMITS, "speculative": speculative, "num_speculative_tokens": 3}
        with LLM(knowing, **options) as llm:
            outputs = llm.generate(prompts, params)
            stats = llm.stats.speculation
        found.append([output.outputs[0].token_ids for output in outputs])
    assert found[0] == found[1]
    assert stats is not None and 4 < stats.num_accepted_tokens < stats.num_draft_tokens - 4


def test_guesses_end_with_the_pages_of_a_sequence(knowing: Path) -> None:
    """And begin again when it has one more; a host hears of all where the device does not lead."""
    found: list[tuple[int, list[int]]] = []
    heard = DeviceHeadProposer.heard

    def keep(proposer: DeviceHeadProposer, guesses: list[Guessed]) -> None:
        found.extend((each.num_tokens, each.tokens) for each in guesses)
        heard(proposer, guesses)

    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with (
        patch.object(CUDAExecutor, "verifies_unseen", False),
        patch.object(DeviceHeadProposer, "heard", keep),
        LLM(knowing, **LIMITS, num_speculative_tokens=3) as llm,
    ):
        (output,) = llm.generate([[3] * 60], params)
    assert output.outputs[0].token_ids == [(3 + 7 * i) % 32 for i in range(1, 9)]
    by_length = dict(found)
    # At a length of n, the first guess is read at place n - 2 and the third at place n.
    assert -1 not in by_length[61] and by_length[65] == [(3 + 7 * 6) % 32, -1, -1]
    assert -1 not in by_length[max(by_length)]


@pytest.fixture(scope="module")
def random_head(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Arrays]:
    tensors = random_tensors(specforge())
    directory = tmp_path_factory.mktemp("random-head")
    return built(directory, tiny_checkpoint, specforge(), tensors), tensors


def guesses_after(engine: Path, tokens: list[int], count: int) -> list[int]:
    """What is guessed of a prompt and a token that is always the same."""
    found: list[tuple[int, list[int]]] = []

    def keep(_: DeviceHeadProposer, guesses: list[Guessed]) -> None:
        found.extend((each.num_tokens, each.tokens) for each in guesses)

    with (
        patch.object(DeviceHeadProposer, "heard", keep),
        LLM(engine, **LIMITS, num_speculative_tokens=count) as llm,
    ):
        llm.generate([tokens], SamplingParams(max_tokens=1, allowed_token_ids=[TOKENS[0]]))
    return dict(found)[len(tokens) + 1]


def reference(
    checkpoint: Path, tensors: Arrays, config: dict[str, Any], tokens: list[int]
) -> tuple[NDArray[Any], list[int], NDArray[Any]]:
    """The embedding, and what the head reads of a text: the next tokens and its states."""
    embedding = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    hidden = fused(config, tensors, states(checkpoint, [2, 3, 1], tokens[:-1]))
    return embedding, tokens[1:], hidden


def is_near(logits: NDArray[Any], guess: int, known: NDArray[Any]) -> bool:
    """Whether a guess is as likely as the likeliest, up to what 16 bits round."""
    place = int(np.flatnonzero(known == guess)[0])
    spread = float(logits.max() - logits.min())
    return float(logits.max() - logits[place]) < 0.06 * spread


def test_guesses_are_those_of_the_heads_file(
    tiny_checkpoint: Path, random_head: tuple[Path, Arrays]
) -> None:
    """In the target's vocabulary, of a prompt in two chunks and one token that was sampled."""
    engine, tensors = random_head
    tokens = [*TOKENS, TOKENS[0]]
    guessed = guesses_after(engine, TOKENS, 3)
    embedding, read, hidden = reference(tiny_checkpoint, tensors, specforge(), tokens)
    known = np.arange(100) + tensors["d2t"]
    assert len(guessed) == 3 and set(guessed) <= set(known.tolist())
    for guess in guessed:
        logits, back = forward(specforge(), tensors, embedding[read], hidden)
        assert is_near(logits[-1], guess, known)
        read, hidden = [*read, guess], np.concatenate([hidden, back[-1:]])


def test_a_head_guesses_several_tokens_at_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = specforge(pard_token=MASK_TOKEN)
    tensors = random_tensors(config)
    mask = np.random.default_rng(1).normal(0, 1, (1, 192)).astype(np.float32)
    engine = built(tmp_path, tiny_checkpoint, config, {**tensors, "mask_hidden": mask})
    prompt = [token for token in TOKENS if token != MASK_TOKEN]
    guessed = guesses_after(engine, prompt, 4)
    tokens = [*prompt, TOKENS[0]]
    embedding, read, hidden = reference(tiny_checkpoint, tensors, config, tokens)
    masks = np.split(mask.repeat(3, axis=0), 3, axis=1)
    given = np.concatenate([hidden, fused(config, tensors, list(masks))])
    logits, _ = forward(config, tensors, embedding[[*read, *[MASK_TOKEN] * 3]], given)
    known = np.arange(100) + tensors["d2t"]
    assert len(guessed) == 4
    assert all(is_near(row, g, known) for row, g in zip(logits[-4:], guessed, strict=True))


@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_guesses_change_no_answer(random_head: tuple[Path, Arrays], deterministic: bool) -> None:
    """Greedy, sampled, scored, and of a request that wants none."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0, "logprobs": 1, "frequency_penalty": 0.4},
        {"temperature": 1.0, "seed": 5, "top_k": 30, "n": 2},
        {"temperature": 0, "speculative": False},
    ]
    prompts = [TOKENS[:6], TOKENS[3:5], TOKENS]
    params = [SamplingParams(max_tokens=5, ignore_eos=True, **kind) for kind in kinds]
    found = []
    for options in ({"speculative": "off"}, {"num_speculative_tokens": 3}):
        with LLM(random_head[0], **{**LIMITS, **options, "deterministic": deterministic}) as llm:
            outputs = llm.generate(prompts, params)
            stats = llm.stats.speculation
        found.append([[o.token_ids for o in output.outputs] for output in outputs])
    assert found[0] == found[1]
    assert stats is not None and stats.num_draft_tokens > 0
