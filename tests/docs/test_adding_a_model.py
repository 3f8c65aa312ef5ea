"""The worked example of docs/adding_a_model.md computes what transformers computes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tests.docs.test_docs import ROOT, blocks
from tests.integration.test_architectures import run_in_chunks
from tests.tiny_models import TINY_SHAPE, save_tiny
from transformers import AutoModelForCausalLM, Phi3Config

from slipstream.builder.build import build
from slipstream.builder.models import ARCHITECTURES
from slipstream.builder.options import BuildOptions


@pytest.mark.parametrize("window", [None, 17])
def test_the_example_works(
    window: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = next(text for _, text in blocks(ROOT / "docs" / "adding_a_model.md"))
    module = ModuleType("phi3_of_the_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source, module.__dict__)
    monkeypatch.setitem(ARCHITECTURES, "Phi3ForCausalLM", module.__name__)

    config = Phi3Config(**TINY_SHAPE, pad_token_id=0, sliding_window=window)
    checkpoint = save_tiny(config, tmp_path / "checkpoint")
    build(checkpoint, tmp_path / "engine", BuildOptions())
    prompts = np.random.default_rng(0).integers(0, TINY_SHAPE["vocab_size"], (2, 75))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(prompts)).logits.numpy()
    actual = run_in_chunks(tmp_path / "engine", prompts)
    assert np.abs(actual - expected).max() < 1e-4 * max(1.0, float(np.abs(expected).max()))
