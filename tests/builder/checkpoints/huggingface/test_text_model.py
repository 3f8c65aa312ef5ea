"""Checkpoints of models that see, too: the text model within is the one of transformers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tests.integration.test_architectures import GEMMA4, GEMMA4_EXPERTS, run_in_chunks
from tests.tiny_models import TINY_SHAPE, write_tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma4Config,
    Mistral3Config,
)

from slipstream.builder.build import build, plan
from slipstream.builder.checkpoints import open_checkpoint
from slipstream.builder.checkpoints.huggingface.text_model import text_modules, text_name
from slipstream.builder.options import BuildOptions
from slipstream.errors import CheckpointError
from slipstream.quantize.options import QuantizeOptions
from slipstream.quantize.quantize import Text, quantize
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.weights.json import Fields, Origin

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {**TINY_SHAPE, "head_dim": 16}
CONFIGS: dict[str, Any] = {
    "gemma3": Gemma3Config(
        text_config={**TEXT, "model_type": "gemma3_text", "sliding_window": 17, "pad_token_id": 0},
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=300,
    ),
    "gemma4": Gemma4Config(
        text_config=GEMMA4_EXPERTS
        | {**GEMMA4, "num_kv_shared_layers": 3, "use_bidirectional_attention": "vision"},
        vision_config={**VISION, "head_dim": 16, "position_embedding_size": 16},
        audio_config=None,
        image_token_id=300,
    ),
    "mistral3": Mistral3Config(
        text_config={**TEXT, "model_type": "mistral", "sliding_window": None},
        vision_config={**VISION, "model_type": "pixtral"},
        tie_word_embeddings=False,
        image_token_index=300,
    ),
}
PROMPTS = np.random.default_rng(0).integers(0, 256, (2, 75))


def save(name: str, directory: Path) -> Path:
    torch.manual_seed(0)
    kind: Any = AutoModelForImageTextToText
    model = kind.from_config(CONFIGS[name], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    write_tiny_tokenizer(directory)
    return directory


def logits(checkpoint: Path, kind: Any = AutoModelForImageTextToText) -> Any:  # noqa: ANN401
    model = kind.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor(PROMPTS)).logits.numpy()


def rename(checkpoint: Path, *, older: bool) -> None:
    """Writes the tensors by today's names, or by those of older files."""
    path = checkpoint / "model.safetensors"
    renamed = {}
    for name, array in load_file(path).items():
        inner = text_name(name)
        if inner is None:
            name = name.removeprefix("model.")
            renamed[name if older else f"model.{name}"] = array
        elif older:
            renamed[f"language_model.{inner}"] = array
        else:
            renamed[inner.replace("model.", "model.language_model.")] = array
    save_file(renamed, path)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_text_model_is_built_and_the_rest_is_named(
    name: str, older: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = save(name, tmp_path / "checkpoint")
    expected = logits(checkpoint)
    rename(checkpoint, older=older)
    with caplog.at_level(logging.WARNING):
        build(checkpoint, tmp_path / "engine", BuildOptions())
    actual = run_in_chunks(tmp_path / "engine", PROMPTS)
    assert np.abs(actual - expected).max() < 1e-4 * max(1.0, float(np.abs(expected).max()))
    (said,) = [r.message for r in caplog.records if "left out" in r.message]
    assert "checkpoint: its text model is read; " in said
    projector = {"gemma4": "embed_vision"}.get(name, "multi_modal_projector")
    assert "vision_tower " in said and f"{projector} " in said


def test_who_insists_is_refused(tmp_path: Path) -> None:
    checkpoint = save("gemma3", tmp_path)
    with pytest.raises(CheckpointError, match=r"beside its text model \(vision_tower \d+, mult.*"):
        plan(checkpoint, BuildOptions(strict_tensors=True))


def test_a_text_model_is_not_refused(tiny_checkpoint: Path) -> None:
    assert open_checkpoint(tiny_checkpoint, strict=True).names()


def test_a_tensor_of_the_text_that_nobody_reads_is_refused_still(tmp_path: Path) -> None:
    checkpoint = save("mistral3", tmp_path)
    arrays = load_file(checkpoint / "model.safetensors")
    arrays["language_model.model.layers.0.extra.weight"] = np.zeros(3, np.float32)
    save_file(arrays, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not read, such as model\.layers\.0\.extra"):
        plan(checkpoint, BuildOptions())


@pytest.mark.parametrize(
    ("changes", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": None}, False),
        ({"tie_word_embeddings": None, "text": {"tie_word_embeddings": True}}, True),
    ],
    ids=str,
)
def test_the_whole_says_what_its_text_does_not(
    changes: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    """The ends of an answer are the whole's; the head is tied where nobody says and none is
    there."""
    checkpoint = save("mistral3", tmp_path)
    raw = json.loads((checkpoint / "config.json").read_text())
    raw["text_config"].pop("tie_word_embeddings", None)
    raw["text_config"] |= changes.pop("text", {})
    (checkpoint / "config.json").write_text(json.dumps({**raw, "eos_token_id": [1, 6], **changes}))
    config = open_checkpoint(checkpoint).config
    assert config.eos_token_ids == (1, 6)
    assert config.tie_word_embeddings is tied


def test_a_text_model_that_is_not_known_is_refused(tmp_path: Path) -> None:
    checkpoint = save("mistral3", tmp_path)
    raw = json.loads((checkpoint / "config.json").read_text())
    raw["text_config"]["model_type"] = "gpt2"
    (checkpoint / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="model_type 'gpt2' is not supported"):
        open_checkpoint(checkpoint)


def test_lists_of_modules_follow_the_names() -> None:
    lists = {
        "ignore": ["language_model.lm_head", "re:vision_tower.*", "lm_head"],
        "modules_to_not_convert": ["model.language_model.layers.0.mlp", "vision_tower.x"],
    }
    values = text_modules(Fields({**lists, "bits": 4}, Origin("config.json"))).values
    assert values == {
        "ignore": ["lm_head", "re:vision_tower.*", "lm_head"],
        "modules_to_not_convert": ["model.layers.0.mlp", "vision_tower.x"],
        "bits": 4,
    }


def test_what_is_quantized_of_it_is_a_text_model(tmp_path: Path) -> None:
    checkpoint = save("gemma3", tmp_path / "checkpoint")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 60)
    evaluated = str(tmp_path / "text.txt")
    options = QuantizeOptions(qformat="int8_wo", eval_dataset=evaluated, group_size=32)

    def text(checkpoint: Any) -> Text:  # noqa: ANN401
        return Text(Tokenizer.from_directory(checkpoint.path).encode)

    quantize(checkpoint, tmp_path / "quantized", options, text)
    raw = json.loads((tmp_path / "quantized" / "config.json").read_text())
    assert raw["architectures"] == ["Gemma3ForCausalLM"] and "vision_config" not in raw
    build(tmp_path / "quantized", tmp_path / "engine", BuildOptions())
    expected = logits(checkpoint)
    actual = run_in_chunks(tmp_path / "engine", PROMPTS)
    assert np.linalg.norm(actual - expected) < 0.1 * np.linalg.norm(expected)
    theirs = logits(tmp_path / "quantized", AutoModelForCausalLM)
    assert np.linalg.norm(theirs - expected) < 0.1 * np.linalg.norm(expected)
