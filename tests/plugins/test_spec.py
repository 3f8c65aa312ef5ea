"""What every operator's spec declares."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from slipstream.plugins.operators import OPERATORS
from slipstream.plugins.paged_attention import reference as attention_reference
from slipstream.plugins.spec import AttributeSpec, OperatorSpec, TensorSpec

DTYPES = {"float32", "float16", "bfloat16", "float8e4m3fn", "int8", "int32", "int64", "uint8"}


def reference_of(spec: OperatorSpec) -> Callable[..., Any]:
    module, _, name = spec.reference.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


@pytest.mark.parametrize("name", OPERATORS)
def test_specs_are_consistent(name: str) -> None:
    spec = OPERATORS[name]
    assert spec.name == name and spec.doc and spec.version >= 1
    assert callable(reference_of(spec))
    tensors = [*spec.inputs, *spec.outputs]
    names = [tensor.name for tensor in tensors] + [a.name for a in spec.attributes]
    assert len(set(names)) == len(names) and all(map(str.isidentifier, names))
    assert all(tensor.doc for tensor in tensors) and all(a.doc for a in spec.attributes)
    assert all(tensor.dtypes and {*tensor.dtypes} <= DTYPES for tensor in tensors)
    assert not any(tensor.optional for tensor in spec.outputs)
    for attribute in spec.attributes:
        kinds = {"int": int, "float": float}
        assert attribute.default is None or type(attribute.default) is kinds[attribute.type]


@pytest.mark.parametrize("name", ["GatedActivation", "FusedAddRMSNorm", "SoftCap"])
def test_a_plain_reference_takes_what_the_spec_names(name: str) -> None:
    spec = OPERATORS[name]
    parameters = [*inspect.signature(reference_of(spec)).parameters]
    assert parameters == [t.name for t in spec.inputs] + [a.name for a in spec.attributes]


def test_the_attention_reference_takes_what_the_spec_names() -> None:
    spec = OPERATORS["PagedAttention"]
    taken = [field.name for field in fields(attention_reference.Inputs)]
    assert set(taken) == {tensor.name for tensor in spec.inputs}
    attributes = {field.name: field.default for field in fields(attention_reference.Attributes)}
    assert list(attributes) == [attribute.name for attribute in spec.attributes]
    for attribute in spec.attributes:
        if attribute.default is not None:
            assert attributes[attribute.name] == attribute.default


SMALL = OperatorSpec(
    name="SmallOp",
    doc="An operator.",
    inputs=(
        TensorSpec("x", ("float32",), ("tokens", "2*width"), "activations"),
        TensorSpec("pages", ("float32", "bfloat16", "int8"), (), "pages", written=True),
        TensorSpec("bias", ("float32",), ("tokens+1",), "added", optional=True),
    ),
    outputs=(TensorSpec("y", ("int32",), ("tokens", "width//(1+layer)"), "the result"),),
    attributes=(
        AttributeSpec("width", "int", "columns", within=(1, 4096)),
        AttributeSpec("layer", "int", "which", 0),
        AttributeSpec("eps", "float", "tiny", 1e-6),
    ),
    reference="nowhere:nothing",
    checked=True,
)


@pytest.mark.parametrize(
    ("name", "function"),
    [("Linear", "linear"), ("FusedAddRMSNorm", "fused_add_rms_norm"), ("SoftCap", "soft_cap")],
)
def test_kernels_are_named_in_snake_case(name: str, function: str) -> None:
    assert replace(SMALL, name=name).function == function


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"width": 4, "eps": "1"}, "attribute eps is '1', which is not a float"),
        ({"width": 4.0}, "attribute width is 4.0, which is not an int"),
        ({"width": True}, "attribute width is True, which is not an int"),
        ({}, r"SmallOp needs attributes \['width'\]"),
        ({"width": 1, "depth": 2}, r"SmallOp has no attributes \['depth'\]"),
    ],
)
def test_attributes_of_another_type_are_refused(
    attributes: dict[str, object], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        SMALL.typed(attributes)


@pytest.mark.parametrize(("name", "value"), [("width", 0), ("width", 4097), ("layer", 2**31)])
def test_attributes_out_of_range_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"attribute {name} is {value}, not "):
        SMALL.typed({"width": 4, name: value})


@pytest.mark.parametrize("name", OPERATORS)
def test_defaults_are_in_range(name: str) -> None:
    for attribute in OPERATORS[name].attributes:
        if attribute.default is not None:
            assert attribute.typed(attribute.default) == attribute.default


def test_an_integer_is_a_float() -> None:
    typed = SMALL.typed({"width": np.int64(4), "eps": 1})
    assert typed == {"width": 4, "eps": 1.0} and type(typed["eps"]) is float


def test_a_default_has_the_type_of_its_attribute() -> None:
    cap = replace(SMALL, attributes=(AttributeSpec("cap", "float", "the bound", 1),))
    assert type(cap.complete({})["cap"]) is float
