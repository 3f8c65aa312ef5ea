"""Layers quantized one after the other on a tiny model: folding, figures, fallbacks, resuming."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.tiny_models import TINY_SHAPE, save_tiny
from transformers import Gemma2Config, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from slipstream.builder.checkpoints import Checkpoint, open_checkpoint
from slipstream.builder.models.config import ModelConfig
from slipstream.quantize.forward import CheckpointModel
from slipstream.quantize.layer import LayerResult, LayerWork, linears_of
from slipstream.quantize.layerwise import quantize_layers
from slipstream.quantize.options import QuantizeOptions
from slipstream.quantize.plan import make_plan
from slipstream.quantize.sensitivity import choose_qformats
from slipstream.quantize.sites import layer_sites
from slipstream.quantize.statistics import Collector
from slipstream.weights.tensor import KVScales, LazyTensor, QuantTensor

SHAPE: dict[str, Any] = {**TINY_SHAPE, "num_hidden_layers": 2}
RNG = np.random.default_rng(0)
WINDOWS = [RNG.integers(2, 320, 64).astype(np.int32) for _ in range(16)]
HELD_OUT = [RNG.integers(2, 320, 64).astype(np.int32) for _ in range(4)]
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama-biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "gemma2": Gemma2Config(
        **SHAPE, head_dim=16, pad_token_id=0, query_pre_attn_scalar=24, attn_logit_softcapping=5.0
    ),
    "qwen3-moe": Qwen3MoeConfig(
        **{**SHAPE, "head_dim": 16}, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}


@dataclass(frozen=True)
class Replaced:
    """A checkpoint some of whose tensors are others."""

    source: Checkpoint
    others: Mapping[str, QuantTensor]

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    @property
    def kv_scales(self) -> KVScales | None:
        return None

    @property
    def pooling(self) -> None:
        return None

    def names(self) -> tuple[str, ...]:
        return self.source.names()

    def tensor(self, name: str) -> LazyTensor:
        if name not in self.others:
            return self.source.tensor(name)
        other = self.others[name]
        return LazyTensor(name, other.format, lambda: other, other.input)

    def write_tokenizer(self, directory: Path) -> None:
        self.source.write_tokenizer(directory)


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    return open_checkpoint(save_tiny(CONFIGS[request.param], tmp_path_factory.mktemp("model")))


def run(checkpoint: Checkpoint, **given: Any) -> list[LayerResult]:  # noqa: ANN401 - options
    options = QuantizeOptions(**given)
    plan = make_plan(checkpoint, options)
    return list(quantize_layers(checkpoint, plan, WINDOWS if plan.calibrated else [], options))


def logits(checkpoint: Checkpoint) -> NDArray[np.float32]:
    return np.concatenate(list(CheckpointModel(checkpoint).logits(HELD_OUT)))


def distance(checkpoint: Checkpoint, results: list[LayerResult]) -> float:
    """Relative distance of the logits."""
    others = {name: tensor for result in results for name, tensor in result.tensors.items()}
    exact = logits(checkpoint)
    found = logits(Replaced(checkpoint, others)) - exact
    return float(np.linalg.norm(found) / np.linalg.norm(exact))


LIMITS = {"int8_wo": 0.02, "int8_gptq": 0.02, "int8_sq": 0.06, "fp8": 0.15, "fp8_block": 0.15}


@pytest.mark.parametrize("qformat", LIMITS)
def test_eight_bits_are_near(qformat: str, checkpoint: Checkpoint) -> None:
    results = run(checkpoint, qformat=qformat)
    assert 0 < distance(checkpoint, results) < LIMITS[qformat]
    for result in results:
        assert set(result.tensors) == {
            name for name in checkpoint.names() if name.startswith(f"model.layers.{result.index}.")
        }


def test_data_helps_four_bits(checkpoint: Checkpoint) -> None:
    nearest = run(checkpoint, qformat="int4_wo", group_size=32)
    for qformat in ("int4_gptq", "int4_awq"):
        results = run(checkpoint, qformat=qformat, group_size=32, symmetric=False)
        mean = {
            name: np.mean([s.output_error for r in results for s in r.stats if name in s.name])
            for name in ("_proj",)
        }
        assert distance(checkpoint, results) < distance(checkpoint, nearest)
        assert mean["_proj"] > 0
        stats = [s for r in results for s in r.stats]
        assert all(s.fallback is None for s in stats)
        assert all(s.tokens_seen == 1024 for s in stats if "experts" not in s.name)


@pytest.mark.parametrize("qformat", ["int4_awq", "int8_sq"])
def test_folding_changes_nothing_before_rounding(qformat: str, checkpoint: Checkpoint) -> None:
    options = QuantizeOptions(qformat=qformat)  # type: ignore[arg-type]
    plan = make_plan(checkpoint, options)
    others: dict[str, QuantTensor] = {}
    for layer in plan.layers:
        prefix = f"model.layers.{layer.index}."
        names = [name for name in checkpoint.names() if name.startswith(prefix)]
        source = {name.removeprefix(prefix): checkpoint.tensor(name) for name in names}
        schemes = {name.removeprefix(prefix): s for name, s in layer.linears.items()}
        sites = layer_sites(checkpoint.config, layer.index, linears_of(source))
        work = LayerWork(prefix, source, schemes, sites, calibrated=True)
        for site in sites:
            columns = work.weights[f"{site.key}.weight"].shape[1]
            generator = torch.Generator().manual_seed(1)
            spread = torch.exp(torch.randn(columns, generator=generator))
            collector = Collector(256)
            collector.add(torch.randn(256, columns, generator=generator) * spread, None)
            work.inputs[site.key] = collector.result()
        work.scale()
        assert work.scalings
        for name, lazy in source.items():
            values = work.weights[name].numpy()
            others[prefix + name] = QuantTensor(
                lazy.name, replace(lazy.format, dtype="float32"), values
            )
    exact, folded = logits(checkpoint), logits(Replaced(checkpoint, others))
    np.testing.assert_allclose(folded, exact, rtol=0, atol=1e-4 * np.abs(exact).max())


def test_what_is_not_rounded_is_kept_bit_for_bit(checkpoint: Checkpoint) -> None:
    (first, *_) = run(checkpoint, qformat="int4_gptq", exclude=["re:.*o_proj"])
    for name, tensor in first.tensors.items():
        if "o_proj" in name or "norm" in name or name.endswith("bias"):
            np.testing.assert_array_equal(tensor.codes, checkpoint.tensor(name).load().codes)
    assert not any("o_proj" in stats.name for stats in first.stats)


def test_a_run_that_goes_on_ends_as_one_that_was_not_cut(checkpoint: Checkpoint) -> None:
    options = QuantizeOptions(qformat="int4_awq", kv_cache_dtype="fp8")
    plan = make_plan(checkpoint, options)
    whole = list(quantize_layers(checkpoint, plan, WINDOWS, options))
    (rest,) = quantize_layers(
        checkpoint, plan, WINDOWS, options, resume_from=1, load_done=lambda i: whole[i].tensors
    )
    assert rest.kv == whole[1].kv is not None
    for name, tensor in rest.tensors.items():
        np.testing.assert_array_equal(tensor.codes, whole[1].tensors[name].codes)


def test_scales_of_keys_and_values_hold_the_largest(tiny_checkpoint: Path) -> None:
    results = run(open_checkpoint(tiny_checkpoint), qformat="int8_wo", kv_cache_dtype="fp8")
    for result in results:
        assert result.kv is not None
        assert all(0 < scale < 1 for scale in result.kv)


def test_a_model_that_gives_no_finite_number_says_so(tiny_checkpoint: Path) -> None:
    source = open_checkpoint(tiny_checkpoint)
    name = "model.embed_tokens.weight"
    broken = source.tensor(name).load()
    poisoned = replace(broken, codes=np.full_like(broken.codes, np.nan))
    results = run(Replaced(source, {name: poisoned}), qformat="int4_awq")
    stats = [stats for result in results for stats in result.stats]
    assert all("no finite input" in (s.fallback or "") for s in stats)
    assert all(s.output_error is None and s.tokens_seen == 0 for s in stats)


def test_bits_go_where_they_help(checkpoint: Checkpoint) -> None:
    options = QuantizeOptions(qformat="int4_awq", auto_bits=6.0, group_size=32)
    plan = make_plan(checkpoint, options)
    told: list[tuple[int, int]] = []
    chosen = choose_qformats(checkpoint, plan, WINDOWS, lambda *done: told.append(done))
    mixed = plan.with_qformats(chosen)
    assert set(chosen.values()) == {"int4_awq", "int8_wo"}
    assert plan.effective_bits < mixed.effective_bits <= 6.0
    assert told == [(1, 2), (2, 2)]
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn."
        assert len({chosen[f"{prefix}{x}_proj"] for x in "qkv"}) == 1

    def made(plan: Any) -> list[LayerResult]:  # noqa: ANN401 - a Plan
        return list(quantize_layers(checkpoint, plan, WINDOWS, options))

    assert distance(checkpoint, made(mixed)) < distance(checkpoint, made(plan))
