"""GLM-4 of 2025: that of 2024 with norms of what attention and the MLP give, too."""

from slipstream.builder.models import glm
from slipstream.builder.models.architecture import Architecture, GGUFFamily, differing
from slipstream.builder.models.decoder import Decoder, LayerNorms
from slipstream.builder.models.module import LAYER, Module, hidden

_AFTER_ATTENTION, _AFTER_MLP = f"{LAYER}.post_self_attn_layernorm", f"{LAYER}.post_mlp_layernorm"


class GLM4Decoder(Decoder):
    """Norms on both sides of attention and of the MLP."""

    norms = LayerNorms(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")


ARCHITECTURE = Architecture(
    "glm4",
    GLM4Decoder,
    (
        *differing(
            glm.MODULES, o_proj={"stream": _AFTER_ATTENTION}, down_proj={"stream": _AFTER_MLP}
        ),
        Module(_AFTER_ATTENTION, "norm", (hidden,), gguf="blk.{i}.post_attention_norm"),
        Module(_AFTER_MLP, "norm", (hidden,), gguf="blk.{i}.post_ffw_norm"),
    ),
    glm.DEFAULTS,
    glm.read,
    glm.write,
    GGUFFamily("glm4"),
)
