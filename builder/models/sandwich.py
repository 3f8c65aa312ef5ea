"""Norms on both sides of attention and of the MLP, so that what a layer adds is normed, too."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import onnx_ir as ir

from slipstream.builder.models.architecture import differing
from slipstream.builder.models.decoder import DECODER, Decoder, Rotary
from slipstream.builder.models.module import LAYER, Module, hidden


class Norms(NamedTuple):
    """The four norms of a layer, by the last part of their names."""

    before_attention: str
    after_attention: str
    before_mlp: str
    after_mlp: str


class SandwichDecoder(Decoder):
    """A decoder whose layers norm what attention and the MLP make before it is added."""

    norms: ClassVar[Norms]

    def layer(self, x: ir.Value, rotary: Rotary, layer: int) -> ir.Value:
        """x + norm(attention(norm(x))), then + norm(mlp(norm(·)))."""
        ops, prefix, norms = self.ops, f"model.layers.{layer}.", self.norms
        with ops.scope("attn"):
            normed = self.norm(x, prefix + norms.before_attention)
            attended = self.attention(normed, rotary, layer, prefix + "self_attn.")
            x = ops.add(x, self.norm(attended, prefix + norms.after_attention))
        with ops.scope("mlp"):
            normed = self.norm(x, prefix + norms.before_mlp)
            fed = self.mlp(normed, prefix + "mlp.")
            return ops.add(x, self.norm(fed, prefix + norms.after_mlp))


def sandwiched(norms: Norms) -> tuple[Module, ...]:
    """The plain decoder's table with these norms."""

    def norm(name: str, gguf: str) -> Module:
        return Module(f"{LAYER}.{name}", "norm", (hidden,), gguf=f"blk.{{i}}.{gguf}")

    after_attention = norm(norms.after_attention, "post_attention_norm")
    before_mlp = norm(norms.before_mlp, "ffn_norm")
    after_mlp = norm(norms.after_mlp, "post_ffw_norm")
    table: list[Module] = []
    for module in differing(
        DECODER,
        o_proj={"stream": after_attention.name},
        gate_proj={"reads": before_mlp.name},
        up_proj={"reads": before_mlp.name},
        down_proj={"stream": after_mlp.name},
    ):
        last = module.name.rpartition(".")[2]
        if last == "input_layernorm":
            table.append(dataclasses.replace(module, name=f"{LAYER}.{norms.before_attention}"))
        elif last == "post_attention_layernorm":
            table += [after_attention, before_mlp]
        else:
            table += [module, after_mlp] if last == "down_proj" else [module]
    return tuple(table)
