"""The CPU kernels in sessions of ONNX Runtime: their numbers, and what they refuse."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from tests.plugins.linear.weights import random_weight
from tests.plugins.paged_attention.cpu.test_kernel import Case, copy
from tests.programs import session

from slipstream.builder.targets.cpu.packed import format_attributes
from slipstream.plugins.linear import reference as linear_reference
from slipstream.plugins.linear.cpu.packing import pack
from slipstream.plugins.operators import DOMAIN, OPERATORS
from slipstream.plugins.paged_attention import reference as attention_reference
from slipstream.weights.tensor import QuantTensor, WeightFormat, ZeroKind

Inputs = dict[str, NDArray[Any] | None]
NATIVE = ("Linear", "Embedding", "PagedAttention")


def run(op_type: str, inputs: Inputs, **attributes: float) -> NDArray[np.float32]:
    """A one-node graph in a session, whose inputs are the given arrays themselves."""
    names = [name if array is not None else "" for name, array in inputs.items()]
    while not names[-1]:
        names.pop()
    given = {name: array for name, array in inputs.items() if array is not None}
    values = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim
        )
        for name, array in given.items()
    ]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, None])
    node = onnx.helper.make_node(op_type, names, ["y"], "node", domain=DOMAIN)
    node.attribute.extend(onnx.helper.make_attribute(n, v) for n, v in attributes.items())
    graph = onnx.helper.make_graph([node], "g", values, [output])
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(DOMAIN, 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    binding = (made := session(model.SerializeToString())).io_binding()
    for name, array in given.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    binding.bind_output("y")
    made.run_with_iobinding(binding)
    return np.array(binding.copy_outputs_to_cpu()[0])


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def assert_close(got: NDArray[np.float32], want: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(np.abs(want).max()))


def weight(
    n: int = 48, k: int = 64, bits: int = 4, zero: ZeroKind = "zero", dtype: str = "float16"
) -> QuantTensor:
    return random_weight(WeightFormat((n, k), "int", dtype, bits, 32, zero))


def linear(w: QuantTensor, gated: bool = False) -> dict[str, float]:
    """Attributes of a Linear or an Embedding with this weight."""
    n, k = w.format.shape
    extra = {"gated": 1} if gated else {}
    return {
        "in_features": k,
        "out_features": n,
        **format_attributes(w.format),
        **extra,
    }


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("names", [(), ("bias",), ("residual",), ("norm_weight",),
                                   ("bias", "residual", "norm_weight")])  # fmt: skip
def test_linear(names: tuple[str, ...], gated: bool, tokens: int) -> None:
    """Every combination of inputs left out; norm_eps is left to its default, which matters here."""
    w = weight()
    shapes = {"bias": (48,), "residual": (tokens, 24 if gated else 48), "norm_weight": (64,)}
    options: dict[str, Any] = {n: normal(*s, seed=i) if n in names else None
               for i, (n, s) in enumerate(shapes.items())}  # fmt: skip
    x = 1e-3 * normal(tokens, 64)
    got = run("Linear", {"x": x, "weight": pack(w, gated), **options}, **linear(w, gated))
    if not tokens:
        assert got.shape == (0, 24 if gated else 48)
        return
    want = linear_reference.linear(x, w, gated=gated, norm_eps=1e-6, activation="block", **options)
    assert_close(got, want)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("zero", ["midpoint", "zero", "offset"])
@pytest.mark.parametrize("bits", [4, 8])
def test_linear_and_embedding_of_every_format(bits: int, zero: ZeroKind, dtype: str) -> None:
    w = weight(bits=bits, zero=zero, dtype=dtype)
    x, ids = normal(7, 64), np.array([0, 47, 3, 3], np.int32)
    got = run("Linear", {"x": x, "weight": pack(w)}, **linear(w))
    assert_close(got, linear_reference.linear(x, w, activation="block"))
    got = run("Embedding", {"ids": ids, "weight": pack(w)}, **linear(w))
    assert_close(got, linear_reference.embedding(ids, w))


def test_embedding_of_no_tokens() -> None:
    inputs: Inputs = {"ids": np.zeros(0, np.int32), "weight": pack(weight())}
    assert run("Embedding", inputs, **linear(weight())).shape == (0, 64)


CASES = {
    "plain": Case(),
    "window and soft cap": Case(window=9, soft_cap=5.0),
    "norms": Case(norm=True),
    "sinks": Case(sinks=True),
    "everything": Case(window=9, soft_cap=5.0, norm=True, sinks=True),
}
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "int8": 2e-2}


def attention(inputs: attention_reference.Inputs) -> Inputs:
    """In the order of the spec."""
    names = [tensor.name for tensor in OPERATORS["PagedAttention"].inputs]
    return {name: getattr(inputs, name) for name in names}


def attributes_of(case: Case) -> dict[str, float]:
    attributes = case.attributes()
    return {field.name: getattr(attributes, field.name) for field in fields(attributes)}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_paged_attention(name: str, dtype: str) -> None:
    case = CASES[name]
    inputs = case.inputs(dtype)
    want = attention_reference.paged_attention(expected := copy(inputs), case.attributes())
    got = run("PagedAttention", attention(inputs), **attributes_of(case))
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[dtype] * float(np.abs(want).max()))
    # The session wrote this step's keys and values into the array that it was given.
    written = np.isfinite(expected.kv_cache.astype(np.float32))
    difference = inputs.kv_cache.astype(np.float32) - expected.kv_cache.astype(np.float32)
    assert np.abs(difference[written]).max() <= {"float32": 1e-5, "float16": 1e-2, "int8": 1}[dtype]


def test_paged_attention_without_optional_attributes() -> None:
    case = Case(norm=True)
    inputs = case.inputs("float32")
    inputs.qkv[:] *= 1e-3  # so that the epsilon of the norms matters
    attributes = attributes_of(case)
    for name in ("sliding_window", "soft_cap", "norm_eps"):
        del attributes[name]
    known = replace(case.attributes(), norm_eps=1e-6)
    want = attention_reference.paged_attention(copy(inputs), known)
    got = run("PagedAttention", attention(inputs), **attributes)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(np.abs(want).max()))


def refuse(op_type: str, inputs: Inputs, message: str, **attributes: float) -> None:
    with pytest.raises(RuntimeError, match=f"slipstream.{op_type}: {message}"):
        run(op_type, inputs, **attributes)


X, BLOB = normal(3, 64), pack(weight())


@pytest.mark.parametrize(
    ("changes", "attributes", "message"),
    [
        (
            {"x": normal(3, 32)},
            {},
            r"x does not have the shape .*: axis 1 is 32",
        ),
        ({"x": normal(64)}, {}, "input x has rank 1, expected 2"),
        ({"weight": BLOB[:-1]}, {}, "the packed weight has the wrong size for its attributes"),
        ({}, {"out_features": 64}, "the packed weight has the wrong size for its attributes"),
        ({}, {"bits": 8}, "the packed weight has the wrong size for its attributes"),
        ({}, {"bits": 3}, "the attributes describe no packed format"),
        ({}, {"group_size": 48}, "the attributes describe no packed format"),
        ({}, {"group_size": 0}, "the attributes describe no packed format"),
        ({}, {"scale_bytes": 3}, "the attributes describe no packed format"),
        ({"bias": normal(47)}, {}, r"bias does not have the shape \[out_features\]"),
        (
            {"residual": normal(2, 48)},
            {},
            r"residual does not have the shape \[tokens, ",
        ),
        ({"norm_weight": normal(48)}, {}, r"norm_weight does not have the shape \[in_features\]"),
    ],
)
def test_linear_refuses(changes: Inputs, attributes: dict[str, float], message: str) -> None:
    inputs: Inputs = {"x": X, "weight": BLOB, "bias": None, "residual": None, "norm_weight": None}
    refuse("Linear", inputs | changes, message, **(linear(weight()) | attributes))


@pytest.mark.parametrize("token", [-1, 48, 2**31 - 1, -(2**31)])
def test_embedding_refuses_what_is_outside_the_vocabulary(token: int) -> None:
    ids = np.array([0, token], np.int32)
    message = "a token id is outside the vocabulary"
    refuse("Embedding", {"ids": ids, "weight": BLOB}, message, **linear(weight()))


def edited(name: str, index: tuple[int, ...], value: int) -> Inputs:
    array = getattr(Case().inputs("float32"), name).copy()
    array[index] = value
    return {name: array}


INPUTS = Case().inputs("float32")  # 64 tokens of 5 sequences
PAGES = INPUTS.kv_cache.shape[1]
ATTENTION_DEFECTS: list[tuple[Inputs, dict[str, float], str]] = [
    (edited("slot_mapping", (3,), PAGES * 32), {}, "a slot is outside kv_cache"),
    (edited("slot_mapping", (3,), -1), {}, "a slot is outside kv_cache"),
    (edited("page_table", (4, 2), PAGES), {}, "page_table names a page outside kv_cache"),
    (edited("page_table", (0, 0), -1), {}, "page_table names a page outside kv_cache"),
    (edited("context_len", (1,), 0), {}, "context_len does not fit its queries or page_table"),
    (edited("context_len", (1,), -5), {}, "context_len does not fit its queries or page_table"),
    (edited("context_len", (1,), 999), {}, "context_len does not fit its queries or page_table"),
    (edited("query_start", (0,), 1), {}, "query_start does not cover the tokens"),
    (edited("query_start", (5,), 63), {}, "query_start does not cover the tokens"),
    (edited("query_start", (2,), 60), {}, "context_len does not fit its queries or page_table"),
    ({"qkv": INPUTS.qkv[:, :-1].copy()}, {}, "qkv does not have the shape"),
    ({"cos": INPUTS.cos[:-1].copy()}, {}, "cos does not have the shape"),
    ({"sin": INPUTS.sin[:, :-1].copy()}, {}, "sin does not have the shape"),
    ({"slot_mapping": INPUTS.slot_mapping[:-1].copy()}, {}, "slot_mapping does not have the shape"),
    ({"page_table": INPUTS.page_table[:-1].copy()}, {}, "page_table does not have the shape"),
    ({"kv_cache": INPUTS.kv_cache[:, :, :1].copy()}, {}, "kv_cache must have 2 planes"),
    ({"kv_cache": INPUTS.kv_cache[0].copy()}, {}, "input kv_cache has rank 4, expected 5"),
    ({"kv_cache": INPUTS.kv_cache.astype(np.float64)}, {}, "kv_cache must be float32, float16"),
    (
        {"kv_cache": np.zeros(INPUTS.kv_cache.shape, np.int8)},
        {},
        "pages of integers need kv_scales",
    ),
    ({"q_norm": normal(31)}, {}, r"q_norm does not have the shape \[head_dim\]"),
    ({"k_norm": normal(31)}, {}, r"k_norm does not have the shape \[head_dim\]"),
    ({"sinks": normal(5)}, {}, r"sinks does not have the shape \[num_heads\]"),
    ({}, {"layer": 2}, "layer is outside kv_cache"),
    ({}, {"k_row_major": 1}, "a CPU reads transposed keys"),
    ({}, {"page_size": 16}, "kv_cache does not have the shape"),
]


@pytest.mark.parametrize(("changes", "attributes", "message"), ATTENTION_DEFECTS)
def test_attention_refuses(changes: Inputs, attributes: dict[str, float], message: str) -> None:
    inputs = attention(Case().inputs("float32")) | changes
    refuse("PagedAttention", inputs, message, **{**attributes_of(Case()), **attributes})


def test_a_refused_step_leaves_the_pages_alone() -> None:
    inputs = Case().inputs("float32")
    inputs.slot_mapping[-1] = PAGES * 32
    before = inputs.kv_cache.copy()
    message = "a slot is outside kv_cache"
    refuse("PagedAttention", attention(inputs), message, **attributes_of(Case()))
    np.testing.assert_array_equal(inputs.kv_cache, before)


INPUTS_OF: dict[str, Inputs] = {
    "Linear": {"x": X, "weight": BLOB},
    "Embedding": {"ids": np.zeros(1, np.int32), "weight": BLOB},
    "PagedAttention": attention(Case().inputs("float32")),
}


@pytest.mark.parametrize("name", NATIVE)
def test_a_required_attribute_that_is_missing(name: str) -> None:
    required = next(a.name for a in OPERATORS[name].attributes if a.default is None)
    attributes = attributes_of(Case()) if name == "PagedAttention" else linear(weight())
    del attributes[required]
    with pytest.raises(Exception, match=required):
        run(name, INPUTS_OF[name], **attributes)


HUGE = [2**31, 2**32, 2**60, 2**60 + 32, 2**62 + 16, 2**63 - 1, -(2**63), -1]


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        (name, attribute.name)
        for name in NATIVE
        for attribute in OPERATORS[name].attributes
        if attribute.type == "int"
    ],
)
def test_an_attribute_out_of_range_is_refused_at_load(
    name: str, attribute: str, value: int
) -> None:
    """Before it is multiplied: 2**60 heads of 32 elements would wrap around to none."""
    given = attributes_of(Case()) if name == "PagedAttention" else linear(weight())
    message = f"slipstream.{name}: attribute {attribute} is {value}, not "
    with pytest.raises(Exception, match=message):
        run(name, INPUTS_OF[name], **{**given, attribute: value})


@pytest.mark.parametrize(
    ("name", "attribute"),
    [("Linear", "in_features"), ("Embedding", "out_features"), ("PagedAttention", "page_size")],
)
def test_a_size_of_nothing_is_refused_at_load(name: str, attribute: str) -> None:
    given = attributes_of(Case()) if name == "PagedAttention" else linear(weight())
    with pytest.raises(Exception, match=f"attribute {attribute} is 0, not 1 to "):
        run(name, INPUTS_OF[name], **{**given, attribute: 0})


@pytest.mark.parametrize("value", [1, 1.0])
def test_an_integer_is_taken_where_a_float_is_declared(value: float) -> None:
    case = Case(soft_cap=1.0)
    inputs = case.inputs("float32")
    want = attention_reference.paged_attention(copy(inputs), case.attributes())
    got = run("PagedAttention", attention(inputs), **{**attributes_of(case), "soft_cap": value})
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * float(np.abs(want).max()))


@pytest.mark.parametrize(
    ("attribute", "value", "kind"),
    [
        ("sliding_window", 9.0, "int"),
        ("num_heads", 6.0, "int"),
        ("soft_cap", "1", "float"),
        ("soft_cap", [1.0], "float"),
        ("sliding_window", [9], "int"),
    ],
)
def test_an_attribute_of_another_type_is_refused_at_load(
    attribute: str,
    value: Any,  # noqa: ANN401 - anything but what is right
    kind: str,
) -> None:
    inputs = attention(Case().inputs("float32"))
    message = f"slipstream.PagedAttention: attribute {attribute} is not of type {kind}"
    with pytest.raises(Exception, match=message):
        run("PagedAttention", inputs, **{**attributes_of(Case()), attribute: value})
