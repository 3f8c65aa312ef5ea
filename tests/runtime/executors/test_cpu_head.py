"""The graphs of an engine with a head compute what the head's file says."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tests.eagle3_heads import (
    MASK_TOKEN,
    Arrays,
    Floats,
    forward,
    fused,
    random_tensors,
    save_head,
    specforge,
    speculators,
)

from slipstream.builder.build import build
from slipstream.builder.contract import DRAFTS, HEAD_GRAPH, HIDDEN, KV, NEXT_HIDDEN
from slipstream.builder.engine import open_engine
from slipstream.builder.options import BuildOptions
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.step import PagedInputs, SamplingRow, StepBatch
from slipstream.runtime.executors.cpu import CPUExecutor
from slipstream.runtime.sampling.params import SamplingParams

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7]
TOKENS += [9, 5, 0, 2, 8, 8, 4, 1, 9, 7]  # more than a page
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
HEADS: dict[str, tuple[dict[str, Any], bool]] = {
    "specforge": (specforge(), False),
    "more norms": (specforge(fc_norm=True, norm_output=True), True),
    "speculators": (speculators({"num_hidden_layers": 2, **SLIDING}), False),
    "before fc": (speculators({}, norm_before_fc=True, norm_before_residual=False), False),
    "narrow": (specforge(hidden_size=48, num_attention_heads=3, num_key_value_heads=1,
                         target_hidden_size=64), True),
    "all tokens": (specforge(draft_vocab_size=320), False),
}  # fmt: skip


@cache
def _model(checkpoint: Path) -> Any:  # noqa: ANN401 - of a library without types
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def states(checkpoint: Path, order: list[int], tokens: list[int]) -> list[NDArray[Any]]:
    """Those of the tiny model after some of its layers."""
    model, found = _model(checkpoint), list[NDArray[Any]]()
    # After the last layer, transformers give the states behind the norm.
    hook = model.model.layers[-1].register_forward_hook(
        lambda *of: found.append(of[2].detach().numpy())
    )
    with hook, torch.no_grad():
        seen = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    last = found[0].reshape(-1, 64)
    return [last if number == 3 else seen[number][0].numpy() for number in order]


def batch(tokens: list[int], start: int, hidden: NDArray[np.float32] | None, graph: str,
          rows: list[int], *outputs: str) -> StepBatch:  # fmt: skip
    """Tokens from a position on, of a sequence in pages 3 and 1."""
    positions = np.arange(start, start + len(tokens), dtype=np.int32)
    table = np.array([[3, 1]], np.int32)
    paged = PagedInputs(table, table[0][positions // 32] * 32 + positions % 32)
    target = graph != HEAD_GRAPH
    row = SamplingRow(SamplingParams(temperature=0), tokens, [], seed=0)
    return StepBatch(
        token_ids=np.array(tokens, np.int32),
        positions=positions,
        query_start=np.array([0, len(tokens)], np.int32),
        context_len=positions[-1:] + 1,
        logits_rows=np.array(rows, np.int32),
        sampling=[row] * len(rows) if target else [],
        slots=np.zeros(1, np.int32),
        sampling_slots=np.zeros(len(rows), np.int32),
        pages={KV: paged, HEAD_GRAPH: paged},
        graph=graph,
        outputs=outputs,
        hidden=hidden,
    )


def run(executor: CPUExecutor, step: StepBatch) -> dict[str, NDArray[Any]]:
    return executor.submit(step).sample().result().outputs


def made(tmp_path: Path, checkpoint: Path, config: dict[str, Any], tensors: Arrays) -> CPUExecutor:
    head = save_head(tmp_path / "head", config, tensors)
    engine = tmp_path / "engine"
    build(checkpoint, engine, BuildOptions(speculative_model=str(head)))
    executor = CPUExecutor(open_engine(engine), RuntimeConfig(max_seq_len=64, num_threads=1))
    executor.reserve_kv(None)
    return executor


def expected(
    config: dict[str, Any],
    tensors: Arrays,
    tokens: list[int],
    hidden: Floats,
    table: Any,  # noqa: ANN401
) -> tuple[NDArray[Any], Floats]:
    logits, back = forward(config, tensors, table[tokens], hidden)
    return (np.arange(len(logits[0])) + tensors["d2t"])[logits.argmax(1)], back


@pytest.mark.parametrize("name", HEADS)
def test_a_head_guesses_what_its_file_says(
    tiny_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    config, own = HEADS[name]
    tensors = random_tensors(config, embedding=own)
    executor = made(tmp_path, tiny_checkpoint, config, tensors)
    order = [2, 3, 1] if "speculators_model_type" not in config else [1, 2, 3]
    theirs = load_file(tiny_checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    table = tensors["embed_tokens.weight"] if own else theirs

    step = batch(TOKENS[:-1], 0, None, "target", [0], HIDDEN)
    hidden = run(executor, step)[HIDDEN]
    wanted = fused(config, tensors, states(tiny_checkpoint, order, TOKENS[:-1]))
    assert np.abs(hidden - wanted).max() < 2e-3 * np.abs(wanted).max()

    # Every token beside what is known of the one before, in two parts.
    guesses, back = expected(config, tensors, TOKENS[1:], wanted, table)
    wanted_outputs = DRAFTS, NEXT_HIDDEN
    first = batch(TOKENS[1:21], 0, hidden[:20], HEAD_GRAPH, list(range(20)), *wanted_outputs)
    found = [run(executor, first)]
    rest = batch(TOKENS[21:], 20, hidden[20:], HEAD_GRAPH, list(range(19)), *wanted_outputs)
    found.append(run(executor, rest))
    assert np.concatenate([each[DRAFTS] for each in found]).tolist() == guesses.tolist()
    given = np.concatenate([each[NEXT_HIDDEN] for each in found])
    assert np.abs(given - back).max() < 2e-3 * np.abs(back).max()

    # What it guessed beside what it made.
    tokens, hiddens = [*TOKENS[1:], int(guesses[-1])], np.concatenate([wanted, back[-1:]])
    again, _ = expected(config, tensors, tokens, hiddens, table)
    step = batch(tokens[-1:], len(tokens) - 1, given[-1:], HEAD_GRAPH, [0], DRAFTS)
    assert run(executor, step)[DRAFTS].tolist() == again[-1:].tolist()


def test_a_head_for_several_tokens_reads_its_mask(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = specforge(pard_token=MASK_TOKEN, fc_norm=True, norm_before_fc=True)
    tensors = random_tensors(config)
    mask = np.random.default_rng(1).normal(0, 1, (1, 1, 192)).astype(np.float32)
    executor = made(tmp_path, tiny_checkpoint, config, {**tensors, "mask_hidden": mask})
    theirs = load_file(tiny_checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    tokens = [t for t in TOKENS[1:20] if t != MASK_TOKEN]
    given = np.random.default_rng(2).normal(0, 1, (len(tokens), 64)).astype(np.float32)
    masks = np.split(mask.reshape(1, -1).repeat(2, axis=0), 3, axis=1)
    both = np.concatenate([given, fused(config, tensors, list(masks))])
    tokens += [MASK_TOKEN] * 2
    guesses, _ = expected(config, tensors, tokens, both, theirs)
    unread = np.concatenate([given, np.full((2, 64), 7, np.float32)])
    step = batch(tokens, 0, unread, HEAD_GRAPH, list(range(len(tokens))), DRAFTS)
    assert run(executor, step)[DRAFTS].tolist() == guesses.tolist()
