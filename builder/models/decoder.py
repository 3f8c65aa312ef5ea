"""The pre-norm decoder that most open models share: its modules, its graph, and the hooks where
architectures differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from slipstream.builder.contract import LOGITS, CacheSpec, Source, attention_cache
from slipstream.builder.graph.ops import Attributes, Ops
from slipstream.builder.models.architecture import Architecture
from slipstream.builder.models.config import ModelConfig, Rope
from slipstream.builder.models.module import (
    LAYER,
    Module,
    head,
    heads,
    hidden,
    inner,
    kv_heads,
    vocabulary,
)
from slipstream.builder.models.rope import rotary_frequencies
from slipstream.weights.tensor import LazyTensor, QuantTensor

TensorSource = Callable[[str], LazyTensor]
Rotary = tuple[ir.Value, ir.Value]
# Gates by the names that configurations have for them.
GATE_OF = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_ATTENTION, _MLP = f"{LAYER}.self_attn", f"{LAYER}.mlp"
_BEFORE_ATTENTION, _BEFORE_MLP = f"{LAYER}.input_layernorm", f"{LAYER}.post_attention_layernorm"


def _has_qk_norms(config: ModelConfig, layer: int) -> bool:
    return config.qk_norm


def _qkv(letter: str) -> Module:
    return Module(
        f"{_ATTENTION}.{letter}_proj",
        "linear",
        (heads if letter == "q" else kv_heads,),
        hidden,
        bias="attention_bias",
        reads=_BEFORE_ATTENTION,
        shard="column",
        adapter=True,
        gguf=f"blk.{{i}}.attn_{letter}",
    )


def _qk_norm(letter: str) -> Module:
    name, gguf = f"{_ATTENTION}.{letter}_norm", f"blk.{{i}}.attn_{letter}_norm"
    return Module(name, "norm", (head,), present=_has_qk_norms, gguf=gguf)


def _gate_up(which: str) -> Module:
    return Module(
        f"{_MLP}.{which}_proj",
        "linear",
        (inner,),
        hidden,
        bias="mlp_bias",
        reads=_BEFORE_MLP,
        shard="column",
        adapter=True,
        gguf=f"blk.{{i}}.ffn_{which}",
    )


EMBEDDING = Module(
    "model.embed_tokens",
    "embedding",
    (vocabulary,),
    hidden,
    shard="vocabulary",
    gguf="token_embd",
)
O_PROJ = Module(
    f"{_ATTENTION}.o_proj",
    "linear",
    (hidden,),
    heads,
    bias="o_bias",
    reads=f"{_ATTENTION}.v_proj",
    stream=_BEFORE_MLP,
    shard="row",
    adapter=True,
    gguf="blk.{i}.attn_output",
)
DOWN_PROJ = Module(
    f"{_MLP}.down_proj",
    "linear",
    (hidden,),
    inner,
    bias="mlp_bias",
    reads=f"{_MLP}.up_proj",
    stream=LAYER,
    shard="row",
    adapter=True,
    gguf="blk.{i}.ffn_down",
)
DECODER = (
    EMBEDDING,
    Module(_BEFORE_ATTENTION, "norm", (hidden,), gguf="blk.{i}.attn_norm"),
    *map(_qkv, "qkv"),
    *map(_qk_norm, "qk"),
    O_PROJ,
    Module(_BEFORE_MLP, "norm", (hidden,), gguf="blk.{i}.ffn_norm"),
    *map(_gate_up, ("gate", "up")),
    DOWN_PROJ,
    Module("model.norm", "norm", (hidden,), gguf="output_norm"),
    Module(
        "lm_head", "linear", (vocabulary,), hidden, tied=True, shard="vocabulary", gguf="output"
    ),
)


@dataclass(slots=True)
class Decoder:
    """Declares one model on an operator surface; subclasses override what their architecture
    changes.

    ``tensor`` gives a weight by its Hugging Face name. What an architecture gives beside logits,
    such as the hidden states of some layers, it says with ``ops.output`` where it makes them.
    """

    ops: Ops
    config: ModelConfig
    architecture: Architecture
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
        rotaries = self.rotaries()
        x = self.embed()
        for layer in range(config.num_layers):
            with ops.scope(f"layers.{layer}"):
                x = self.layer(x, rotaries[config.rope(layer)], layer)
        x = self.norm(ops.pick_rows(x), "model.norm")
        head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        logits = ops.linear(x, self.tensor(f"{head}.weight"))
        cap = self.architecture.logits_cap(config)
        ops.output(ops.soft_cap(logits, cap) if cap else logits, LOGITS)

    def embed(self) -> ir.Value:
        """The rows of the tokens."""
        weight = self.tensor("model.embed_tokens.weight")
        rows = self.ops.embedding(self.ops.input(Source.TOKEN_IDS), weight)
        # After the lookup: a table of scaled rows would be a second one beside that of a tied head.
        scale = self.architecture.embedding_scale(self.config)
        return rows if scale == 1 else self.ops.scale(rows, scale)

    def rotaries(self) -> Mapping[Rope, Rotary]:
        """Cosines and sines of every kind of rotary angle that a layer has."""
        positions = self.ops.input(Source.POSITIONS)
        ropes = dict.fromkeys(map(self.config.rope, range(self.config.num_layers)))
        return {rope: self.ops.rotary(positions, *rotary_frequencies(rope)) for rope in ropes}

    def layer(self, x: ir.Value, rotary: Rotary, layer: int) -> ir.Value:
        """x + attention(norm(x)), then + mlp(norm(·))."""
        ops, prefix = self.ops, f"model.layers.{layer}."
        with ops.scope("attn"):
            normed = self.norm(x, prefix + "input_layernorm")
            x = ops.add(x, self.attention(normed, rotary, layer, prefix + "self_attn."))
        with ops.scope("mlp"):
            normed = self.norm(x, prefix + "post_attention_layernorm")
            return ops.add(x, self.mlp(normed, prefix + "mlp."))

    def attention(self, x: ir.Value, rotary: Rotary, layer: int, prefix: str) -> ir.Value:
        """o_proj(PagedAttention(q_proj(x) | k_proj(x) | v_proj(x)))."""
        qkv = self.ops.concat([self.linear(x, f"{prefix}{name}_proj") for name in "qkv"])
        norms = [self.norm_weight(f"{prefix}{name}_norm") for name in "qk" if self.config.qk_norm]
        attended = self.ops.paged_attention(qkv, rotary, norms, self.attention_attributes(layer))
        return self.linear(attended, f"{prefix}o_proj")

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
        """down_proj(act(gate_proj(x)) * up_proj(x)), act being that of the configuration."""
        gate_up = self.ops.concat([self.linear(x, f"{prefix}{n}_proj") for n in ("gate", "up")])
        gated = self.ops.gated_activation(gate_up, GATE_OF[self.config.hidden_act])
        return self.linear(gated, f"{prefix}down_proj")

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        """A projection of the table, with its bias if it has one."""
        biased = self.architecture.has_bias(self.config, name)
        with self.ops.scope(name.rsplit(".", 1)[-1]):
            return self.ops.linear(
                x, self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias") if biased else None
            )

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        """An RMS norm of the table."""
        return self.ops.rms_norm(x, self.norm_weight(name), self.config.rms_norm_eps)

    def norm_weight(self, name: str) -> LazyTensor:
        """What a norm of the table multiplies by."""
        module, weight = self.architecture.module(name), self.tensor(f"{name}.weight")
        return _shifted(weight, module.offset) if module is not None and module.offset else weight


def _shifted(weight: LazyTensor, offset: float) -> LazyTensor:
    """A dense weight plus a number, in float32."""
    form = replace(weight.format, dtype="float32")

    def load() -> QuantTensor:
        values = weight.load().dequantize() + np.float32(offset)
        return QuantTensor(weight.name, form, values)

    return LazyTensor(weight.name, form, load)
