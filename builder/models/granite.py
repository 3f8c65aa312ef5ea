"""Granite 3: Llama whose embedding, attention, residual sums and logits are multiplied by numbers
of the configuration."""

from dataclasses import replace
from typing import Any

from slipstream.builder.graph.ops import Attributes
from slipstream.builder.models import llama
from slipstream.builder.models.architecture import Architecture, GGUFFamily, differing
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import Decoder
from slipstream.weights.json import Fields

_EMBEDDING, _ATTENTION = "embedding_multiplier", "attention_multiplier"
_RESIDUAL, _LOGITS = "residual_multiplier", "logits_scaling"
MULTIPLIERS = (_EMBEDDING, _ATTENTION, _RESIDUAL, _LOGITS)


class GraniteDecoder(Decoder):
    """Keeps the residual stream divided by its multiplier, so that nothing multiplies what is added
    to it: only norms read the stream, and they do not see its scale when their epsilon has it."""

    def embedding_scale(self) -> float:
        """That of the first residual stream."""
        return self.architecture.embedding_scale(self.config) / self._multiplier

    def eps(self) -> float:
        """In the scale of the stream."""
        return float(self.config.rms_norm_eps / self._multiplier**2)

    def attention_attributes(self, layer: int) -> Attributes:
        """With the scale of the configuration."""
        return {
            **Decoder.attention_attributes(self, layer),
            "scale": self.config.extras[_ATTENTION],
        }

    @property
    def _multiplier(self) -> float:
        return float(self.config.extras[_RESIDUAL])


def read(keys: Fields) -> ModelConfig:
    """The flags of Llama and four numbers."""
    extras = {name: keys.number(name, positive=True) for name in MULTIPLIERS}
    return replace(llama.read(keys), extras=extras)


def write(config: ModelConfig) -> dict[str, Any]:
    """All of them."""
    return {**llama.write(config), **{name: config.extras[name] for name in MULTIPLIERS}}


def embedding_scale(config: ModelConfig) -> float:
    """What the rows of the embedding are multiplied by."""
    return float(config.extras[_EMBEDDING])


def logits_scale(config: ModelConfig) -> float:
    """What logits are multiplied by."""
    return 1 / float(config.extras[_LOGITS])


GGUF_KEYS = {
    _EMBEDDING: "embedding_scale",
    _ATTENTION: "attention.scale",
    _RESIDUAL: "residual_scale",
    _LOGITS: "logit_scale",
}
ARCHITECTURE = Architecture(
    "granite",
    GraniteDecoder,
    differing(
        llama.MODULES, embed_tokens={"scale": embedding_scale}, lm_head={"scale": logits_scale}
    ),
    {**llama.ARCHITECTURE.defaults, **dict.fromkeys(MULTIPLIERS, 1.0)},
    read,
    write,
    GGUFFamily("granite", keys=GGUF_KEYS),
)
