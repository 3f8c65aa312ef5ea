"""Gemma's configurations as older files and transformers have them, and what its tables say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tests.tiny_models import TINY_SHAPE, save_tiny
from transformers import Gemma2Config, Gemma3TextConfig, GemmaConfig

from slipstream.builder.build import plan
from slipstream.builder.models import load_architecture
from slipstream.builder.models.config import FULL, SLIDING, ModelConfig, Rope, RopeScaling
from slipstream.builder.options import BuildOptions
from slipstream.errors import CheckpointError

GEMMA3 = "Gemma3ForCausalLM"
CLASSES: dict[str, Any] = {
    "GemmaForCausalLM": GemmaConfig,
    "Gemma2ForCausalLM": Gemma2Config,
    GEMMA3: Gemma3TextConfig,
}
LINEAR = {"rope_type": "linear", "factor": 8.0}


def read(name: str, **raw: Any) -> ModelConfig:  # noqa: ANN401 - keys of config.json
    return ModelConfig.from_huggingface({"architectures": [name], **raw})


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        *((name, {}) for name in CLASSES),
        (GEMMA3, {"rope_theta": 5e5, "rope_local_base_freq": 5e3, "sliding_window_pattern": 4}),
        (GEMMA3, {"rope_scaling": LINEAR, "num_hidden_layers": 7}),
        (GEMMA3, {"rope_parameters": {FULL: {"rope_theta": 2e5, **LINEAR}}}),
        (GEMMA3, {"rope_parameters": {SLIDING: {"rope_type": "default"}}}),
        (GEMMA3, {"sliding_window_pattern": 1, "final_logit_softcapping": 30.0}),
        ("GemmaForCausalLM", {"hidden_act": "gelu"}),
    ],
    ids=str,
)
def test_defaults_and_older_files_are_those_of_transformers(name: str, raw: dict[str, Any]) -> None:
    assert read(name, **raw) == read(name, **CLASSES[name](**raw).to_dict())


def test_each_kind_of_layer_has_its_angles() -> None:
    config = read(GEMMA3, rope_scaling=LINEAR, num_hidden_layers=6, head_dim=16)
    assert config.rope(0) == Rope(1e4, 16)
    assert config.rope(5) == Rope(1e6, 16, RopeScaling("linear", 8.0))


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        (GEMMA3, {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50\.0; expected n"),
        (
            GEMMA3,
            {"hidden_activation": "silu"},
            "hidden_activation is 'silu'; expected one of gelu",
        ),
        ("GemmaForCausalLM", {"hidden_act": "silu"}, "hidden_act is 'silu', but only 'gelu_pyt"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention is True; exp"),
        ("Gemma2ForCausalLM", {"final_logit_softcapping": 0}, "softcapping is 0; expected"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": "x"}, "softcapping is 'x'; expected"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar is -1; expec"),
    ],
)
def test_what_is_not_computed_is_refused(name: str, raw: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(name, **raw)


@pytest.mark.parametrize("name", CLASSES)
def test_every_norm_is_one_more_than_its_weight(name: str) -> None:
    architecture = load_architecture(name)
    assert {m.offset for m in architecture.modules if m.role == "norm"} == {1.0}
    config = read(name, hidden_size=64)
    assert architecture.embedding_scale(config) == 8.0


@pytest.mark.parametrize(("head", "cap"), [("Gemma2ForCausalLM", 30.0), (GEMMA3, 0.0)])
def test_only_a_configuration_with_a_cap_has_one(head: str, cap: float) -> None:
    assert load_architecture(head).logits_cap(read(head)) == cap


def test_a_gpu_keeps_logits_in_float32_until_they_are_capped(tmp_path: Path) -> None:
    config = Gemma2Config(**TINY_SHAPE, head_dim=16, pad_token_id=0)
    program = plan(save_tiny(config, tmp_path), BuildOptions(target="cuda")).program
    (cap,) = program.nodes("SoftCap")
    values = [value for value in (*cap.inputs, *cap.outputs) if value is not None]
    assert [value.dtype for value in values] == [ir.DataType.FLOAT] * 2
    assert np.isclose(cap.attributes["cap"].as_float(), 30)


def test_each_kind_of_layer_has_its_angles_on_a_gpu(tmp_path: Path) -> None:
    config = Gemma3TextConfig(
        **TINY_SHAPE, head_dim=16, pad_token_id=0, layer_types=[SLIDING, SLIDING, FULL]
    )
    program = plan(save_tiny(config, tmp_path), BuildOptions(target="cuda")).program
    angles = program.nodes("RotaryAngles")
    frequencies = [node.inputs[1].const_value.numpy() for node in angles]  # type: ignore[union-attr]
    assert len(angles) == 2
    assert not np.array_equal(frequencies[0], frequencies[1])


def test_a_tied_head_and_a_scaled_embedding_share_one_weight(tmp_path: Path) -> None:
    config = GemmaConfig(**TINY_SHAPE, head_dim=16, pad_token_id=0)
    planned = plan(save_tiny(config, tmp_path), BuildOptions())
    rows = [w for w in planned.weights if any("embed_tokens" in part.name for part in w.parts)]
    assert len(rows) == 1
