"""Architectures that an installed package adds by entry points."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.tiny_models import LLAMA, llama_tensors, save_llama

from slipstream.builder.build import plan
from slipstream.builder.models import GROUP, architecture_of, known_architectures, load_architecture
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.options import BuildOptions
from slipstream.errors import BuildError, CheckpointError
from slipstream.extensions import entry_points

SOURCE = """
from dataclasses import replace
from slipstream.builder.models.llama import ARCHITECTURE as LLAMA

ARCHITECTURE = replace(LLAMA, name="camelid")
OTHER = replace(LLAMA, name="vicugna")
"""
POINTS = f"""
[{GROUP}]
CamelidForCausalLM = camelids
VicugnaForCausalLM = camelids:OTHER
GoneForCausalLM = camelids.gone
LlamaForCausalLM = camelids:OTHER
"""


@pytest.fixture(autouse=True)
def camelids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package on the path, as pip would have put it there."""
    (tmp_path / "camelids.py").write_text(SOURCE)
    info = tmp_path / "camelids-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: camelids\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    entry_points.cache_clear()
    yield
    entry_points.cache_clear()
    sys.modules.pop("camelids", None)


def test_names_are_known_and_nothing_is_imported_until_asked() -> None:
    known = known_architectures()
    assert known[0] == "LlamaForCausalLM"
    assert known[-3:] == ("CamelidForCausalLM", "GoneForCausalLM", "VicugnaForCausalLM")
    load_architecture("Qwen3ForCausalLM")
    assert architecture_of("llama").name == "llama"
    assert "camelids" not in sys.modules
    assert load_architecture("CamelidForCausalLM").name == "camelid"
    assert architecture_of("camelid").name == "camelid"
    assert load_architecture("VicugnaForCausalLM").name == "vicugna"


def test_a_checkpoint_of_an_added_architecture_is_built(tmp_path: Path) -> None:
    arrays = llama_tensors()
    changes = {"architectures": ["CamelidForCausalLM"], "model_type": "camelid"}
    planned = plan(save_llama(tmp_path / "model", arrays, **changes), BuildOptions())
    assert planned.program.graph.name == "camelid"
    assert ModelConfig.from_json(planned.checkpoint.config.to_json()).architecture == "camelid"


def test_the_table_wins_and_what_is_wrong_is_said() -> None:
    assert load_architecture("LlamaForCausalLM").name == "llama"
    with pytest.raises(BuildError, match=r"camelids\.gone of slipstream\.architectures cannot be"):
        load_architecture("GoneForCausalLM")
    with pytest.raises(CheckpointError, match=r"one of LlamaForCausalLM, .*VicugnaForCausalLM"):
        ModelConfig.from_huggingface({**LLAMA, "architectures": ["AlpacaForCausalLM"]})
