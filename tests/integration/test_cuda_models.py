"""Models on the cuda target against transformers: tiny ones everywhere, SmolLM2 on a GPU."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.integration.test_architectures import (
    CHUNKS,
    CONFIGS,
    GEMMA4_31B,
    GEMMA4_EXPERTS,
    PROMPT_TOKENS,
)
from tests.integration.test_smollm2 import PROMPTS, run
from tests.tiny_models import TINY_SHAPE, save_tiny
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma4TextConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from slipstream.builder.build import build
from slipstream.builder.options import BuildOptions
from slipstream.plugins.cuda.launch import interpreting
from slipstream.plugins.expert_linear.cuda import bind as expert_bind
from slipstream.plugins.expert_linear.cuda.experts import Experts
from slipstream.plugins.linear.cuda import tactics
from slipstream.runtime.engine.step import PagedInputs, SamplingRow, StepBatch
from slipstream.runtime.executors.cuda.executor import CUDAExecutor
from slipstream.runtime.executors.cuda.runner import StepRunner
from slipstream.runtime.loading import load
from slipstream.runtime.request import RequestOutput
from slipstream.runtime.sampling.params import SamplingParams

Logits = NDArray[np.float32]


@pytest.fixture
def uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run kernel by kernel here, and in the interpreter without GEMVs, which take it a
    second each."""
    monkeypatch.setattr(StepRunner, "capture", lambda *_: None)
    if interpreting():
        monkeypatch.setattr(tactics, "_GUESS_GEMV_TOKENS", 0)


# Standard deviations of a router's logits, and how many positions choose as float32 does.
NEAR_TIE, MOST = 0.05, 0.8
LIMITS = {"max_batch_size": 4, "max_num_tokens": 96, "max_seq_len": 128}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("uncaptured")
def test_logits_are_as_near_to_float32_as_those_of_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every position of a prompt computed in ragged chunks, beside a second sequence.

    Where two experts nearly tie, a last bit chooses, and that position is far from float32, as may
    be those that attend to it. So the first such position must be a tie, all before it must be
    near, and most of the others.
    """
    checkpoint = save_tiny(CONFIGS[name], tmp_path / "checkpoint")
    build(checkpoint, tmp_path / "engine", BuildOptions(target="cuda"))
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, TINY_SHAPE["vocab_size"], (2, PROMPT_TOKENS))
    exact, theirs = (reference_logits(checkpoint, prompts, d) for d in ("float32", "bfloat16"))
    chosen = recorded_choices(monkeypatch)
    ours = logits_in_chunks(tmp_path / "engine", prompts)
    routers, rounded = (reference_routers(checkpoint, prompts, d) for d in ("float32", "bfloat16"))
    if not routers:
        assert distance(ours, exact) < 1.5 * distance(theirs, exact) + 1e-3
        return
    same = np.ones(prompts.shape, bool)
    ties: list[Logits] = []
    for router, got in zip(routers, by_layer(chosen, len(routers)), strict=True):
        agree = (np.sort(got) == np.sort(router.experts)).all(-1)
        ties.append(np.where(same & ~agree, router.margins, 0))
        same &= agree
    agree_so_far = np.logical_and.accumulate(same, axis=1)
    first = ~agree_so_far & (np.cumsum(~same, axis=1) == 1)
    limit = 1.5 * typical(theirs, exact) + 1e-3
    # Where bf16 says little about a model (Gemma 4's tiny ones), it says little of its routers.
    tie = max(NEAR_TIE, 2 * limit)
    assert max(float(margin[first].max(initial=0)) for margin in ties) < tie
    alike = [
        np.sort(a.experts) == np.sort(b.experts) for a, b in zip(routers, rounded, strict=True)
    ]
    assert same.mean() > min(MOST, np.all(np.concatenate(alike, -1), -1).mean() - 0.1)
    assert distance(ours[agree_so_far], exact[agree_so_far]) < limit
    assert typical(ours, exact) < limit


@pytest.mark.slow
@pytest.mark.kernel
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about padding
@pytest.mark.usefixtures("uncaptured")
def test_caps_and_norms_on_both_sides(tmp_path: Path) -> None:
    """A layer of each kind, few tokens, no step of one: the interpreter takes seconds for each."""
    config = copy.deepcopy(CONFIGS["gemma2"])
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    check_few_tokens(config, tmp_path)


@pytest.mark.slow
@pytest.mark.kernel
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("uncaptured")
def test_two_caches_and_a_layer_without_keys(tmp_path: Path) -> None:
    """Heads of two sizes and groups, k that are v, inputs of each layer, experts beside the MLP."""
    config = Gemma4TextConfig(
        **GEMMA4_31B
        | GEMMA4_EXPERTS
        | {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "hidden_size_per_layer_input": 16,
        },
        num_kv_shared_layers=1,
    )
    check_few_tokens(config, tmp_path)


def check_few_tokens(config: PreTrainedConfig, tmp_path: Path) -> None:
    checkpoint = save_tiny(config, tmp_path / "checkpoint")
    build(checkpoint, tmp_path / "engine", BuildOptions(target="cuda"))
    prompts = np.random.default_rng(0).integers(0, TINY_SHAPE["vocab_size"], (2, 22))
    exact, theirs = (reference_logits(checkpoint, prompts, d) for d in ("float32", "bfloat16"))
    ours = logits_in_chunks(tmp_path / "engine", prompts, chunks=(19, 3))
    assert distance(ours, exact) < 1.5 * distance(theirs, exact) + 1e-3


@pytest.mark.gpu
@pytest.mark.usefixtures("uncaptured")
@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"quantization": "fp8"}, 0.2),
        ({"quantization": "int8_wo", "group_size": 32}, 0.06),
        ({"quantization": "int4_wo", "group_size": 32}, 0.5),
        ({"kv_cache_dtype": "fp8"}, 0.2),
        ({"dtype": "float16"}, 0.01),
    ],
    ids=str,
)
def test_what_quantization_costs(options: dict[str, Any], limit: float, tmp_path: Path) -> None:
    checkpoint = save_tiny(CONFIGS["llama"], tmp_path / "checkpoint")
    build(checkpoint, tmp_path / "engine", BuildOptions(target="cuda", **options))
    prompts = np.random.default_rng(0).integers(0, TINY_SHAPE["vocab_size"], (2, PROMPT_TOKENS))
    exact = reference_logits(checkpoint, prompts, "float32")
    assert distance(logits_in_chunks(tmp_path / "engine", prompts), exact) < limit


def distance(got: Logits, want: Logits) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def typical(got: Logits, want: Logits) -> float:
    """The median distance of a position's logits."""
    distances = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    return float(np.median(distances))


def reference_logits(checkpoint: Path, prompts: NDArray[np.int64], dtype: str) -> Logits:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    with torch.no_grad():
        logits: Logits = model(torch.tensor(prompts)).logits.float().numpy()
    return logits


@dataclass(frozen=True, slots=True)
class ReferenceRouter:
    """What a layer's router chose: experts ``[2, T, k]``, and by how many standard deviations of
    its logits the last of them exceeds the next ``[2, T]``."""

    experts: NDArray[np.int64]
    margins: Logits


def reference_routers(
    checkpoint: Path, prompts: NDArray[np.int64], dtype: str
) -> list[ReferenceRouter]:
    """The routers of transformers, by layer. Where a correction is part of the choice,
    margins are zero: the logits do not say them."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    corrected = any("correction" in name for name in model.state_dict())
    found = []

    def keep(_: object, inputs: object, output: tuple[Tensor, ...]) -> None:
        shaped = [part.reshape(*prompts.shape, -1) for part in output]
        parts: list[NDArray[Any]] = [
            (part.float() if part.is_floating_point() else part).numpy() for part in shaped
        ]
        ids = next(part for part in parts if part.dtype.kind == "i")
        logits = max((p for p in parts if p.dtype.kind == "f"), key=lambda part: part.shape[-1])
        margins = np.zeros(prompts.shape, np.float32)
        if not corrected and ids.shape[-1] < logits.shape[-1]:
            if logits.min() >= 0:  # these are probabilities
                logits = np.log(logits)
            ordered, k = np.sort(logits)[..., ::-1], ids.shape[-1]
            margins = (ordered[..., k - 1] - ordered[..., k]) / logits.std()
        found.append(ReferenceRouter(ids, margins))

    for name, module in model.named_modules():
        if name.endswith((".gate", ".router")):
            module.register_forward_hook(keep)
    with torch.no_grad():
        model(torch.tensor(prompts))
    return found


def recorded_choices(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.int32]]:
    """The experts ``[T, k]`` that products of the layers' first weights will be told to take."""
    found: list[NDArray[np.int32]] = []
    multiply = expert_bind.multiply  # type: ignore[attr-defined]

    def kept(x: Tensor, experts: Experts, ids: Tensor, *more: Any, **options: Any) -> Tensor:  # noqa: ANN401
        if experts.gated:
            found.append(ids.cpu().numpy())
        return multiply(x, experts, ids, *more, **options)

    monkeypatch.setattr(expert_bind, "multiply", kept)
    return found


def by_layer(chosen: list[NDArray[np.int32]], layers: int) -> list[NDArray[np.int32]]:
    """The choices ``[2, T, k]`` of every layer in the steps of ``logits_in_chunks``, the last."""
    steps = chosen[-layers * len(CHUNKS) :]
    return [
        np.concatenate([ids.reshape(2, -1, ids.shape[-1]) for ids in steps[i::layers]], axis=1)
        for i in range(layers)
    ]


def logits_in_chunks(
    engine: Path, prompts: NDArray[np.int64], chunks: Sequence[int] = CHUNKS
) -> Logits:
    """Logits ``[2, T, vocab]`` of two sequences that advance together in steps of these tokens, on
    pages that interleave and run backwards."""
    loaded = load(engine, {**LIMITS, "kv_cache_bytes": 4 << 20})
    executor = loaded.executor
    assert isinstance(executor, CUDAExecutor)
    assert executor.reserve_kv(4 << 20) > 5
    page = loaded.config.page_size
    table = np.array([[5, 3], [4, 2]], np.int32)
    out: list[Logits] = []
    start = 0
    for size in chunks:
        positions = np.tile(np.arange(start, start + size, dtype=np.int32), 2)
        rows = np.repeat([0, 1], size)
        slots = table[rows, positions // page] * page + positions % page
        batch = StepBatch(
            token_ids=prompts[:, start : start + size].reshape(-1).astype(np.int32),
            positions=positions,
            query_start=np.array([0, size, 2 * size], np.int32),
            context_len=np.array([start + size] * 2, np.int32),
            logits_rows=np.arange(2 * size, dtype=np.int32),
            sampling=[SamplingRow(SamplingParams(temperature=0), [0], [], 0)] * (2 * size),
            slots=np.array([0, 1], np.int32),
            sampling_slots=rows.astype(np.int32),
            pages={
                cache.name: PagedInputs(table, slots.astype(np.int32)) for cache in loaded.caches
            },
        )
        out.append(executor.logits(batch).reshape(2, size, -1))
        start += size
    executor.shutdown()
    return np.concatenate(out, axis=1)


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> PreTrainedModel:
    """SmolLM2 as transformers reads it, in float32 on the GPU."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    return model.to("cuda")  # type: ignore[arg-type, no-any-return]


@pytest.fixture(scope="module")
def smollm2_bf16(
    reference: PreTrainedModel, smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The bfloat16 engine of the same weights."""
    from safetensors.torch import save_file

    checkpoint = tmp_path_factory.mktemp("smollm2-bf16")
    weights = {
        name: tensor.bfloat16().cpu().contiguous()
        for name, tensor in reference.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, checkpoint / "model.safetensors")
    config = {k: v for k, v in reference.config.to_dict().items() if k != "quantization_config"}
    (checkpoint / "config.json").write_text(json.dumps(config, default=str))
    tokenizer = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    tokenizer.save_pretrained(checkpoint)
    build(checkpoint, checkpoint / "engine", BuildOptions(target="cuda"))
    return checkpoint / "engine"


def assert_follows(reference: PreTrainedModel, outputs: Sequence[RequestOutput]) -> int:
    """Where a token is not the likeliest by transformers in float32, its probability is within
    0.05 of the likeliest's; what comes after is judged on our own tokens. Returns how many."""
    differing = 0
    for output in outputs:
        prompt, tokens = output.prompt_token_ids, output.outputs[0].token_ids
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *tokens]], device="cuda")
            logits = reference(ids).logits[0, len(prompt) - 1 : -1].cpu()
        probabilities = logits.softmax(-1)
        chosen = probabilities[torch.arange(len(tokens)), torch.tensor(tokens)]
        margin = probabilities.max(-1).values - chosen
        differing += int((margin > 0).sum())
        assert float(margin.max()) < 0.05, (output.prompt, float(margin.max()))
    return differing


@pytest.mark.gpu
@pytest.mark.real_model
@pytest.mark.parametrize(
    ("stagger", "options"),
    [(0, {"max_batch_size": 1}), (3, {"max_batch_size": 16}), (0, {"max_num_tokens": 24})],
    ids=["alone", "mixed batches", "chunks"],
)
def test_smollm2_follows_transformers(
    reference: PreTrainedModel, smollm2_bf16: Path, stagger: int, options: dict[str, int]
) -> None:
    limits: dict[str, Any] = {"max_batch_size": 4, "max_num_tokens": 256, **options}
    outputs, _ = run(smollm2_bf16, PROMPTS, stagger=stagger, **limits)
    total = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert assert_follows(reference, outputs) <= 0.04 * total
