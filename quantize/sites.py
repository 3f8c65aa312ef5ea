"""Where scales of channels can be folded: the one table of what a decoder layer is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.builder.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Site:
    """Linears that read one x, and the module whose output it is, up to things that commute with
    a scale of its channels: attention (over tokens) and the product with the gate.

    ``residual`` says that the linears' output is added to the residual stream.
    """

    linears: tuple[str, ...]
    source: str
    residual: bool = False


SITES = (
    Site(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    Site(("self_attn.o_proj",), "self_attn.v_proj", residual=True),
    Site(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    Site(("mlp.down_proj",), "mlp.up_proj", residual=True),
)
_EVERY_NUMBER = torch.float32


@dataclass(frozen=True, slots=True)
class Folding:
    """How scales of one layer's channels move between its tensors.

    ``weights`` are the layer's, float32, by their name in it; they are changed in place.
    ``kept`` has the type of each tensor that will be stored without quantization.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    kept: Mapping[str, torch.dtype]

    def tied(self, site: Site, values: Tensor) -> Tensor:
        """``values`` ``[K]`` with the mean over the query heads that read one value head."""
        if site.source != "self_attn.v_proj":
            return values
        shape = (self.config.num_kv_heads, -1, self.config.head_dim)
        heads = values.reshape(shape)
        return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)

    def possible(self, site: Site, scales: Tensor) -> Tensor:
        """The scales ``[K]`` nearest to these by which folding is exact.

        A norm's weight is rounded to its type after the division, and the scale follows from the
        result. Where a tensor stays in a type of few digits, scales are powers of two.
        """
        if any(self.kept.get(name, _EVERY_NUMBER) != _EVERY_NUMBER for name in self._around(site)):
            return torch.exp2(scales.log2().round())
        norm = self.weights[f"{site.source}.weight"]
        if norm.ndim != 1:
            return scales
        dtype = self.kept.get(f"{site.source}.weight", _EVERY_NUMBER)
        divided = (norm / scales).to(dtype).float()
        exact = norm / divided
        return torch.where((divided != 0) & exact.isfinite() & (exact > 0), exact, 1.0)

    def fold(self, site: Site, scales: Tensor) -> None:
        """Divides what the site reads by ``scales`` ``[K]`` and multiplies its columns."""
        for name in site.linears:
            self.weights[f"{name}.weight"] = self.weights[f"{name}.weight"] * scales
        for name in (f"{site.source}.weight", f"{site.source}.bias"):
            if name in self.weights:
                values = self.weights[name]
                rows = self._rows(site, scales)
                self.weights[name] = values / (rows if values.ndim == 1 else rows[:, None])

    def _rows(self, site: Site, scales: Tensor) -> Tensor:
        if site.source != "self_attn.v_proj":
            return scales
        shape = (self.config.num_kv_heads, -1, self.config.head_dim)
        return scales.reshape(shape)[:, 0].reshape(-1)

    def _around(self, site: Site) -> Iterator[str]:
        """Tensors that folding changes, but for a norm's weight."""
        yield from (f"{name}.weight" for name in site.linears)
        yield f"{site.source}.bias"
        if self.weights[f"{site.source}.weight"].ndim != 1:
            yield f"{site.source}.weight"
