"""GLM-4 of 2025: that of 2024 with norms of what attention and the MLP give, too."""

from slipstream.builder.models import glm
from slipstream.builder.models.architecture import Architecture, GGUFFamily
from slipstream.builder.models.decoder import Decoder
from slipstream.builder.models.norms import LayerNorms, with_norms

_NORMS = LayerNorms(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")


class GLM4Decoder(Decoder):
    """Norms on both sides of attention and of the MLP."""

    norms = _NORMS


ARCHITECTURE = Architecture(
    "glm4",
    GLM4Decoder,
    with_norms(glm.MODULES, _NORMS),
    glm.DEFAULTS,
    glm.read,
    glm.write,
    GGUFFamily("glm4"),
)
