"""The table of architectures: the name in config.json, and the module that declares it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slipstream.builder.models.architecture import Architecture

ARCHITECTURES = {
    "LlamaForCausalLM": "slipstream.builder.models.llama",
    "MistralForCausalLM": "slipstream.builder.models.mistral",
    "Qwen2ForCausalLM": "slipstream.builder.models.qwen2",
    "Qwen3ForCausalLM": "slipstream.builder.models.qwen3",
}


def load_architecture(name: str) -> Architecture:
    """The declaration of an architecture in the table; KeyError if it is not there."""
    architecture: Architecture = import_module(ARCHITECTURES[name]).ARCHITECTURE
    return architecture


def architecture_of(name: str) -> Architecture:
    """The declaration whose own name (``llama``, as a configuration records it) is ``name``."""
    return next(a for a in map(load_architecture, ARCHITECTURES) if a.name == name)
