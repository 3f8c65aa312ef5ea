"""How an operator's signature is written: once, as data that every consumer derives from.

The graph builder checks nodes against it, the arguments of its C++ kernel and what fills them are
generated from it (``plugins/cpu/codegen.py``, ``plugins/native.py``), and ``docs/operators.md`` is
printed from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

DOMAIN = "slipstream"

# What flows between operators: float32 on a CPU, whose kernels are compiled for it alone, and the
# dtype that an engine was built with on a GPU.
ACTIVATION_DTYPES = ("float32", "bfloat16", "float16")


# What an operator does with a weight: multiplies its first input by it, or looks up its rows.
WeightUse = Literal["product", "rows"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: its dtypes (ONNX names in lower case; several: any of them) and its
    shape.

    A dimension is a name, bound by the first required input that has it as a whole axis, or an
    expression of names and attributes. An empty shape means that the operator's text says what is
    allowed. ``written`` marks an input that the operator also writes, in place; ``weight`` a weight
    in any ``WeightFormat``, which preparation brings into the forms that kernels hold.
    """

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[str, ...]
    doc: str
    optional: bool = False
    written: bool = False
    weight: WeightUse | None = None


# What an ``int`` may be where nobody says: graphs come from files, and kernels multiply attributes.
INT_RANGE = (-(2**31), 2**31 - 1)


@dataclass(frozen=True, slots=True)
class AttributeSpec:
    """One attribute; ``default=None`` makes it required. ``within`` is the least and the greatest
    value of an ``int``: whoever reads a graph refuses others before they are multiplied."""

    name: str
    type: Literal["int", "float"]
    doc: str
    default: int | float | None = None
    within: tuple[int, int] = INT_RANGE

    def typed(self, value: object) -> int | float:
        """The value in this attribute's type; an integer is a float too. TypeError otherwise, and
        ValueError out of range."""
        if not isinstance(value, bool):
            if self.type == "int" and isinstance(value, Integral):
                number, (low, high) = int(value), self.within
                if not low <= number <= high:
                    raise ValueError(f"attribute {self.name} is {number}, not {low} to {high}")
                return number
            if self.type == "float" and isinstance(value, Real):
                return float(value)
        kind = "an int" if self.type == "int" else "a float"
        raise TypeError(f"attribute {self.name} is {value!r}, which is not {kind}")


@dataclass(frozen=True, slots=True)
class OperatorSpec:
    """The signature of one operator, and where its code is.

    ``reference`` names the NumPy function (``module:function``) that defines what the operator
    computes. ``native`` is the module of the compiled library that holds its C++ kernel, and
    ``checked`` says that C++ of its own looks at a call's arguments before the kernel does.
    ``cuda`` names the function that makes a node a call on a GPU (``plugins/cuda/binding.py``). An
    operator without one of them is lowered to others before it runs there.

    All operators of a library share a ``domain``, and no two libraries may share one. An engine
    records ``version``, which rises when old engines would compute something else.
    """

    name: str
    doc: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attributes: tuple[AttributeSpec, ...]
    reference: str
    version: int = 1
    native: str | None = None
    checked: bool = False
    cuda: str | None = None
    domain: str = DOMAIN

    @property
    def function(self) -> str:
        """The name in snake case, by which C and C++ know the kernel."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", self.name).lower()

    def typed(self, attributes: Mapping[str, object]) -> dict[str, int | float]:
        """A node's attributes in the types of the spec.

        TypeError for a value of another type, for one that is missing, and for an unknown name;
        ValueError for one out of range.
        """
        known = {attribute.name: attribute for attribute in self.attributes}
        if unknown := sorted(set(attributes) - set(known)):
            raise TypeError(f"{self.name} has no attributes {unknown}; it has {sorted(known)}")
        required = {a.name for a in self.attributes if a.default is None}
        if missing := sorted(required - set(attributes)):
            raise TypeError(f"{self.name} needs attributes {missing}")
        return {name: known[name].typed(value) for name, value in attributes.items()}

    def complete(self, attributes: Mapping[str, object]) -> dict[str, int | float]:
        """``typed``, and the defaults of those left out."""
        defaults = {a.name: a.typed(a.default) for a in self.attributes if a.default is not None}
        return defaults | self.typed(attributes)
