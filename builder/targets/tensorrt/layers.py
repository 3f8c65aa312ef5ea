"""The table of layers that TensorRT logs of a plan: which kernels it chose, on which types.

The names of kernels are internals, as seen in tensorrt_rtx 1.7.1; whoever looks for one asks here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_ROW = re.compile(
    r"^Name: (?P<name>.+?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*)\], "
    r"Constants: \[(?P<constants>.*)\], Outputs: \[(?P<outputs>.*)\], TacticName: ",
    re.MULTILINE,
)
_OPERAND = re.compile(r"Name: (?P<name>.+?), Dimensions: .*?Datatype: (?P<dtype>\w+)")
_PROFILE = re.compile(r"_myl(\d+)_\d+$")
# Types of weights and what takes them, the narrowest first.
_NARROW = ("Int4", "Int8", "FP8")
# A product, alone or with what is around it; and what is generated for everything else.
PRODUCT, FUSED, OTHER = "gemm", "runtime_fusion", "kgen"


@dataclass(frozen=True, slots=True)
class Layer:
    """A kernel of a plan: its ``kind``, and the types of what it reads and makes; ``profile`` is
    the range of sizes that it is for."""

    name: str
    kind: str
    profile: int
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def is_product(self) -> bool:
        """Whether it multiplies by a matrix."""
        return self.kind in (PRODUCT, FUSED)

    @property
    def narrowest(self) -> str:
        """The narrowest type that it reads, which is that of its codes if it has any."""
        found = (*self.inputs, *self.constants)
        return next((dtype for dtype in _NARROW if dtype in found), self.inputs[0])


def read_layers(table: str) -> list[Layer]:
    """The rows of the table; what only computes shapes is left out."""
    return list(_rows(table))


def _rows(table: str) -> Iterator[Layer]:
    for row in _ROW.finditer(table):
        inputs, constants, outputs = (
            tuple(found["dtype"] for found in _OPERAND.finditer(row[part]))
            for part in ("inputs", "constants", "outputs")
        )
        if outputs:
            of = _PROFILE.search(row["name"])
            profile = int(of[1]) if of else 0
            yield Layer(row["name"], row["kind"], profile, inputs, constants, outputs)


def count_products(layers: Sequence[Layer]) -> dict[str, int]:
    """How many products of one profile run on every kind of kernel, such as ``gemm FP8``."""
    return dict(
        Counter(f"{x.kind} {x.narrowest}" for x in layers if x.is_product and x.profile == 0)
    )


def unpackers(layers: Sequence[Layer]) -> list[Layer]:
    """Kernels that only unpack or turn codes of weights, so that another kernel multiplies by
    wide numbers: no plan should have any."""
    return [
        layer
        for layer in layers
        if layer.kind == OTHER and {*layer.inputs, *layer.constants} & set(_NARROW)
    ]
