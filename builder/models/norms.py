"""Which norms a layer has, and the rows of a table that follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from slipstream.builder.models.module import LAYER, Module, hidden


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """The norms of a layer, by their names in it: of what attention and the MLP read, and of what
    they give before it is added to the residual stream. None where there is none."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


_PLAIN = LayerNorms()


def with_norms(modules: tuple[Module, ...], norms: LayerNorms) -> tuple[Module, ...]:
    """A table with these norms in the place of the plain decoder's, and what they change in the
    rows that read and write them."""
    reads = {
        _place(_PLAIN.before_attention): _place(norms.before_attention),
        _place(_PLAIN.before_mlp): _place(norms.before_mlp),
    }
    streams = {
        "o_proj": _place(norms.after_attention) or _place(norms.before_mlp),
        "down_proj": _place(norms.after_mlp) or LAYER,
    }
    table: list[Module] = []
    for module in modules:
        last = module.name.rpartition(".")[2]
        if module.name == _place(_PLAIN.before_attention):
            table += _rows((norms.before_attention, "attn_norm"))
        elif module.name == _place(_PLAIN.before_mlp):
            pairs = (norms.after_attention, "post_attention_norm"), (norms.before_mlp, "ffn_norm")
            table += _rows(*pairs)
        else:
            stream = streams.get(last, module.stream)
            table.append(
                replace(module, reads=reads.get(module.reads, module.reads), stream=stream)
            )
        if last == "down_proj":
            table += _rows((norms.after_mlp, "post_ffw_norm"))
    return tuple(table)


def _place(name: str | None) -> str | None:
    return None if name is None else f"{LAYER}.{name}"


def _rows(*norms: tuple[str | None, str]) -> Iterator[Module]:
    """Of norms by their names in a layer and in that of a GGUF file."""
    for name, gguf in norms:
        if name is not None:
            yield Module(f"{LAYER}.{name}", "norm", (hidden,), gguf=f"blk.{{i}}.{gguf}")
