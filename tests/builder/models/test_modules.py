"""Tables of modules against the models of transformers, and what follows from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.test_architectures import CONFIGS
from tests.tiny_models import LLAMA, save_tiny

from slipstream.builder.checkpoints.huggingface.experts import by_expert
from slipstream.builder.models import ARCHITECTURES, architectures, load_architecture
from slipstream.builder.models.architecture import Architecture, differing, stacked
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import DECODER
from slipstream.builder.models.module import LAYER, Extent, Module, head, hidden, inner, pattern
from slipstream.weights.safetensors import read_header

CLASSES = {load_architecture(name).name: name for name in ARCHITECTURES}


def configuration(**changes: Any) -> ModelConfig:  # noqa: ANN401 - keys of config.json
    return ModelConfig.from_huggingface({**LLAMA, **changes})


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """As it saves them: a tied head goes without, and experts have tensors of their own or parts of
    one."""
    theirs = CONFIGS[name]
    save_tiny(theirs, tmp_path)
    raw = {**theirs.to_dict(), "architectures": [CLASSES[theirs.model_type]]}
    config = ModelConfig.from_huggingface(raw)
    architecture = load_architecture(CLASSES[theirs.model_type])
    stored = by_expert(read_header(tmp_path / "model.safetensors"), architecture.modules, config)
    shapes = architecture.shapes(config)
    assert shapes == {key: tensor.shape for key, tensor in stored.items()}
    assert all(config.weight_shape(key) == shape for key, shape in shapes.items())


def test_ranks_share_whole_heads() -> None:
    config, llama = configuration(), load_architecture("LlamaForCausalLM")

    def sharded(name: str) -> Any:  # noqa: ANN401 - an axis and its parts
        module = llama.module(name)
        assert module is not None
        return module.sharded(config)

    layer = "model.layers.1."
    assert sharded(f"{layer}self_attn.q_proj") == (0, (Extent(4, 32),))
    assert sharded(f"{layer}self_attn.v_proj") == (0, (Extent(2, 32),))
    assert sharded(f"{layer}self_attn.o_proj") == (1, (Extent(4, 32),))
    assert sharded(f"{layer}mlp.gate_proj") == (0, (Extent(256),))
    assert sharded(f"{layer}mlp.down_proj") == (1, (Extent(256),))
    assert sharded("model.embed_tokens") == sharded("lm_head") == (0, (Extent(320),))
    assert sharded(f"{layer}input_layernorm") is sharded("model.norm") is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_shards_of_an_mlp_add_up_to_it(ranks: int) -> None:
    """Linear in x, so that it needs no activation: down(gate_up(x)) by the axes of the table."""
    config = configuration()
    modules = stacked(DECODER, "gate_up_proj", ("gate_proj", "up_proj"))
    rows = {m.name.rpartition(".")[2]: m for m in modules}
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 128))
    up, down = (rng.normal(size=rows[n].shape(config)) for n in ("gate_up_proj", "down_proj"))

    def gated(y: Any) -> Any:  # noqa: ANN401 - an array
        return y[:, : y.shape[1] // 2] * y[:, y.shape[1] // 2 :]

    whole = gated(x @ up.T) @ down.T
    total = sum(
        gated(x @ shard(rows["gate_up_proj"], up, config, rank, ranks).T)
        @ shard(rows["down_proj"], down, config, rank, ranks).T
        for rank in range(ranks)
    )
    np.testing.assert_allclose(total, whole)


def shard(module: Module, weight: Any, config: ModelConfig, rank: int, ranks: int) -> Any:  # noqa: ANN401
    """A rank's part of a weight, by what the table says of it."""
    sharded = module.sharded(config)
    assert sharded is not None
    axis, parts = sharded
    chosen, start = [], 0
    for part in parts:
        own = part.units // ranks * part.size
        chosen.append(np.arange(start + rank * own, start + (rank + 1) * own))
        start += part.length
    return np.take(weight, np.concatenate(chosen), axis)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_name_has_one_in_gguf_and_comes_back(name: str) -> None:
    """But for what those files hold in parts."""
    layers = ["full_attention"] * LLAMA["num_hidden_layers"]
    config = configuration(architectures=[name], attention_bias=True, layer_types=layers)
    architecture = load_architecture(name)
    names = {ours: architecture.to_gguf(ours) for ours in architecture.shapes(config)}
    assert all(names.values()) and len(set(names.values())) == len(names)
    for ours, parts in names.items():
        assert [architecture.from_gguf(part) for part in parts] == [ours] * len(parts)
    assert architecture.from_gguf("blk.0.attn_nothing.weight") is None
    assert architecture.from_gguf("blk.0.attn_q.scale") is None


def test_llama_cpp_reorders_rows_of_q_and_k_of_the_llamas_alone() -> None:
    """Its converters of these are those of Llama; GLM's rows are as it wants them."""
    permuted = {
        architecture.name: [m.gguf for m in architecture.modules if m.gguf_permuted]
        for architecture in architectures()
    }
    llamas = {name for name, rows in permuted.items() if rows}
    granites = {"granite", "granitemoe", "granitemoeshared", "granitemoehybrid"}
    others = {"llama", "mistral", "mixtral", "ministral", "ministral3", "smollm3"}
    assert llamas == others | granites
    assert all(permuted[name] == ["blk.{i}.attn_q", "blk.{i}.attn_k"] for name in llamas)


def test_who_has_a_bias_is_said_by_the_configuration() -> None:
    config, llama = configuration(attention_bias=True), load_architecture("LlamaForCausalLM")
    assert llama.has_bias(config, "model.layers.0.self_attn.o_proj")
    assert not llama.has_bias(config, "model.layers.0.mlp.down_proj")
    assert not llama.has_bias(config, "model.layers.0.nothing")
    found = llama.with_biases(config, ["model.layers.0.self_attn.q_proj.bias"])
    assert (found.attention_bias, found.o_bias, found.mlp_bias) == (True, False, False)


def test_a_mixture_of_experts_finds_room_in_a_table() -> None:
    """Dense first layers, then a router and experts, whose number only its file knows."""
    config = configuration(num_hidden_layers=3)

    def sparse(config: ModelConfig, layer: int) -> bool:
        return layer >= 1

    def experts(config: ModelConfig) -> Extent:
        return Extent(4)

    mlp = f"{LAYER}.mlp"
    norm = f"{LAYER}.post_attention_layernorm"
    router = Module(f"{mlp}.gate", "router", (experts,), hidden, present=sparse, reads=norm)
    up = Module(
        f"{mlp}.experts.{{e}}.up_proj",
        "expert",
        (inner,),
        hidden,
        present=sparse,
        experts=experts,
        reads=norm,
        gguf="blk.{i}.ffn_up.{e}",
    )
    llama = load_architecture("LlamaForCausalLM")
    mixed = Architecture(
        "mixed", llama.decoder, (*llama.modules, router, up), llama.defaults, llama.read
    )
    shapes = mixed.shapes(config)
    assert [name for name in shapes if "mlp.gate." in name] == [
        f"model.layers.{layer}.mlp.gate.weight" for layer in (1, 2)
    ]
    assert sum("experts" in name for name in shapes) == 2 * 4
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    assert shapes[name] == (256, 128) == mixed.shape(config, name)
    assert mixed.to_gguf(name) == ("blk.2.ffn_up.3.weight",)
    assert mixed.from_gguf("blk.2.ffn_up.3.weight") == name


def test_a_difference_from_a_row_that_is_not_there_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match=r"no row is called .'qkv_proj'"):
        differing(DECODER, qkv_proj={"bias": True})
    with pytest.raises(AssertionError, match="not every row"):
        stacked(DECODER, "qkv_proj", ("q_proj", "w_proj"))
    assert pattern("a.{i}.b").fullmatch("a.x.b") is None


def test_a_bare_tensor_has_the_name_of_its_module() -> None:
    config, llama = configuration(), load_architecture("LlamaForCausalLM")
    place = f"{LAYER}.self_attn.sinks"
    sinks = Module(place, "norm", (head,), bare=True, gguf="blk.{i}.attn_sinks.weight")
    sinking = Architecture(
        "sinking", llama.decoder, (*llama.modules, sinks), llama.defaults, llama.read
    )
    name = "model.layers.1.self_attn.sinks"
    assert sinking.shapes(config)[name] == (32,) == sinking.shape(config, name)
    assert f"{name}.weight" not in sinking.shapes(config)
    assert sinking.shape(config, f"{name}.weight") is None
    assert sinking.shape(config, "model.norm") is None
    assert sinking.to_gguf(name) == ("blk.1.attn_sinks.weight",)
    assert sinking.from_gguf("blk.1.attn_sinks.weight") == name


def test_layers_that_predict_further_tokens_may_be_there_by_another_name() -> None:
    ernie = load_architecture("Ernie4_5_MoeForCausalLM")
    config = configuration(architectures=["Ernie4_5_MoeForCausalLM"])
    block, others = "model.mtp_block.0.", ("emb_norm", "hidden_norm", "linear_proj")
    names = [f"{block}{x}.weight" for x in ("input_layernorm", "self_attn.q_proj", "mlp.up_proj")]
    names += [f"model.mtp_{name}.0.weight" for name in others]
    assert all(ernie.is_redundant(config, name) for name in names)
    assert not ernie.shapes(config).keys() & set(names)
    assert not ernie.is_redundant(config, f"{block}mlp.experts.0.up_proj.weight")
