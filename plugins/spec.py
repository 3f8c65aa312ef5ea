"""How an operator's signature is written: once, as data that every consumer derives from.

The graph builder checks nodes against it, the native library's registration is generated from it
(``plugins/cpu/codegen.py``), and ``docs/operators.md`` is printed from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# What flows between operators: float32 on a CPU, whose kernels are compiled for it alone, and the
# dtype that an engine was built with on a GPU.
ACTIVATION_DTYPES = ("float32", "bfloat16", "float16")


# What an operator does with a weight: multiplies its first input by it, or looks up its rows.
WeightUse = Literal["product", "rows"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: its dtypes (ONNX names in lower case; several: any of them) and its
    shape.

    A dimension is a name bound by the first tensor that uses it, or an expression of names and
    attributes. An empty shape means that the operator's text says what is allowed. ``weight`` marks
    a weight in any ``WeightFormat``, which preparation brings into the forms that kernels hold.
    """

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[str, ...]
    doc: str
    optional: bool = False
    weight: WeightUse | None = None


@dataclass(frozen=True, slots=True)
class AttributeSpec:
    """One attribute; ``default=None`` makes it required."""

    name: str
    type: Literal["int", "float"]
    doc: str
    default: int | float | None = None


@dataclass(frozen=True, slots=True)
class OperatorSpec:
    """The signature of one operator of the ``slipstream`` domain.

    ``reference`` names the NumPy function (``module:function``) that defines what the operator
    computes. An engine records ``version``, which rises when old engines would compute something
    else.
    """

    name: str
    doc: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attributes: tuple[AttributeSpec, ...]
    reference: str
    version: int = 1
