"""How nodes become calls on a GPU: what is refused."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from slipstream.errors import EngineMismatchError
from slipstream.plugins.cuda.binding import Context, attributes_of, bind
from slipstream.plugins.linear.cuda.tactics import Tactics
from slipstream.plugins.operators import DOMAIN

ATTENTION = {
    "layer": 0,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "page_size": 16,
    "scale": 0.5,
}


def attention(**attributes: float | str) -> ir.Node:
    return ir.node("PagedAttention", [], {**ATTENTION, **attributes}, domain=DOMAIN, name="node")


def test_an_integer_is_taken_where_a_float_is_declared() -> None:
    found = attributes_of(attention(soft_cap=1))
    assert found["soft_cap"] == 1.0 and type(found["soft_cap"]) is float
    assert found["norm_eps"] == 1e-6, "the default of one left out"


@pytest.mark.parametrize(
    ("name", "value"), [("soft_cap", "1"), ("sliding_window", 9.0), ("colour", 1)]
)
def test_an_attribute_of_another_type_is_refused(name: str, value: float | str) -> None:
    with pytest.raises(EngineMismatchError, match=f"node: .*{name}"):
        attributes_of(attention(**{name: value}))


@pytest.mark.parametrize(("op_type", "domain"), [("Softmax", ""), ("Swirl", "elsewhere")])
def test_an_operator_without_a_kernel_is_named(op_type: str, domain: str) -> None:
    node = ir.node(op_type, [], domain=domain)
    message = rf"operator {domain}\.{op_type} has no kernel for a GPU"
    with pytest.raises(EngineMismatchError, match=message):
        bind(node, Context({}, Tactics((9, 0), "")))
