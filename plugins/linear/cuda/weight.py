"""A packed weight on the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.plugins.cuda.launch import capability_of, interpreting
from slipstream.plugins.linear.cuda.packing import FLOAT4, sections
from slipstream.plugins.linear.cuda.tactics import whole_rows
from slipstream.weights.tensor import WeightFormat

_TILE_ROWS = 16  # of the smallest tile of the split dot


@dataclass(frozen=True, slots=True, eq=False)
class DeviceWeight:
    """Views of the sections of a blob (see ``packing``) on the device.

    codes     dense ``[N, K]`` of its dtype; float8_e4m3fn ``[N, K]``; int32 words ``[N, W]`` of
              integers and float4.
    scale     ``[N/rows, K/group]``, of float4 u8 ``[N, W/4]``; zero u8 and offset
              ``[N, K/group]``; input_scale ``[1]``.
    counters  int32, zero between launches: how many programs of a tile are done.
    """

    format: WeightFormat
    codes: Tensor
    counters: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    offset: Tensor | None = None
    input_scale: Tensor | None = None

    @classmethod
    def from_blob(cls, blob: Tensor, fmt: WeightFormat) -> DeviceWeight:
        """The weight in a uint8 blob, which starts at a multiple of 16 bytes."""
        parts = {
            name: blob[part.start : part.start + part.nbytes]
            .view(getattr(torch, part.dtype))
            .reshape(part.shape)
            for name, part in sections(fmt).items()
        }
        tiles = 2 * -(-fmt.shape[0] // _TILE_ROWS)
        return cls(fmt, counters=torch.zeros(tiles, dtype=torch.int32, device=blob.device), **parts)

    def copy(self) -> DeviceWeight:
        """The same weight in other memory."""
        parts = (self.scale, self.zero, self.offset, self.input_scale)
        return DeviceWeight(
            self.format,
            self.codes.clone(),
            self.counters.clone(),
            *(None if part is None else part.clone() for part in parts),
        )

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        parts = (self.codes, self.scale, self.zero, self.offset)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def shift(self) -> Tensor | None:
        """Zero points or offsets, whichever there are."""
        return self.zero if self.zero is not None else self.offset

    @property
    def typed_codes(self) -> Tensor:
        """The codes in a type that Triton knows on this device: float8 as uint8 where it does not.

        The interpreter takes those too, so that it tries the same arithmetic as an older GPU.
        """
        if self.format.kind != "float8_e4m3" or converts_float8(self.codes.device):
            return self.codes
        return self.codes.view(torch.uint8)

    @property
    def chunk_scales(self) -> Tensor | None:
        """The scales as gemv reads them: the eight exponents of a float4 chunk as an int64."""
        if self.scale is None or self.format.kind != FLOAT4:
            return self.scale
        return self.scale.view(torch.int64)

    @property
    def zero_kind(self) -> str:
        """What kernels of words call ZERO: how a code becomes a number."""
        return "e2m1" if self.format.kind == FLOAT4 else self.format.zero

    @property
    def group(self) -> int:
        """Elements of a group of codes in words; 0 for a scale a row."""
        return 0 if whole_rows(self.format) else self.format.group


def converts_float8(device: torch.device) -> bool:
    """Whether a device has instructions for float8; the interpreter has none."""
    return not interpreting() and capability_of(device) >= (8, 9)
