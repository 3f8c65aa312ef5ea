"""The pre-norm decoder that most open models share, and the hooks where architectures differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from slipstream.builder.contract import LOGITS, CacheSpec, Source, attention_cache
from slipstream.builder.graph.ops import Attributes, Ops
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.rope import rotary_frequencies
from slipstream.weights.tensor import LazyTensor

TensorSource = Callable[[str], LazyTensor]
Rotary = tuple[ir.Value, ir.Value]


@dataclass(slots=True)
class Decoder:
    """Declares one model on an operator surface; subclasses override what their architecture
    changes.

    ``tensor`` gives a weight by its Hugging Face name. What an architecture gives beside logits,
    such as the hidden states of some layers, it says with ``ops.output`` where it makes them.
    """

    ops: Ops
    config: ModelConfig
    tensor: TensorSource

    @classmethod
    def caches(cls, config: ModelConfig, kv_dtype: str, page_size: int) -> tuple[CacheSpec, ...]:
        """What the layers remember of a sequence: pages of one cache, unless an architecture has
        layers of several kinds."""
        layers = range(config.num_layers)
        return (attention_cache(kv_dtype, layers, page_size, config.num_kv_heads, config.head_dim),)

    def build(self) -> None:
        """token_ids ─ embedding ─ layers ─ rows ─ norm ─ head ─ logits."""
        ops, config = self.ops, self.config
        frequencies, factor = rotary_frequencies(config)
        embedding = self.tensor("model.embed_tokens.weight")
        rotary = ops.rotary(ops.input(Source.POSITIONS), frequencies, factor)
        x = ops.embedding(ops.input(Source.TOKEN_IDS), embedding)
        for layer in range(config.num_layers):
            with ops.scope(f"layers.{layer}"):
                x = self.layer(x, rotary, layer)
        x = ops.pick_rows(x)
        x = ops.rms_norm(x, self.tensor("model.norm.weight"), config.rms_norm_eps)
        head = embedding if config.tie_word_embeddings else self.tensor("lm_head.weight")
        ops.output(ops.linear(x, head), LOGITS)

    def layer(self, x: ir.Value, rotary: Rotary, layer: int) -> ir.Value:
        """x + attention(norm(x)), then + mlp(norm(·))."""
        ops, prefix, eps = self.ops, f"model.layers.{layer}.", self.config.rms_norm_eps
        with ops.scope("attn"):
            normed = ops.rms_norm(x, self.tensor(prefix + "input_layernorm.weight"), eps)
            x = ops.add(x, self.attention(normed, rotary, layer, prefix + "self_attn."))
        with ops.scope("mlp"):
            normed = ops.rms_norm(x, self.tensor(prefix + "post_attention_layernorm.weight"), eps)
            return ops.add(x, self.mlp(normed, prefix + "mlp."))

    def attention(self, x: ir.Value, rotary: Rotary, layer: int, prefix: str) -> ir.Value:
        """o_proj(PagedAttention(q_proj(x) | k_proj(x) | v_proj(x)))."""
        biased = self.config.attention_bias
        qkv = self.ops.concat(
            [self.linear(x, f"{prefix}{name}_proj", bias=biased) for name in "qkv"]
        )
        norms = (
            [self.tensor(f"{prefix}{name}_norm.weight") for name in "qk"]
            if self.config.qk_norm
            else []
        )
        attended = self.ops.paged_attention(qkv, rotary, norms, self.attention_attributes(layer))
        return self.linear(attended, f"{prefix}o_proj", bias=self.config.o_bias)

    def attention_attributes(self, layer: int) -> Attributes:
        """Attributes of a layer's PagedAttention."""
        config = self.config
        return {
            "layer": layer,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "scale": config.head_dim**-0.5,
            "sliding_window": config.window(layer) or 0,
            "soft_cap": 0.0,
            "norm_eps": config.rms_norm_eps,
        }

    def mlp(self, x: ir.Value, prefix: str) -> ir.Value:
        """down_proj(silu(gate_proj(x)) * up_proj(x))."""
        biased = self.config.mlp_bias
        gate_up = self.ops.concat(
            [self.linear(x, f"{prefix}{name}_proj", bias=biased) for name in ("gate", "up")]
        )
        return self.linear(self.ops.gated_activation(gate_up), f"{prefix}down_proj", bias=biased)

    def linear(self, x: ir.Value, name: str, *, bias: bool) -> ir.Value:
        """A named projection."""
        with self.ops.scope(name.rsplit(".", 1)[-1]):
            return self.ops.linear(
                x, self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias") if bias else None
            )
