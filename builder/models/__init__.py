"""The table of architectures: the name in config.json, and the module that declares it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from slipstream.errors import CheckpointError
from slipstream.extensions import entry_points, load

if TYPE_CHECKING:
    from slipstream.builder.models.architecture import Architecture

# Packages add to it by entry points of this group, whose names and values are of the same form.
GROUP, ATTRIBUTE = "slipstream.architectures", "ARCHITECTURE"
# How the names of models without a head end.
HEADLESS = "Model"
ARCHITECTURES = {
    "LlamaForCausalLM": "slipstream.builder.models.llama",
    "GemmaForCausalLM": "slipstream.builder.models.gemma",
    "Gemma2ForCausalLM": "slipstream.builder.models.gemma2",
    "Gemma3ForCausalLM": "slipstream.builder.models.gemma3",
    "Gemma4ForCausalLM": "slipstream.builder.models.gemma4",
    "MistralForCausalLM": "slipstream.builder.models.mistral",
    "MinistralForCausalLM": "slipstream.builder.models.ministral",
    "Ministral3ForCausalLM": "slipstream.builder.models.ministral3",
    "Qwen2ForCausalLM": "slipstream.builder.models.qwen2",
    "Qwen3ForCausalLM": "slipstream.builder.models.qwen3",
    "Cohere2ForCausalLM": "slipstream.builder.models.cohere2",
    "GlmForCausalLM": "slipstream.builder.models.glm",
    "Glm4ForCausalLM": "slipstream.builder.models.glm4",
    "GraniteForCausalLM": "slipstream.builder.models.granite",
    "Olmo2ForCausalLM": "slipstream.builder.models.olmo2",
    "Olmo3ForCausalLM": "slipstream.builder.models.olmo3",
    "Phi3ForCausalLM": "slipstream.builder.models.phi3",
    "SmolLM3ForCausalLM": "slipstream.builder.models.smollm3",
    "MixtralForCausalLM": "slipstream.builder.models.mixtral",
    "Qwen2MoeForCausalLM": "slipstream.builder.models.qwen2_moe",
    "Qwen3MoeForCausalLM": "slipstream.builder.models.qwen3_moe",
    "OlmoeForCausalLM": "slipstream.builder.models.olmoe",
    "GraniteMoeForCausalLM": "slipstream.builder.models.granitemoe",
    "GraniteMoeSharedForCausalLM": "slipstream.builder.models.granitemoeshared",
    "GraniteMoeHybridForCausalLM": "slipstream.builder.models.granitemoehybrid",
    "Glm4MoeForCausalLM": "slipstream.builder.models.glm4_moe",
    "FlexOlmoForCausalLM": "slipstream.builder.models.flex_olmo",
    "Ernie4_5_MoeForCausalLM": "slipstream.builder.models.ernie4_5_moe",
    "GptOssForCausalLM": "slipstream.builder.models.gpt_oss",
}


def known_architectures() -> tuple[str, ...]:
    """Every name in the table, and then those that installed packages add to it."""
    return tuple(_places())


def load_architecture(name: str) -> Architecture:
    """The declaration of an architecture by the name in config.json.

    Raises CheckpointError, which lists all known, for one that is neither in the table nor an
    installed package's.
    """
    places = _places()
    if name not in places:
        raise _unknown(name)
    architecture: Architecture = load(places[name], ATTRIBUTE, GROUP)
    return architecture


def find_architecture(names: Sequence[str], model_type: str | None) -> Architecture:
    """The first known of ``names``, those of ``architectures`` in a config.json; where it has none,
    the one of that ``model_type``. A model without a head (``Qwen3Model``) is of the architecture
    that has one. CheckpointError when there is none."""
    places = _places()
    for name in names:
        for known in (name, name.removesuffix(HEADLESS) + "ForCausalLM"):
            if known in places:
                return load_architecture(known)
    if not names:
        for _, architecture in _loaded():
            if architecture.name == model_type:
                return architecture
    raise _unknown(", ".join(names) or f"model_type {model_type!r}")


def architecture_of(name: str) -> Architecture:
    """The declaration whose own name (``llama``, as a configuration records it) is ``name``."""
    return class_of(name)[1]


def class_of(name: str) -> tuple[str, Architecture]:
    """The name in config.json of the architecture that calls itself ``name``, and its
    declaration."""
    for known, architecture in _loaded():
        if architecture.name == name:
            return known, architecture
    raise _unknown(name)


def architectures() -> Iterator[Architecture]:
    """All declarations, those of the table first."""
    return (architecture for _, architecture in _loaded())


def _loaded() -> Iterator[tuple[str, Architecture]]:
    """One after the other, so that none is imported after the one that is sought."""
    return ((name, load_architecture(name)) for name in _places())


def _places() -> dict[str, str]:
    """Where every architecture is declared; the table's own name wins."""
    added = {name: p for name, p in entry_points(GROUP).items() if name not in ARCHITECTURES}
    return ARCHITECTURES | added


def _unknown(given: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: architecture {given} is not supported; expected one of "
        f"{', '.join(known_architectures())}, or install a package that adds it"
    )
