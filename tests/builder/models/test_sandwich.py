"""An architecture far from the plain decoder, said by a table and a few hooks: norms before and
after, (1 + w) norms, a rotary for each kind of layer, a query scale. Gemma 3 is the truth."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tests.builder.checkpoints.gguf.models import tiny as tiny_gguf
from tests.integration.test_architectures import run_in_chunks
from tests.tiny_models import TINY_SHAPE, save_tiny
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from slipstream.builder import models
from slipstream.builder.build import build, plan
from slipstream.builder.checkpoints import open_checkpoint
from slipstream.builder.contract import Source
from slipstream.builder.graph.ops import Attributes
from slipstream.builder.models.architecture import Architecture, GGUFFamily, differing
from slipstream.builder.models.config import FULL, SLIDING, ModelConfig, Rope, RopeScaling
from slipstream.builder.models.decoder import DECODER, Decoder, Rotary
from slipstream.builder.models.huggingface_config import (
    describe,
    head_size,
    layer_kinds,
    read_decoder,
    read_ropes,
    with_window,
    write_window,
)
from slipstream.builder.models.module import LAYER, Module, hidden
from slipstream.builder.options import BuildOptions
from slipstream.quantize.layerwise import quantize_layers
from slipstream.quantize.options import QuantizeOptions
from slipstream.quantize.plan import make_plan
from slipstream.weights.json import Fields
from slipstream.weights.tensor import LazyTensor

KINDS = [SLIDING, SLIDING, FULL]
ROPES = {
    FULL: {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
CONFIG: dict[str, Any] = {
    **TINY_SHAPE,
    "head_dim": 16,
    "hidden_activation": "silu",
    "query_pre_attn_scalar": 24,
    "sliding_window": 17,
    "layer_types": KINDS,
    "rope_parameters": ROPES,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}


class SandwichDecoder(Decoder):
    def embed(self) -> ir.Value:
        weight = self.tensor("model.embed_tokens.weight")

        def load() -> Any:  # noqa: ANN401 - a QuantTensor
            loaded = weight.load()
            factor = np.float32(self.config.hidden_size**0.5)
            return dataclasses.replace(loaded, codes=loaded.dequantize() * factor)

        scaled = LazyTensor(weight.name, weight.format, load)
        return self.ops.embedding(self.ops.input(Source.TOKEN_IDS), scaled)

    def layer(self, x: ir.Value, rotary: Rotary, layer: int) -> ir.Value:
        ops, prefix = self.ops, f"model.layers.{layer}."
        with ops.scope("attn"):
            normed = self.norm(x, prefix + "input_layernorm")
            attended = self.attention(normed, rotary, layer, prefix + "self_attn.")
            x = ops.add(x, self.norm(attended, prefix + "post_attention_layernorm"))
        with ops.scope("mlp"):
            normed = self.norm(x, prefix + "pre_feedforward_layernorm")
            fed = self.mlp(normed, prefix + "mlp.")
            return ops.add(x, self.norm(fed, prefix + "post_feedforward_layernorm"))

    def attention_attributes(self, layer: int) -> Attributes:
        scale = self.config.extras["query_pre_attn_scalar"] ** -0.5
        return {**super().attention_attributes(layer), "scale": scale}


def read(keys: Fields) -> ModelConfig:
    ropes = read_ropes(keys, head_size(keys))
    config = read_decoder(keys, ropes=ropes)
    extras = {"query_pre_attn_scalar": keys.integer("query_pre_attn_scalar")}
    config = dataclasses.replace(config, qk_norm=True, extras=extras)
    return with_window(config, keys, layer_kinds(keys, [FULL] * config.num_layers))


def write(config: ModelConfig) -> dict[str, Any]:
    return {**write_window(config), **config.extras, "hidden_activation": "silu", "pad_token_id": 0}


_BEFORE, _AFTER = f"{LAYER}.pre_feedforward_layernorm", f"{LAYER}.post_feedforward_layernorm"
_ONE = {"offset": 1.0}
MODULES = (
    *differing(
        DECODER,
        o_proj={"stream": f"{LAYER}.post_attention_layernorm"},
        gate_proj={"reads": _BEFORE},
        up_proj={"reads": _BEFORE},
        down_proj={"stream": _AFTER},
        post_attention_layernorm={**_ONE, "gguf": "blk.{i}.post_attention_norm"},
        **dict.fromkeys(("input_layernorm", "q_norm", "k_norm", "norm"), _ONE),
    ),
    Module(_BEFORE, "norm", (hidden,), offset=1.0, gguf="blk.{i}.ffn_norm"),
    Module(_AFTER, "norm", (hidden,), offset=1.0, gguf="blk.{i}.post_ffw_norm"),
)
SANDWICH = Architecture(
    "gemma3_text", SandwichDecoder, MODULES, {"head_dim": 256}, read, write, GGUFFamily("qwen3")
)


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.ARCHITECTURES, "Gemma3ForCausalLM", f"{__name__}:SANDWICH")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(Gemma3TextConfig(**CONFIG), tmp_path_factory.mktemp("sandwich"))


def test_the_configuration_is_read_and_written(checkpoint: Path) -> None:
    config = open_checkpoint(checkpoint).config
    assert config.layer_kinds == tuple(KINDS)
    assert [config.window(layer) for layer in range(3)] == [17, 17, 0]
    assert config.rope(0) == Rope(1e4, 16)
    assert config.rope(2) == Rope(1e5, 16, RopeScaling("linear", 4.0))
    assert ModelConfig.from_huggingface(describe(config)) == config
    assert ModelConfig.from_json(config.to_json()) == config


def test_logits_equal_transformers(checkpoint: Path, tmp_path: Path) -> None:
    build(checkpoint, tmp_path / "engine", BuildOptions())
    prompts = np.random.default_rng(0).integers(0, 320, (2, 75))
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(prompts)).logits.numpy()
    actual = run_in_chunks(tmp_path / "engine", prompts)
    assert np.abs(actual - expected).max() < 1e-4 * max(1.0, float(np.abs(expected).max()))


def test_each_kind_of_layer_has_its_angles_on_a_gpu(checkpoint: Path) -> None:
    program = plan(checkpoint, BuildOptions(target="cuda")).program
    angles = program.nodes("RotaryAngles")
    assert len(angles) == 2
    frequencies = [node.inputs[1].const_value.numpy() for node in angles]  # type: ignore[union-attr]
    assert not np.array_equal(frequencies[0], frequencies[1])


def test_layers_are_quantized(checkpoint: Path) -> None:
    source = open_checkpoint(checkpoint)
    options = QuantizeOptions(qformat="int4_awq", group_size=32)
    windows = [np.random.default_rng(i).integers(2, 320, 48).astype(np.int32) for i in range(4)]
    results = list(quantize_layers(source, make_plan(source, options), windows, options))
    stats = [row for result in results for row in result.stats]
    assert len(stats) == 3 * 7
    assert all(row.fallback is None and row.tokens_seen == 4 * 48 for row in stats)
    assert {row.name.rpartition(".")[2] for row in stats if row.alpha} >= {"q_proj", "up_proj"}


def test_gguf_files_hold_one_more_than_the_weight(tmp_path: Path) -> None:
    model = tiny_gguf("qwen3")
    stored = model.tensors["blk.0.attn_norm.weight"]
    path = model.write(tmp_path / "m.gguf")
    config = dataclasses.replace(open_checkpoint(path).config, architecture="gemma3_text")
    read = dataclasses.replace(open_checkpoint(path), config=config)  # type: ignore[type-var]
    found = read.tensor("model.layers.0.input_layernorm.weight").load().dequantize()
    np.testing.assert_array_equal(found, stored - np.float32(1))
