"""FlexOlmo: OLMo 2 whose MLPs are experts."""

from dataclasses import replace
from typing import Any

from slipstream.builder.models import olmo2
from slipstream.builder.models.architecture import Architecture
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import DECODER
from slipstream.builder.models.experts import (
    RENORMALIZE,
    ExpertDecoder,
    expert_modules,
    read_experts,
    with_experts,
    write_experts,
)
from slipstream.builder.models.norms import with_norms
from slipstream.weights.json import Fields

_COUNT, _WIDTH, _RENORMALIZE = "num_experts", "intermediate_size", "norm_topk_prob"


class FlexOlmoDecoder(olmo2.WholeNormsDecoder, ExpertDecoder):
    """Attention and the experts read the residual stream as it is."""

    norms = olmo2.AFTER


def read(keys: Fields) -> ModelConfig:
    """As OLMo 2; the experts."""
    extras = {**read_experts(keys, _COUNT, _WIDTH), RENORMALIZE: keys.flag(_RENORMALIZE)}
    return replace(olmo2.read(keys), extras=extras)


def write(config: ModelConfig) -> dict[str, Any]:
    """The same."""
    return {
        **olmo2.write(config),
        **write_experts(config, _COUNT, _WIDTH),
        _RENORMALIZE: config.extras[RENORMALIZE],
    }


ARCHITECTURE = Architecture(
    name="flex_olmo",
    decoder=FlexOlmoDecoder,
    modules=with_norms(
        with_experts(olmo2.whole_norms(DECODER), expert_modules("mlp")), olmo2.AFTER
    ),
    defaults={
        **olmo2.DEFAULTS,
        "vocab_size": 100352,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "eos_token_id": 100257,
        "num_experts": 7,
        "num_experts_per_tok": 5,
        _RENORMALIZE: False,
    },
    read=read,
    write=write,
)
