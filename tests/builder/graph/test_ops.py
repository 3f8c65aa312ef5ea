"""The operator surface: node names, shapes, shared weights, and numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from tests.programs import TOKENS, dense, evaluate, feeds, graph_input, grouped, listing

from slipstream.builder.contract import CacheSpec, Output, Source, attention_cache
from slipstream.builder.graph.ops import FLOAT, Attributes, Ops
from slipstream.builder.graph.program import new_program
from slipstream.builder.graph.verifier import verify
from slipstream.plugins.operators import DOMAIN

ATTENTION: Attributes = {
    "layer": 0,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "scale": 0.5,
}


def ops(*caches: CacheSpec) -> Ops:
    return Ops(new_program("test"), caches)


def given(o: Ops, name: str = "x", width: int = 64) -> ir.Value:
    """Columns that come from elsewhere."""
    return graph_input(o.program, name, FLOAT, ("T", width))


def shape(value: ir.Value) -> list[int | str | None]:
    assert value.shape is not None
    return [size if isinstance(size, int) else size.value for size in value.shape]


def test_names_are_paths_and_unique() -> None:
    o = ops()
    x = given(o)
    with o.scope("layers.0"), o.scope("attn"):
        first = o.add(x, x)
        second = o.add(first, x)
    third = o.add(second, x)
    assert [v.name for v in (first, second, third)] == [
        "layers.0/attn/Add",
        "layers.0/attn/Add_1",
        "Add",
    ]
    assert [node.name for node in o.program.graph] == [v.name for v in (first, second, third)]


def test_every_operator_makes_the_shape_it_says_and_computes_it() -> None:
    o = ops()
    x = given(o)
    embedded = o.embedding(o.input(Source.TOKEN_IDS), dense("e", 320, 64))
    normed = o.rms_norm(o.add(x, embedded), dense("n", 64), 1e-5)
    plain = o.linear(normed, dense("w", 48, 64, dtype="bfloat16"))
    biased = o.linear(normed, grouped("v", 16, 64), dense("b", 16))
    gate_up = o.concat([plain, biased])
    gated = o.gated_activation(gate_up)
    picked = o.pick_rows(gated)
    o.output(picked, "y")
    verify(o.program, "the test")
    assert [shape(v)[1] for v in (embedded, normed, plain, biased, gate_up, gated)] == [
        *(64, 64, 48, 16, 64, 32)
    ]
    assert shape(picked) == ["L", 32]

    inputs = feeds(o.program)
    values = evaluate(o.program, inputs)
    stream = inputs["x"] + dense("e", 320, 64).load().codes[inputs["token_ids"]]
    norm = np.sqrt((stream**2).mean(-1, keepdims=True) + 1e-5)
    want = stream / norm * dense("n", 64).load().codes
    np.testing.assert_allclose(values[str(normed.name)], want, rtol=1e-5)
    gate, up = np.split(values["Concat"], 2, axis=1)
    want = (gate / (1 + np.exp(-gate)) * up)[inputs["logits_rows"]]
    np.testing.assert_allclose(values["y"], want, rtol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 1.25])
def test_rotary_angles(factor: float) -> None:
    o = ops()
    frequencies = np.array([1.0, 0.1, 0.01], np.float32)
    cos, sin = o.rotary(o.input(Source.POSITIONS), frequencies, factor)
    assert shape(cos) == shape(sin) == ["T", 3]
    inputs = feeds(o.program) | {"positions": np.arange(0, 40 * TOKENS, 40, dtype=np.int32)}
    values = evaluate(o.program, inputs)
    angles = inputs["positions"][:, None] * frequencies
    np.testing.assert_allclose(values[str(cos.name)], factor * np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(values[str(sin.name)], factor * np.sin(angles), atol=1e-5)
    assert (factor == 1) == (len(list(o.program.graph)) == 5), "no multiplication by one"


def test_a_weight_is_one_value_however_often_it_is_read() -> None:
    o = ops()
    tied = dense("tied", 320, 64)
    x = o.embedding(o.input(Source.TOKEN_IDS), tied)
    o.output(o.linear(x, tied), "y")
    assert list(o.program.graph.initializers) == ["tied"]
    assert listing(o.program)[1].startswith("y = Linear(Embedding, tied)")


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
def test_paged_attention_leaves_out_what_it_has_not(int8: bool, qk_norm: bool, sinks: bool) -> None:
    o = ops(attention_cache("int8" if int8 else "float32", [0], 16, 1, 8))
    qkv, *rotary = (given(o, *named) for named in (("qkv", 32), ("cos", 4), ("sin", 4)))
    norms = [dense("q_norm", 8), dense("k_norm", 8)] if qk_norm else []
    sink = dense("sinks", 2) if sinks else None
    o.output(o.paged_attention(qkv, (rotary[0], rotary[1]), norms, ATTENTION, sink), "y")
    verify(o.program, "the test")
    expected = ["qkv", "cos", "sin", "kv_cache", "query_start", "context_len", "page_table"]
    last = [norm.name for norm in norms] or (["_", "_"] if sinks else [])
    last += ["sinks"] if sinks else []
    expected += ["slot_mapping", *(["kv_scales"] if int8 else ["_"] if last else []), *last]
    assert f"y = PagedAttention({', '.join(expected)}) " in listing(o.program)[0]
    assert shape(o.program.graph.outputs[0]) == ["T", 16]


def test_what_is_named_becomes_the_contract() -> None:
    near = attention_cache("float32", [1], 16, 1, 8, name="near", window=32)
    o = ops(attention_cache("float32", [0], 16, 1, 8), near)
    x = o.embedding(o.input(Source.TOKEN_IDS), dense("e", 320, 32))
    angles = o.rotary(o.input(Source.POSITIONS), np.ones(4, np.float32), 1.0)
    for layer, window in enumerate((0, 32)):
        attributes: Attributes = {**ATTENTION, "layer": layer, "sliding_window": window}
        x = o.paged_attention(x, angles, [], attributes)
        x = o.linear(x, dense(f"w{layer}", 32, 16))
    o.output(x, "hidden")
    rows = o.pick_rows(x)
    o.output(o.linear(rows, dense("head", 320, 32)), "logits")
    contract = o.contract("graph.onnx")
    assert [port.name for port in contract.inputs] == [
        *("token_ids", "positions", "kv_cache", "query_start", "context_len", "page_table"),
        *("slot_mapping", "kv_cache.near", "page_table.near", "slot_mapping.near", "logits_rows"),
    ]
    assert contract.inputs[-3].cache == "near" and contract.inputs[-3].shape == ("S", "P.near")
    assert contract.outputs == (
        Output("hidden", "float32", ("T", 32)),
        Output("logits", "float32", ("L", 320)),
    )
    assert contract.seam == ("hidden", "Gather")
    layers = [node.attributes["layer"].as_int() for node in o.program.nodes("PagedAttention")]
    assert layers == [0, 0], "of their own caches"
    o.program.contract, o.program.caches = contract, o.caches
    verify(o.program, "the test")


def test_attributes_have_the_types_of_the_spec() -> None:
    """1 for a float is 1.0, never the default; what is no number of that kind is refused."""
    o = ops()
    x = graph_input(o.program, "x", FLOAT, ("T", 64))
    weight = o.program.add_weight(dense("w", 64))
    made = o._node("FusedAddRMSNorm", [x, x, weight], ("T", 64), {"norm_eps": 1}, DOMAIN)
    node = made.producer()
    assert node is not None and node.attributes["norm_eps"].as_float() == 1.0
    with pytest.raises(TypeError, match=r"attribute norm_eps is \[1\], which is not a float"):
        o._node("FusedAddRMSNorm", [x, x, weight], ("T", 64), {"norm_eps": [1]}, DOMAIN)


def test_any_operator_of_the_table_has_the_shape_that_its_spec_says() -> None:
    o = ops()
    made = o.operator("GatedActivation", [graph_input(o.program, "gate_up", FLOAT, ("T", 8))])
    o.output(made, "y")
    verify(o.program, "the test")
    assert shape(made) == ["T", 4]
