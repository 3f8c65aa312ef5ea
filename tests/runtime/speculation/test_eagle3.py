"""A head inside of the engine: what it guesses in a loop is what it says of the whole text."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from tests.runtime.executors.test_cpu_head import states
from tests.tiny_models import TINY_SHAPE, save_llama

from slipstream import LLM, SamplingParams
from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions
from slipstream.errors import EngineMismatchError, InvalidRequestError
from slipstream.runtime.speculation.eagle3 import Eagle3Proposer
from slipstream.runtime.speculation.proposer import Context
from slipstream.runtime.structured.output import StructuredOutput

CONFIG = specforge()
ROOM: dict[str, Any] = {"kv_cache_bytes": 16 << 20, "num_threads": 1, "speculative": "eagle3"}
PAGE_BYTES = 32 * 4 * 2 * 2 * 16 * 4  # tokens, layers with the head's, k and v, heads, float32
SCHEDULES: dict[str, dict[str, Any]] = {
    "together": {},
    "alone": {"max_batch_size": 1},
    "chunked": {"max_num_tokens": 24, "max_batch_size": 8},
    "preempted": {"kv_cache_bytes": 8 * PAGE_BYTES, "max_seq_len": 128},
}
# The others, which begin and end together or one after the other, are slow.
EVERY_DAY = [
    pytest.param(name, marks=[] if name in ("chunked", "preempted") else pytest.mark.slow)
    for name in SCHEDULES
]
Guesses = list[tuple[list[int], list[int]]]


def built(directory: Path, checkpoint: Path, config: dict[str, Any], tensors: Arrays) -> Path:
    head = save_head(directory / "head", config, tensors)
    engine = directory / "engine"
    build(checkpoint, engine, BuildOptions(speculative_model=str(head)))
    return engine


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random head."""
    directory = tmp_path_factory.mktemp("random-head")
    return built(directory, tiny_checkpoint, CONFIG, random_tensors(CONFIG))


def recorded(llm: LLM, prompts: Sequence[list[int]], params: Any) -> tuple[Any, Guesses]:  # noqa: ANN401
    """Answers, and every guess after what it was made of."""
    guesses: Guesses = []
    propose = Eagle3Proposer.propose

    def keep(made: Eagle3Proposer, contexts: Sequence[Context], most: int) -> list[list[int]]:
        found = propose(made, contexts, most)
        guesses.extend(zip([list(c.tokens) for c in contexts], found, strict=True))
        return found

    with patch.object(Eagle3Proposer, "propose", keep):
        outputs = llm.generate(prompts, params)
    return [o.token_ids for output in outputs for o in output.outputs], guesses


class Reference:
    """What the head says of a whole text, in NumPy."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.tensors = random_tensors(CONFIG)
        whole = load_file(checkpoint / "model.safetensors")
        self.embedding: NDArray[Any] = whole["model.embed_tokens.weight"]
        self.known = np.arange(CONFIG["draft_vocab_size"]) + self.tensors["d2t"]

    def guess(self, tokens: list[int], most: int) -> list[int]:
        seen = states(self.checkpoint, [2, 3, 1], tokens[:-1])
        hidden = fused(CONFIG, self.tensors, seen)
        read, guess = tokens[1:], list[int]()
        for _ in range(most):
            logits, back = forward(CONFIG, self.tensors, self.embedding[read], hidden)
            guess.append(int(self.known[logits[-1].argmax()]))
            read, hidden = [*read, guess[-1]], np.concatenate([hidden, back[-1:]])
        return guess


@pytest.mark.parametrize("schedule", EVERY_DAY)
def test_guesses_are_those_of_the_whole_text(
    engine: Path, tiny_checkpoint: Path, schedule: str
) -> None:
    reference = Reference(tiny_checkpoint)
    prompts = [list(range(20, 90)), [*range(20, 90), 7, 8], [9, 8, 7] * 12]
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=32, n=2, ignore_eos=True)
    options = {**ROOM, **SCHEDULES[schedule], "num_speculative_tokens": 4}
    with LLM(engine, **options) as llm:
        answers, guesses = recorded(llm, prompts, params)
        again, more = recorded(llm, prompts, params)  # prefixes are cached now
        preempted = llm.stats.num_preemptions
    assert answers == again
    assert (preempted > 0) == (schedule == "preempted")
    found = [each for each in guesses + more if each[1]]
    assert len(found) > 0.9 * len(guesses + more)
    sample = found[:: len(found) // 8]
    right = [guess == reference.guess(tokens, len(guess)) for tokens, guess in sample]
    # The head of a page's last token may have read another's next one; and there are near-ties.
    assert sum(right) >= 0.85 * len(right)
    assert {len(guess) for _, guess in sample} <= {1, 2, 3, 4}


def test_more_than_a_step_has_room_for_is_read_in_groups(engine: Path) -> None:
    """One sequence each, here."""
    prompts, found = [[*range(20, 24), last] for last in (3, 4, 5)], []
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for most in (64, 1):
        with LLM(engine, **ROOM, num_speculative_tokens=3) as llm:
            assert llm._loop._speculator is not None
            proposer = llm._loop._speculator._proposer
            assert isinstance(proposer, Eagle3Proposer)
            proposer._most = most
            answers, guesses = recorded(llm, prompts, params)
        found.append((answers, {tuple(tokens): guess for tokens, guess in guesses}))
    assert found[0] == found[1]
    assert all(found[0][1].values())


def test_pages_come_back_from_the_host_with_those_of_the_head(engine: Path) -> None:
    """So that answers and guesses are those of pages that never went there."""
    prompts = [[first + i % 9 for i in range(80)] for first in (2, 20, 40)] * 2
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    options = {**ROOM, "max_batch_size": 1, "max_seq_len": 128, "num_speculative_tokens": 3}
    found = []
    for more in ({}, {"kv_cache_bytes": 5 * PAGE_BYTES, "kv_offload_gib": 0.01}):
        with LLM(engine, **{**options, **more}) as llm:
            found.append(recorded(llm, prompts, params))
            stats = llm.stats
    assert stats.host_hits
    assert found[0] == found[1]


def counting(
    directory: Path, size: int = 64, layers: int = 3, vocab: int | None = None
) -> tuple[Path, dict[str, Any], Arrays]:
    """A model in which token i + 7 comes after i, and a head that knows it: of 64 orthogonal
    embeddings each is one of its own; attention of the head sees nothing but its own token."""
    heads, vocab = size // 16, vocab or size
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0].astype(np.float32)
    rows = rows[:vocab]
    after = np.roll(rows, 7, axis=0)  # of j: the row of the token before it
    shape = {**TINY_SHAPE, "vocab_size": vocab, "num_hidden_layers": layers,
             "tie_word_embeddings": False, "eos_token_id": vocab - 1, "hidden_size": size,
             "intermediate_size": 2 * size, "num_attention_heads": heads,
             "num_key_value_heads": heads // 2}  # fmt: skip
    one, zeros = np.ones(size, np.float32), np.zeros
    arrays: Arrays = {"model.embed_tokens.weight": rows, "model.norm.weight": one,
                      "lm_head.weight": after}  # fmt: skip
    for layer in range(layers):
        name = f"model.layers.{layer}."
        shapes = {"self_attn.q_proj": (size, size), "self_attn.k_proj": (size // 2, size),
                  "self_attn.v_proj": (size // 2, size), "self_attn.o_proj": (size, size),
                  "mlp.gate_proj": (2 * size, size), "mlp.up_proj": (2 * size, size),
                  "mlp.down_proj": (size, 2 * size)}  # fmt: skip
        arrays |= {f"{name}{key}.weight": zeros(each, np.float32) for key, each in shapes.items()}
        arrays |= {f"{name}{x}_layernorm.weight": one for x in ("input", "post_attention")}
    checkpoint = save_llama(directory / "counting", arrays, **shape)
    config = specforge(vocab_size=vocab, draft_vocab_size=vocab, hidden_size=size,
                       num_attention_heads=heads, num_key_value_heads=heads,
                       norm_output=True, layer_types=["sliding_attention"],
                       sliding_window=1)  # fmt: skip
    if layers == 1:
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [0, 0, 0]}
    tensors = {
        name: np.zeros_like(x) if x.ndim == 2 else np.ones_like(x)
        for name, x in random_tensors(config).items()
        if name not in ("d2t", "t2d")
    }
    tensors["fc.weight"][:, :size] = np.eye(size)
    tensors["layers.0.self_attn.v_proj.weight"][:, :size] = np.eye(size)
    tensors["layers.0.self_attn.o_proj.weight"][:] = 10 * np.eye(size)
    tensors["lm_head.weight"] = after
    return checkpoint, config, tensors


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head that is always right."""
    directory = tmp_path_factory.mktemp("knowing")
    return built(directory, *counting(directory))


@pytest.mark.parametrize("schedule", EVERY_DAY)
def test_right_guesses_save_steps(knowing: Path, schedule: str) -> None:
    prompts = [[start] * 40 for start in (1, 2, 5)]
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    options = {**ROOM, **SCHEDULES[schedule], "num_speculative_tokens": 7}
    with LLM(knowing, **options) as llm:
        for _ in range(2):
            outputs = llm.generate(prompts, params)
            for prompt, output in zip(prompts, outputs, strict=True):
                counted = [(prompt[0] + 7 * i) % 64 for i in range(1, 61)]
                assert output.outputs[0].token_ids == counted
        stats = llm.stats.speculation
    assert stats is not None and stats.num_accepted_tokens > 200
    if schedule != "preempted":  # where a sequence begins anew, what is read of it is whole again
        assert stats.num_accepted_tokens >= 0.99 * stats.num_draft_tokens


def test_other_ways_of_sampling_say_the_same(knowing: Path) -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 5.0, "seed": 5, "n": 2},
        {"temperature": 0, "frequency_penalty": 2.0},
        {"temperature": 0, "bad_words_token_ids": [[8], [15, 22]]},
        {"temperature": 0, "speculative": False},
    ]
    assert_same(knowing, [SamplingParams(max_tokens=40, ignore_eos=True, **k) for k in kinds])


def test_a_form_is_kept(engine: Path) -> None:
    forms = [StructuredOutput(regex="[a-f]{5,30}"), StructuredOutput(regex="(the cat|the dog) sat")]
    params = [SamplingParams(max_tokens=40, temperature=t, seed=1, structured=form)
              for t in (0, 1.0) for form in forms]  # fmt: skip
    assert_same(engine, params)


def assert_same(engine: Path, params: list[SamplingParams]) -> None:
    found = []
    for options in ({"speculative": "off"}, {"num_speculative_tokens": 5}, {}):
        with LLM(engine, **{**ROOM, **options}) as llm:
            outputs = llm.generate([[1, 8, 15]] * len(params), params)
        found.append([[o.token_ids for o in each.outputs] for each in outputs])
    assert found[0] == found[1] == found[2]


def test_a_head_guesses_several_tokens_in_one_run(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = specforge(pard_token=MASK_TOKEN)
    tensors = random_tensors(config)
    mask = np.random.default_rng(1).normal(0, 1, (1, 192)).astype(np.float32)
    made = built(tmp_path, tiny_checkpoint, config, {**tensors, "mask_hidden": mask})
    runs = []
    run = Eagle3Proposer._run

    def count(proposer: Eagle3Proposer, rows: Any) -> Any:  # noqa: ANN401
        runs.append(len(rows))
        return run(proposer, rows)

    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    options = {**ROOM, "num_speculative_tokens": 5}
    with patch.object(Eagle3Proposer, "_run", count), LLM(made, **options) as llm:
        with_drafts, guesses = recorded(llm, [[3, 4, 5]], params)
        assert llm.stats.speculation is not None and llm.stats.speculation.num_draft_tokens
    with LLM(made, **{**ROOM, "speculative": "off"}) as llm:
        assert recorded(llm, [[3, 4, 5]], params)[0] == with_drafts
    assert max(len(guess) for _, guess in guesses) == 5
    assert len(runs) == 1 + len([guess for _, guess in guesses if guess])  # and the prompt


def test_an_engine_without_a_head_is_refused(tiny_engine: Path, engine: Path) -> None:
    with pytest.raises(EngineMismatchError, match="has no head; build it again with one: slip"):
        LLM(tiny_engine, **ROOM)
    with pytest.raises(InvalidRequestError, match=r"head in the engine is .*head; leave it out"):
        LLM(engine, **ROOM, speculative_model="another")


def test_a_checkpoint_is_built_with_its_head(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    head = save_head(tmp_path / "head", CONFIG, random_tensors(CONFIG))
    config = json.dumps({"method": "eagle3", "model": str(head), "num_speculative_tokens": 2})
    with LLM(tiny_checkpoint, num_threads=1, speculative_config=config) as llm:
        llm.generate(["the cat"], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
        assert llm.stats.speculation is not None and llm.stats.speculation.num_drafts > 0
