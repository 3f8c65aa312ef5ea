"""Gemma 4's configuration as its files and transformers have it, what is refused, and its graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file
from tests.integration.test_architectures import CONFIGS, GEMMA4, GEMMA4_EXPERTS
from tests.tiny_models import save_tiny
from transformers import Gemma4TextConfig

from slipstream.builder.build import plan
from slipstream.builder.models import load_architecture
from slipstream.builder.models.config import FULL, SLIDING, ModelConfig, Rope, RopeScaling
from slipstream.builder.models.gemma4_decoder import kv_layer
from slipstream.builder.models.gemma4_gguf import FAMILY
from slipstream.builder.models.huggingface_config import describe
from slipstream.builder.models.rope import rotary_frequencies
from slipstream.builder.options import BuildOptions
from slipstream.errors import BuildError, CheckpointError

NAME = "Gemma4ForCausalLM"
NAMES = [name for name in CONFIGS if name.startswith("gemma4")]
K_IS_V = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}


def read(**raw: Any) -> ModelConfig:  # noqa: ANN401 - keys of config.json
    return ModelConfig.from_huggingface({**raw, "architectures": [NAME]})


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"num_hidden_layers": 7},
        {"global_head_dim": 128, "num_global_key_value_heads": 2},
        {"global_head_dim": 128, **K_IS_V},
        {"num_kv_shared_layers": 20, "use_double_wide_mlp": True},
        {"use_bidirectional_attention": "vision", "hidden_size_per_layer_input": 0},
        GEMMA4_EXPERTS,
    ],
    ids=str,
)
def test_files_of_either_form_are_those_of_transformers(raw: dict[str, Any]) -> None:
    """What is other in some layers is said of their kind, or layer by layer."""
    assert read(**raw) == read(**json.loads(json.dumps(Gemma4TextConfig(**raw).to_dict())))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_by_transformers_and_here(name: str) -> None:
    config = read(**json.loads(json.dumps(CONFIGS[name].to_dict())))
    written = json.loads(json.dumps(describe(config)))
    assert ModelConfig.from_huggingface(written) == config
    theirs = Gemma4TextConfig(**written)
    assert read(**json.loads(json.dumps(theirs.to_dict()))) == config


def test_layers_differ_by_kind_and_place() -> None:
    config = read(**GEMMA4, **K_IS_V, num_kv_shared_layers=2, use_double_wide_mlp=True)
    architecture = load_architecture(NAME)
    seen = [architecture.in_layer(config, layer) for layer in range(6)]
    assert [(c.num_kv_heads, c.head_dim) for c in seen] == [(2, 16), (2, 16), (1, 32)] * 2
    assert [c.intermediate_size for c in seen] == [128] * 4 + [256] * 2
    assert [kv_layer(config, layer) for layer in range(6)] == [0, 1, 2, 3, 3, 2]
    shapes = architecture.shapes(config)
    assert shapes["model.layers.5.mlp.down_proj.weight"] == (64, 256)
    assert "model.layers.2.self_attn.v_proj.weight" not in shapes
    assert "model.layers.4.self_attn.k_proj.weight" not in shapes


def test_a_proportional_rotary_has_the_frequencies_of_the_whole_head() -> None:
    config = read(**GEMMA4)
    rope = config.rope(2)
    assert rope == Rope(1e6, 32, RopeScaling("proportional", partial_rotary_factor=0.25))
    frequencies, _ = rotary_frequencies(rope)
    np.testing.assert_allclose(frequencies[:4], 1e6 ** (-np.arange(0, 8, 2) / 32), rtol=1e-6)
    assert not frequencies[4:].any() and len(frequencies) == 16
    assert config.rope(0) == Rope(1e4, 16)


ONE_OTHER = {"per_layer_config": {"2": {"head_dim": 32}, "5": {"head_dim": 64}}}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'; expected"),
        ({"num_kv_shared_layers": 6}, "num_kv_shared_layers is 6; expected so few layers that"),
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers is 4; expected so few layers that"),
        (ONE_OTHER, "per_layer_config is .*; expected head_dim and num_key_value_heads, the same"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config is .*; expected head_dim"),
        ({"per_layer_config": {"2": {"x": 1}, "5": {"x": 1}}}, "per_layer_config is .*; expected"),
        ({**K_IS_V, "num_global_key_value_heads": 3}, "_heads is 3; expected a divisor of num_att"),
        ({"vocab_size_per_layer_input": 10}, "vocab_size_per_layer_input is 10; expected"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'; expected one of gelu"),
        (
            {"rope_parameters": {FULL: {}}},
            f"rope_parameters is .*; expected an entry for '{SLIDING}",
        ),
        ({**GEMMA4_EXPERTS, "top_k_experts": 7}, "top_k_experts is 7; expected"),
        ({"enable_moe_block": True}, "num_experts"),
    ],
)
def test_what_is_not_computed_is_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(**{**GEMMA4, **raw})


def test_keys_of_layers_that_share_may_be_in_a_file(tmp_path: Path) -> None:
    """Those that transformers leaves out, too; others that nothing reads are refused."""
    checkpoint = save_tiny(CONFIGS["gemma4-shared"], tmp_path)
    arrays = load_file(checkpoint / "model.safetensors")
    layer = "model.layers.{}.self_attn."
    for part in ("k_proj", "v_proj", "k_norm"):
        name = f"{layer}{part}.weight"
        arrays[name.format(3)] = arrays[name.format(0)]
    save_file(arrays, checkpoint / "model.safetensors")
    assert plan(checkpoint, BuildOptions()).weights
    arrays["model.layers.0.self_attn.v_norm.weight"] = np.ones(16, np.float32)
    save_file(arrays, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not read, such as model.layers.0.self_attn.v"):
        plan(checkpoint, BuildOptions())


def test_attention_says_what_it_is_given(tmp_path: Path) -> None:
    checkpoint = save_tiny(CONFIGS["gemma4-keys-are-values-shared"], tmp_path)
    graph = plan(checkpoint, BuildOptions()).program.graph
    told = [
        (cache.name, *(node.attributes[key].as_int() for key in ("layer", "kv_parts", "v_norm")))
        for node in graph
        if node.op_type == "PagedAttention" and isinstance(cache := node.inputs[3], ir.Value)
    ]
    near, far = "kv_cache.window", "kv_cache"
    own = [(near, 0, 2, 1), (near, 1, 2, 1), (far, 0, 1, 1)]
    assert told == [*own, (near, 1, 0, 1), (near, 1, 0, 1), (far, 0, 0, 1)]


def test_a_gguf_file_that_does_not_say_which_layers_have_a_window_is_refused() -> None:
    found = {"num_key_value_heads": [2, 2], "intermediate_size": [8, 8]}
    with pytest.raises(CheckpointError, match=r"gemma4\.attention\.sliding_window_pattern does n"):
        FAMILY.concluded(found)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_heads_that_no_kernel_takes_are_refused(target: str, tmp_path: Path) -> None:
    config = Gemma4TextConfig(**GEMMA4 | {"global_head_dim": 520})
    message = f"heads of 520 elements; the {target} target runs those of a multiple of 8 up to 512"
    with pytest.raises(BuildError, match=message):
        plan(save_tiny(config, tmp_path), BuildOptions(target=target))
