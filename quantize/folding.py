"""Scales of channels, moved from what linears read into the linears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.quantize.sites import Site, Source

_EVERY_NUMBER = torch.float32


@dataclass(frozen=True, slots=True)
class Folding:
    """How scales of one layer's channels move between its tensors.

    ``weights`` are the layer's, float32, by their name in it; they are changed in place.
    ``kept`` has the type of each tensor that will be stored without quantization.
    """

    weights: dict[str, Tensor]
    kept: Mapping[str, torch.dtype]

    def tied(self, source: Source, values: Tensor) -> Tensor:
        """``values`` ``[K]`` with the mean over the columns that read one row of the source, as
        query heads do that share a value head."""
        extent = source.extent
        if len(values) == extent.length:
            return values
        heads = values.reshape(extent.units, -1, extent.size)
        return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)

    def possible(self, site: Site, source: Source, scales: Tensor) -> Tensor:
        """The scales ``[K]`` nearest to these by which folding is exact.

        A norm's weight is rounded to its type after the division, and the scale follows from the
        result. Where a tensor stays in a type of few digits, scales are powers of two.
        """
        around = self._around(site, source)
        if any(self.kept.get(name, _EVERY_NUMBER) != _EVERY_NUMBER for name in around):
            return torch.exp2(scales.log2().round())
        stored = self.weights[f"{source.name}.weight"]
        if stored.ndim != 1:
            return scales
        dtype = self.kept.get(f"{source.name}.weight", _EVERY_NUMBER)
        norm = stored + source.offset
        divided = (norm / scales - source.offset).to(dtype).float() + source.offset
        exact = norm / divided
        return torch.where((divided != 0) & exact.isfinite() & (exact > 0), exact, 1.0)

    def fold(self, site: Site, source: Source, scales: Tensor) -> None:
        """Divides what the site reads by ``scales`` ``[K]`` and multiplies its columns."""
        for name in site.linears:
            self.weights[f"{name}.weight"] = self.weights[f"{name}.weight"] * scales
        extent = source.extent
        rows = scales.reshape(extent.units, -1, extent.size)[:, 0].reshape(-1)
        self._divide(f"{source.name}.weight", source, rows, source.offset)
        if f"{source.name}.bias" in self.weights:
            self._divide(f"{source.name}.bias", source, rows, 0.0)

    def _divide(self, name: str, source: Source, rows: Tensor, offset: float) -> None:
        values = self.weights[name]
        before, part, after = values.tensor_split((source.start, source.start + len(rows)))
        divided = (part + offset) / (rows if values.ndim == 1 else rows[:, None]) - offset
        self.weights[name] = torch.cat((before, divided, after))

    def _around(self, site: Site, source: Source) -> Iterator[str]:
        """Tensors that folding changes, but for a norm's weight."""
        yield from (f"{name}.weight" for name in site.linears)
        yield f"{source.name}.bias"
        if self.weights[f"{source.name}.weight"].ndim != 1:
            yield f"{source.name}.weight"
