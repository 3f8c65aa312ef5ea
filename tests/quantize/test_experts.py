"""Mixtures of experts: quantized on the tokens that reach each, written, read back and built."""

from __future__ import annotations

import weakref
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.integration.test_architectures import CHUNKS, GPT_OSS, run_in_chunks
from tests.tiny_models import TINY_SHAPE, save_tiny
from transformers import GptOssConfig, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from slipstream.builder.build import build
from slipstream.builder.checkpoints import Checkpoint, open_checkpoint
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.options import BuildOptions
from slipstream.errors import BuildError
from slipstream.quantize.checks import check_plan
from slipstream.quantize.forward import CheckpointModel
from slipstream.quantize.layer import LayerResult, LayerWork, LinearStats
from slipstream.quantize.layerwise import quantize_layers
from slipstream.quantize.options import QuantizeOptions
from slipstream.quantize.plan import make_plan
from slipstream.quantize.quantize import Text, quantize
from slipstream.quantize.report import record
from slipstream.quantize.sites import by_expert, layer_sites, multiplied_as_one
from slipstream.quantize.statistics import LEAST_TOKENS
from slipstream.runtime.text.tokenizer import Tokenizer

SHAPE: dict[str, Any] = {**TINY_SHAPE, "num_hidden_layers": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3-moe": Qwen3MoeConfig(
        **{**SHAPE, "head_dim": 16}, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=5, num_experts_per_tok=2),
}
ROUTER = {"qwen3-moe": "mlp.gate", "mixtral": "block_sparse_moe.gate"}
UNCHOSEN = 4
RNG = np.random.default_rng(0)
WINDOWS = [RNG.integers(2, 320, 64).astype(np.int32) for _ in range(12)]


def save(name: str, directory: Path) -> Path:
    """A tiny model whose last expert no token chooses: of two pairs of opposite rows of the router,
    two have logits above 0, and its row is zeros."""
    from safetensors.torch import load_file, save_file

    path = save_tiny(CONFIGS[name], directory)
    tensors = load_file(path / "model.safetensors")
    for layer in range(2):
        router = tensors[f"model.layers.{layer}.{ROUTER[name]}.weight"]
        router[1], router[3], router[UNCHOSEN] = -router[0], -router[2], 0.0
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save("qwen3-moe", tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    return open_checkpoint(save(request.param, tmp_path_factory.mktemp("model")))


def run(
    checkpoint: Checkpoint,
    windows: list[NDArray[np.int32]],
    layers: int = 2,
    **given: Any,  # noqa: ANN401 - options
) -> list[LayerResult]:
    options = QuantizeOptions(**given)
    plan = make_plan(checkpoint, options)
    tokens = windows if plan.calibrated else []
    return list(islice(quantize_layers(checkpoint, plan, tokens, options), layers))


def experts(results: list[LayerResult]) -> list[LinearStats]:
    return [stats for result in results for stats in result.stats if ".experts." in stats.name]


def test_every_expert_is_calibrated_on_its_own_tokens(checkpoint: Checkpoint) -> None:
    found = experts(run(checkpoint, WINDOWS, qformat="int4_gptq", group_size=32))
    assert len(found) == 2 * 5 * 3
    for layer in range(2):
        for kind in {stats.name.rpartition(".")[2] for stats in found}:
            of = [s for s in found if f".{layer}." in s.name[:16] and s.name.endswith(kind)]
            assert sum(s.tokens_seen for s in of) == 2 * 12 * 64, kind
    for stats in found:
        if f"experts.{UNCHOSEN}." in stats.name:
            assert stats.tokens_seen == 0 and "no finite input reached it" in (stats.fallback or "")
        else:
            assert stats.fallback is None and stats.tokens_seen >= LEAST_TOKENS


def test_making_up_for_errors_helps_each_expert(qwen: Checkpoint) -> None:
    """Of the first layer, whose inputs are the same whatever is done to it."""
    data = experts(run(qwen, WINDOWS, 1, qformat="int4_gptq", group_size=32))
    # Plain rounding, seen on the same data because keys and values are calibrated.
    kv = {"kv_cache_dtype": "fp8"}
    plain = experts(run(qwen, WINDOWS, 1, qformat="int4_wo", group_size=32, **kv))
    for made, nearest in zip(data, plain, strict=True):
        if made.tokens_seen:
            assert made.output_error is not None and nearest.output_error is not None
            assert made.output_error < 0.9 * nearest.output_error, made.name


def test_an_expert_that_saw_too_little_is_rounded_to_nearest_and_named(
    qwen: Checkpoint,
) -> None:
    few = [np.concatenate(WINDOWS[:2])[:100]]
    results = run(qwen, few, 1, qformat="int4_gptq", group_size=32)
    nearest = run(qwen, [], 1, qformat="int4_wo", group_size=32)
    found = [s for s in experts(results) if 0 < s.tokens_seen < LEAST_TOKENS]
    assert found
    for stats in found:
        assert f"fewer than {LEAST_TOKENS} tokens" in (stats.fallback or "")
        made, plain = (r[0].tensors[f"{stats.name}.weight"] for r in (results, nearest))
        np.testing.assert_array_equal(made.codes, plain.codes)


def test_what_is_read_back_is_built_and_computes_as_its_weights_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "find_spec", lambda _: None)  # plots take a second
    source = save("qwen3-moe", tmp_path / "model")
    fox = "the quick brown fox jumps over the lazy dog "
    (tmp_path / "text.txt").write_text(fox * 40)
    (tmp_path / "eval.txt").write_text(fox * 4)
    options = QuantizeOptions(
        qformat="int4_awq",
        group_size=32,
        calib_dataset=str(tmp_path / "text.txt"),
        eval_dataset=str(tmp_path / "eval.txt"),
        calib_size=4,
        calib_max_seq_length=64,
    )

    def text(checkpoint: Checkpoint) -> Text:
        return Text(Tokenizer.from_directory(checkpoint.path).encode)

    report = quantize(source, tmp_path / "out", options, text)
    shown = (tmp_path / "out" / "quantization_report.md").read_text()
    numbers = [
        str(row.expert)
        for row in report.linears
        if row.fallback and "layers.0" in row.name and row.kind == "up_proj"
    ]
    assert str(UNCHOSEN) in numbers
    assert "| `model.layers.0.mlp.experts.*.up_proj` (5) | int4_awq | 32 |" in shown

    written = open_checkpoint(tmp_path / "out")
    for name in written.names():
        kind = "int" if ".experts." in name or "self_attn" in name else "dense"
        quantized = written.tensor(name).format
        assert quantized.kind == (kind if len(quantized.shape) == 2 else "dense"), name
    build(tmp_path / "out", tmp_path / "engine", BuildOptions())
    prompts = np.random.default_rng(0).integers(2, 320, (2, sum(CHUNKS)))
    (expected, _) = CheckpointModel(written).logits([p.astype(np.int32) for p in prompts])
    (dense, _) = CheckpointModel(open_checkpoint(source)).logits(
        [p.astype(np.int32) for p in prompts]
    )
    actual = run_in_chunks(tmp_path / "engine", prompts)[0]
    scale = np.linalg.norm(expected)
    # The kernels round activations to 8 bits.
    assert np.linalg.norm(actual - expected) < 0.03 * scale < 0.5 * np.linalg.norm(expected - dense)


def test_sites_are_those_of_each_expert(checkpoint: Checkpoint) -> None:
    names = [n for n in checkpoint.names() if n.startswith("model.layers.1.")]
    inside = [name.removeprefix("model.layers.1.") for name in names]
    parts = by_expert(checkpoint.config, 1, inside)
    assert set(parts) == {None, *range(5)} and len(parts[3]) == 3
    assert not any(".experts." in name for name in parts[None])
    linears = [name.removesuffix(".weight") for name in parts[3]]
    opening, closing = layer_sites(checkpoint.config, 1, linears)
    assert len(opening.linears) == 2 and opening.source is None and opening.stream is None
    assert closing.source is not None and closing.source.name == opening.linears[1]
    assert closing.stream == ""
    every = [n.removesuffix(".weight") for n in inside if ".experts." in n]
    assert sorted(map(len, multiplied_as_one(checkpoint.config, 1, every))) == [5, 10]


def test_no_scale_passes_a_clamped_gate() -> None:
    config = ModelConfig.from_huggingface(GptOssConfig(**GPT_OSS).to_dict())
    names = [f"mlp.experts.0.{name}_proj" for name in ("gate", "up", "down")]
    assert [site.source for site in layer_sites(config, 0, names)] == [None, None]


def test_routers_are_quantized_only_where_a_target_means_them_alone(
    checkpoint: Checkpoint,
) -> None:
    def planned(*overrides: str) -> list[str]:
        plan = make_plan(checkpoint, QuantizeOptions(qformat="int4_wo", overrides=overrides))
        assert len(plan.routers) == 2 and len(plan.experts) == 2 * 5 * 3
        return [name for name in plan.routers if name in plan.schemes]

    assert planned() == planned("re:.*=int8_wo") == []
    assert planned(r"re:.*[a-z]\.gate=int8_wo") == [
        f"model.layers.{layer}.{ROUTER[place]}"
        for layer in range(2)
        for place in ROUTER
        if f"model.layers.0.{ROUTER[place]}.weight" in checkpoint.names()
    ]


def test_experts_of_several_schemes_are_noted(qwen: Checkpoint) -> None:
    (name, *_) = make_plan(qwen, QuantizeOptions(qformat="int4_wo")).experts
    options = QuantizeOptions(qformat="int4_wo", exclude=(name,))
    (note,) = make_plan(qwen, options).notes
    assert "2 schemes: an engine of the result holds them in float32" in note


def test_schemes_of_modelopt_are_refused(qwen: Checkpoint) -> None:
    plan = make_plan(qwen, QuantizeOptions(qformat="nvfp4"))
    with pytest.raises(BuildError, match="whose files of experts are not read; use int4_awq"):
        check_plan(plan)


def test_the_inputs_of_one_expert_are_there_at_a_time(
    qwen: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    original = LayerWork.quantize

    def watched(self: LayerWork) -> Any:  # noqa: ANN401 - what it returns
        made.extend(weakref.ref(found.gram) for found in self.inputs.values() if found is not None)
        alive.append(sum(1 for each in made if each() is not None))
        return original(self)

    monkeypatch.setattr(LayerWork, "quantize", watched)
    run(qwen, WINDOWS[:4], 1, qformat="int4_gptq", group_size=32)
    # Those of attention, and of one expert: what gate and up read, and what down does.
    assert len(alive) == 1 + 5 and max(alive) <= 2 + 2
