"""The worked example of docs/adding_a_model.md computes what transformers computes, is quantized,
and has names for GGUF."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.docs.test_docs import ROOT, blocks
from tests.integration.test_architectures import run_in_chunks
from tests.tiny_models import TINY_SHAPE, save_tiny
from transformers import AutoModelForCausalLM, Exaone4Config

from slipstream.builder.build import build
from slipstream.builder.checkpoints import Checkpoint, open_checkpoint
from slipstream.builder.models import ARCHITECTURES, load_architecture
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.huggingface_config import describe
from slipstream.builder.options import BuildOptions
from slipstream.quantize.options import QuantizeOptions
from slipstream.quantize.quantize import Text, quantize
from slipstream.runtime.text.tokenizer import Tokenizer

PROMPTS = np.random.default_rng(0).integers(0, TINY_SHAPE["vocab_size"], (2, 75))


@pytest.fixture(autouse=True)
def exaone4(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's file, in the table by the page's line."""
    source = next(text for _, text in blocks(ROOT / "docs" / "adding_a_model.md"))
    module = ModuleType("exaone4_of_the_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source, module.__dict__)
    monkeypatch.setitem(ARCHITECTURES, "Exaone4ForCausalLM", module.__name__)


def tiny(directory: Path, **changes: Any) -> Path:  # noqa: ANN401 - keys of config.json
    config = Exaone4Config(**{**TINY_SHAPE, "sliding_window_pattern": 2, **changes})
    return save_tiny(config, directory / "checkpoint")


def logits(checkpoint: Path) -> NDArray[np.float32]:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.tensor(PROMPTS)).logits.numpy()
    return found


FULL = {"sliding_window": None, "layer_types": ["full_attention"] * 3}


@pytest.mark.parametrize("changes", [{"sliding_window": 17}, FULL])
def test_the_example_works(changes: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path, **changes)
    build(checkpoint, tmp_path / "engine", BuildOptions())
    expected = logits(checkpoint)
    actual = run_in_chunks(tmp_path / "engine", PROMPTS)
    assert np.abs(actual - expected).max() < 1e-4 * max(1.0, float(np.abs(expected).max()))


@pytest.mark.parametrize("qformat", ["int4_awq", "int4_gptq"])
def test_the_example_is_quantized_and_built_again(qformat: str, tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path, num_hidden_layers=2, sliding_window=17)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 60)
    options = QuantizeOptions(
        qformat=qformat,  # type: ignore[arg-type]
        calib_dataset=str(tmp_path / "text.txt"),
        calib_size=8,
        calib_max_seq_length=64,
        eval_dataset=str(tmp_path / "text.txt"),
        group_size=32,
    )

    def text(checkpoint: Checkpoint) -> Text:
        return Text(Tokenizer.from_directory(checkpoint.path).encode)

    report = quantize(checkpoint, tmp_path / "quantized", options, text)

    assert len(report.linears) == 2 * 7
    assert all(row.fallback is None for row in report.linears)
    if qformat == "int4_awq":
        assert any(row.alpha for row in report.linears if "o_proj" in row.name)
    build(tmp_path / "quantized", tmp_path / "engine", BuildOptions())
    expected, actual = logits(checkpoint), run_in_chunks(tmp_path / "engine", PROMPTS)
    assert np.linalg.norm(actual - expected) < 0.5 * np.linalg.norm(expected)


def test_the_example_has_names_for_gguf() -> None:
    exaone4 = load_architecture("Exaone4ForCausalLM")
    raw = {"architectures": ["Exaone4ForCausalLM"], **TINY_SHAPE, "sliding_window": 17}
    config = ModelConfig.from_huggingface(raw)
    assert ModelConfig.from_huggingface(describe(config)) == config
    names = {name: exaone4.to_gguf(name) for name in exaone4.shapes(config)}
    assert names["model.layers.2.self_attn.q_norm.weight"] == ("blk.2.attn_q_norm.weight",)
    after_mlp = names["model.layers.0.post_feedforward_layernorm.weight"]
    assert after_mlp == ("blk.0.post_ffw_norm.weight",)
    assert names["lm_head.weight"] == ("output.weight",)
    assert all(exaone4.from_gguf(theirs) == name for name, (theirs,) in names.items())
    assert exaone4.from_gguf("blk.0.attn_norm.weight") is None


def test_a_checkpoint_opens_by_the_table(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny(tmp_path))
    shapes = load_architecture("Exaone4ForCausalLM").shapes(checkpoint.config)
    assert {name: checkpoint.tensor(name).format.shape for name in checkpoint.names()} == shapes
