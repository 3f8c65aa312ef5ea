"""The layers of Gemma 4 and their graph."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import onnx_ir as ir

from slipstream.builder.contract import KV, CacheSpec, Source, attention_cache
from slipstream.builder.graph.ops import Attributes, Routes
from slipstream.builder.models.config import FULL, SLIDING, ModelConfig
from slipstream.builder.models.decoder import Rotary, changed
from slipstream.builder.models.experts import ExpertDecoder

# Of ``ModelConfig.extras``, as config.json calls them.
GLOBAL_HEAD, GLOBAL_KV_HEADS = "global_head_dim", "num_global_key_value_heads"
SHARED, K_IS_V, DOUBLE = "num_kv_shared_layers", "attention_k_eq_v", "use_double_wide_mlp"
INPUT, MOE = "hidden_size_per_layer_input", "enable_moe_block"
_WINDOW = "window"  # the cache of layers with one
_HALF = 0.5**0.5
_IN = "model.per_layer"


def owns_kv(config: ModelConfig, layer: int) -> bool:
    """Whether a layer makes keys and values; the last ones read those of layers before them."""
    return layer < config.num_layers - int(config.extras[SHARED])


def kv_layer(config: ModelConfig, layer: int) -> int:
    """The layer whose keys and values a layer reads: itself, or the last of its kind with some."""
    if owns_kv(config, layer):
        return layer
    kinds = config.layer_kinds
    return max(i for i in range(layer) if owns_kv(config, i) and kinds[i] == kinds[layer])


def in_layer(config: ModelConfig, layer: int) -> ModelConfig:
    """Heads of another size where a layer sees everything, a wider MLP where it reads the keys of
    another."""
    extras, full = config.extras, config.layer_kinds[layer] == FULL
    wide = extras[DOUBLE] and not owns_kv(config, layer)
    return replace(
        config,
        head_dim=extras[GLOBAL_HEAD] if full else config.head_dim,
        num_kv_heads=extras[GLOBAL_KV_HEADS] if full else config.num_kv_heads,
        intermediate_size=config.intermediate_size * (2 if wide else 1),
    )


@dataclass
class Gemma4Decoder(ExpertDecoder):
    """``inputs`` are those that each token has for every layer, side by side."""

    inputs: list[ir.Value] = field(default_factory=list)

    @classmethod
    def caches(cls, config: ModelConfig, kv_dtype: str, page_size: int) -> tuple[CacheSpec, ...]:
        """One for each kind of layer: their heads differ, and windows give pages back."""
        windows = {FULL: 0, SLIDING: config.sliding_window or 0}
        made = []
        for kind, name in ((FULL, KV), (SLIDING, _WINDOW)):
            layers = [
                i
                for i in range(config.num_layers)
                if owns_kv(config, i) and config.layer_kinds[i] == kind
            ]
            if layers:
                seen = in_layer(config, layers[0])
                heads = seen.num_kv_heads, seen.head_dim
                made.append(
                    attention_cache(
                        kv_dtype, layers, page_size, *heads, name=name, window=windows[kind]
                    )
                )
        return tuple(made)

    def embed(self) -> ir.Value:
        """The rows of the tokens; what each layer adds of them is made here, too."""
        x = super().embed()
        if self.config.extras[INPUT]:
            with self.ops.scope("inputs"):
                self.inputs.append(self.layer_inputs(x))
        return x

    def layer_inputs(self, x: ir.Value) -> ir.Value:
        """(norm(projection(x) / √hidden) + table[token]·√width) / √2, ``[T, layers * width]``."""
        ops, config = self.ops, self.config
        width = config.extras[INPUT]
        table = self.tensor("model.embed_tokens_per_layer.weight")
        rows = ops.scale(ops.embedding(ops.input(Source.TOKEN_IDS), table), width**0.5 * _HALF)
        projected = self.linear(x, f"{_IN}_model_projection")
        weight = changed(self.norm_weight(f"{_IN}_projection_norm"), lambda w: w * _HALF)
        # Instead of x / √hidden, with its epsilon, the norm of x with one that is so much larger.
        eps = self.eps() * config.hidden_size
        return ops.add(ops.rms_norm_parts(projected, weight, eps), rows)

    def layer(self, x: ir.Value, rotary: Rotary, layer: int) -> ir.Value:
        """Norms before and after attention, the MLP and the layer's own input; all of it scaled."""
        ops, prefix = self.ops, f"model.layers.{layer}."
        with ops.scope("attn"):
            normed = self.norm(x, prefix + "input_layernorm")
            attended = self.attention(normed, rotary, layer, prefix + "self_attn.")
            x = ops.add(x, self.norm(attended, prefix + "post_attention_layernorm"))
        with ops.scope("mlp"):
            fed = self.feed_forward(x, prefix)
            x = ops.add(x, self.norm(fed, prefix + "post_feedforward_layernorm"))
        for inputs in self.inputs:
            with ops.scope("input"):
                x = ops.add(x, self.own_input(x, inputs, layer, prefix))
        return ops.scale_columns(x, self.tensor(prefix + "layer_scalar"))

    def attention_attributes(self, layer: int) -> Attributes:
        """Heads by kind of layer, whose v are normed, too; scores are not scaled."""
        seen, name = in_layer(self.config, layer), f"model.layers.{layer}.self_attn."
        parts = sum(self.architecture.has(self.config, f"{name}{x}_proj") for x in "kv")
        return {
            "layer": kv_layer(self.config, layer),
            "num_heads": seen.num_heads,
            "num_kv_heads": seen.num_kv_heads,
            "head_dim": seen.head_dim,
            "scale": 1.0,
            "sliding_window": seen.window(layer),
            "soft_cap": 0.0,
            "norm_eps": seen.rms_norm_eps,
            "kv_parts": parts,
            "v_norm": 1,
        }

    def normed_heads(self, layer: int) -> str:
        """Those of k where they are made."""
        return "qk" if owns_kv(self.config, layer) else "q"

    def qkv(self, x: ir.Value, prefix: str) -> ir.Value:
        """As many of them as the layer has."""
        parts = [f"{part}_proj" for part in "qkv"]
        had = [part for part in parts if self.architecture.has(self.config, prefix + part)]
        if len(had) == 1:
            return self.linear(x, prefix + had[0])
        return self.side_by_side(x, prefix, "qkv_proj", had)

    def feed_forward(self, x: ir.Value, prefix: str) -> ir.Value:
        """The MLP, and the experts beside it, which have norms of their own."""
        fed = self.mlp(self.norm(x, prefix + "pre_feedforward_layernorm"), prefix + "mlp.")
        if not self.config.extras[MOE]:
            return fed
        fed = self.norm(fed, prefix + "post_feedforward_layernorm_1")
        routed = self.norm(self.routed(x, prefix), prefix + "post_feedforward_layernorm_2")
        return self.ops.add(fed, routed)

    def routed(self, x: ir.Value, prefix: str) -> ir.Value:
        """The experts of each token, which the router chooses by a norm of its own."""
        routes = self.routes(x, prefix + "router")
        return self.chosen(self.norm(x, prefix + "pre_feedforward_layernorm_2"), prefix, routes)

    def routes(self, x: ir.Value, router: str) -> Routes:
        """With a factor of each expert; scale / √hidden is the weight of the router's norm."""
        ops, root_of_width = self.ops, self.config.hidden_size**0.5
        scale = changed(self.tensor(f"{router}.scale"), lambda w: w / root_of_width)
        logits = self.linear(self.normed(x, scale), f"{router}.proj")
        routes = ops.router(logits, self.routing())
        return ops.scale_routes(routes, self.tensor(f"{router}.per_expert_scale"))

    def own_input(self, x: ir.Value, inputs: ir.Value, layer: int, prefix: str) -> ir.Value:
        """norm(projection(gelu(gate(x)) * input))."""
        ops, width = self.ops, self.config.extras[INPUT]
        gate = self.linear(x, prefix + "per_layer_input_gate")
        own = ops.columns(inputs, layer * width, width)
        gated = ops.gated_activation(ops.concat([gate, own]), "gelu_tanh")
        projected = self.linear(gated, prefix + "per_layer_projection")
        return self.norm(projected, prefix + "post_per_layer_input_norm")
