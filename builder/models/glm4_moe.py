"""GLM-4.5, GLM-4.5-Air and their successors up to 4.7: experts behind first dense layers, chosen by
sigmoid scores and corrections, beside an MLP that every token takes."""

from dataclasses import replace
from typing import Any

from slipstream.builder.graph.ops import Attributes
from slipstream.builder.models.architecture import Architecture, GGUFFamily, differing
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.decoder import DECODER
from slipstream.builder.models.experts import (
    DENSE_LAYERS,
    EXPERTS,
    RENORMALIZE,
    TOP_K,
    WIDTH,
    ExpertDecoder,
    correction_module,
    expert_modules,
    gguf_keys,
    in_some_layers,
    read_experts,
    shared_modules,
    write_experts,
)
from slipstream.builder.models.huggingface_config import read_decoder
from slipstream.builder.models.module import Extent
from slipstream.plugins.router import SCORINGS
from slipstream.weights.json import Fields

_SHARED, _SHARED_COUNT = "mlp.shared_experts", "n_shared_experts"
_COUNT, _WIDTH = "n_routed_experts", "moe_intermediate_size"
_SCALE, _GROUPS, _TOP_GROUPS = "routed_scaling_factor", "n_group", "topk_group"


class GLM4MoEDecoder(ExpertDecoder):
    """The routing of DeepSeek-V3."""

    shared = _SHARED

    def routing(self) -> Attributes:
        """Sigmoid scores, the best experts of the best groups, their weights scaled."""
        extras = self.config.extras
        return {
            **super().routing(),
            "scoring": SCORINGS["sigmoid"],
            "scale": extras[_SCALE],
            "groups": extras[_GROUPS],
            "top_groups": extras[_TOP_GROUPS],
        }


def _read(keys: Fields) -> ModelConfig:
    config, routing = read_decoder(keys), read_experts(keys, _COUNT, _WIDTH)
    dense = keys.integer("first_k_dense_replace")
    return replace(
        config,
        attention_bias=keys.flag("attention_bias"),
        qk_norm=keys.flag("use_qk_norm"),
        extras={
            **routing,
            **_read_groups(keys, routing),
            RENORMALIZE: keys.flag("norm_topk_prob"),
            _SCALE: keys.number(_SCALE),
            _SHARED_COUNT: keys.integer(_SHARED_COUNT, minimum=1),
            DENSE_LAYERS: list(range(min(dense, config.num_layers))),
        },
    )


def _read_groups(keys: Fields, routing: dict[str, int]) -> dict[str, int]:
    """Groups of two experts or more, and as many of them a token as have its experts."""
    experts, groups = routing[EXPERTS], keys.integer(_GROUPS, minimum=1)
    if experts % groups or (groups > 1 and experts // groups < 2):
        raise keys.refusal(_GROUPS, f"a number of equal groups of {experts} experts, two or more")
    top_groups = keys.integer(_TOP_GROUPS, minimum=1, maximum=groups)
    if routing[TOP_K] > experts // groups * top_groups:
        raise keys.refusal(_TOP_GROUPS, f"groups that have {routing[TOP_K]} experts")
    return {_GROUPS: groups, _TOP_GROUPS: top_groups}


def _write(config: ModelConfig) -> dict[str, Any]:
    extras = config.extras
    return {
        **write_experts(config, _COUNT, _WIDTH),
        **{key: extras[key] for key in (_SCALE, _SHARED_COUNT, _GROUPS, _TOP_GROUPS)},
        "attention_bias": config.attention_bias,
        "use_qk_norm": config.qk_norm,
        "norm_topk_prob": extras[RENORMALIZE],
        "first_k_dense_replace": len(extras[DENSE_LAYERS]),
        "partial_rotary_factor": 1.0,
    }


def _shared_inner(config: ModelConfig) -> Extent:
    return Extent(config.extras[_SHARED_COUNT] * config.extras[WIDTH])


ARCHITECTURE = Architecture(
    "glm4_moe",
    GLM4MoEDecoder,
    in_some_layers(
        differing(DECODER, post_attention_layernorm={"gguf": "blk.{i}.post_attention_norm"}),
        (
            *expert_modules("mlp"),
            correction_module("mlp"),
            *shared_modules(_SHARED, _shared_inner),
        ),
    ),
    {
        "vocab_size": 151552,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": False,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
    },
    _read,
    _write,
    GGUFFamily(
        "glm4moe",
        keys={
            **gguf_keys(_COUNT, _WIDTH),
            _SHARED_COUNT: "expert_shared_count",
            "first_k_dense_replace": "leading_dense_block_count",
            _SCALE: "expert_weights_scale",
            "norm_topk_prob": "expert_weights_norm",
            _GROUPS: "expert_group_count",
            _TOP_GROUPS: "expert_group_used_count",
        },
        only={"expert_gating_func": 2},
    ),
)
