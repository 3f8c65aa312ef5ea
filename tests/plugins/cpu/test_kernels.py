"""Operators as onnxruntime sees them: their specs, the generated header, and one-node sessions."""

from __future__ import annotations

import ctypes
import inspect
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
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
from slipstream.plugins import arguments, cpu, native
from slipstream.plugins.cpu.codegen import generate, generate_signatures
from slipstream.plugins.linear import reference as linear_reference
from slipstream.plugins.linear.cpu.packing import pack
from slipstream.plugins.operators import DOMAIN, OPERATORS
from slipstream.plugins.paged_attention import reference as attention_reference
from slipstream.plugins.spec import AttributeSpec, OperatorSpec, TensorSpec
from slipstream.weights.tensor import QuantTensor, WeightFormat, ZeroKind

Inputs = dict[str, NDArray[Any] | None]
DTYPES = {"float32", "float16", "bfloat16", "float8e4m3fn", "int8", "int32", "uint8"}
NATIVE = ("Linear", "Embedding", "PagedAttention")


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


@pytest.mark.parametrize("name", ["GatedActivation", "FusedAddRMSNorm"])
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
        AttributeSpec("width", "int", "columns"),
        AttributeSpec("layer", "int", "which", 0),
        AttributeSpec("eps", "float", "tiny", 1e-6),
    ),
    reference="nowhere:nothing",
    checked=True,
)


def test_the_generated_arguments() -> None:
    text = generate([SMALL])
    assert "#define SLIPSTREAM_OPERATORS(X) X(SmallOp, small_op)\n" in text
    struct = text[text.index("struct SmallOp") : text.index("}  // namespace")]
    assert (
        struct.strip()
        == """struct SmallOpArgs {
  const float* x;  // [tokens, 2*width]: activations
  void* pages;  // any shape: pages
  const float* bias;  // [tokens+1], or null: added
  int32_t* y;  // [tokens, width//(1+layer)]: the result
  ElementType pages_type;  // of pages
  int64_t pages_size;  // elements of pages
  int64_t tokens;  // axis 0 of x
  int64_t width;  // columns
  int64_t layer;  // which
  float eps;  // tiny
};

// What is wrong with them, or null: the operator's own look at its arguments.
const char* check(const SmallOpArgs&);"""
    )


def test_the_generated_signature() -> None:
    text = generate_signatures([SMALL])
    struct = text[text.index("struct SmallOp") : text.index("using Signatures")]
    assert (
        struct.strip()
        == """struct SmallOpSignature {
  using Args = SmallOpArgs;
  static constexpr const char* name = "SmallOp";
  static constexpr TensorDeclaration inputs[] = {
    {ElementType::float32, Characteristic::required},
    {ElementType::undefined, Characteristic::required},
    {ElementType::float32, Characteristic::optional},
  };
  static constexpr TensorDeclaration outputs[] = {
    {ElementType::int32, Characteristic::required},
  };
  static auto kernel(const Kernels& kernels) { return kernels.small_op; }

  static void attributes([[maybe_unused]] const Node& node, [[maybe_unused]] Args& args) {
    args.width = node.int_attribute("width");
    args.layer = node.int_attribute("layer", 0);
    args.eps = node.float_attribute("eps", 1e-06);
  }

  static void fill(const Call& call, Args& args) {
    const Tensor x = call.required(0, "x", 2);
    args.x = x.as<const float>();
    const Tensor pages = call.required(1, "pages", 0);
    args.pages = pages.as<void>();
    call.expect_type(pages, "pages", {ElementType::float32, ElementType::int8}, "float32 or int8");
    args.pages_type = pages.type;
    args.pages_size = pages.elements();
    const Tensor bias = call.optional(2, "bias", 1);
    args.bias = bias.as<const float>();
    args.tokens = x.shape[0];
    call.expect_shape(x, "x", {args.tokens, (2 * args.width)}, "[tokens, 2*width]");
    call.expect_shape(bias, "bias", {(args.tokens + 1)}, "[tokens+1]");
  }

  // Whether there is anything to compute.
  static bool make_outputs(const Call& call, Args& args) {
    bool any = false;
    args.y = call.output<int32_t>(0, {args.tokens, divide(args.width, (1 + args.layer))}, any);
    return any;
  }
};"""
    )


def test_ctypes_and_the_compiler_lay_the_arguments_out_alike(tmp_path: Path) -> None:
    """Every member of every operator at the same place."""
    specs = [spec for spec in OPERATORS.values() if spec.native]
    checks = ["#include <cstddef>", '#include "operators.h"', "using namespace slipstream;"]
    for spec in specs:
        mirror = native.arguments_type(spec)
        checks.append(f"static_assert(sizeof({spec.name}Args) == {ctypes.sizeof(mirror)});")
        for field in arguments.fields(spec):
            offset = getattr(mirror, field.name).offset
            checks.append(f"static_assert(offsetof({spec.name}Args, {field.name}) == {offset});")
    compile_header(tmp_path, specs, checks)


def test_the_generated_headers_compile(tmp_path: Path) -> None:
    compile_header(tmp_path, [SMALL], ['#include "signatures.h"'])


def compile_header(folder: Path, specs: list[OperatorSpec], lines: list[str]) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    (folder / "operators.h").write_text(generate(specs))
    (folder / "signatures.h").write_text(generate_signatures(specs))
    (folder / "check.cpp").write_text("\n".join(lines))
    plugins = Path(cpu.__path__[0]).parent
    command = ["c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{folder}", f"-I{plugins}", str(folder / "check.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_size_that_nothing_gives_is_a_defect_of_the_spec() -> None:
    inputs = (TensorSpec("x", ("float32",), ("2*width",), "x"),)
    spec = replace(SMALL, inputs=inputs, outputs=(), attributes=())
    with pytest.raises(ValueError, match=r"SmallOp: width, in the shape of x, is neither"):
        generate([spec])


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


def test_an_integer_is_a_float() -> None:
    typed = SMALL.typed({"width": np.int64(4), "eps": 1})
    assert typed == {"width": 4, "eps": 1.0} and type(typed["eps"]) is float


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
    options = {n: normal(*s, seed=i) if n in names else None
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
    ({"kv_cache": INPUTS.kv_cache[:, :, :1].copy()}, {}, "kv_cache does not have the shape"),
    ({"kv_cache": INPUTS.kv_cache[0].copy()}, {}, "input kv_cache has rank 4, expected 5"),
    ({"kv_cache": INPUTS.kv_cache.astype(np.float64)}, {}, "kv_cache must be float32, float16"),
    ({"kv_cache": np.zeros(INPUTS.kv_cache.shape, np.int8)}, {}, "int8 pages need kv_scales"),
    ({"q_norm": normal(31)}, {}, r"q_norm does not have the shape \[head_dim\]"),
    ({"k_norm": normal(31)}, {}, r"k_norm does not have the shape \[head_dim\]"),
    ({"sinks": normal(5)}, {}, r"sinks does not have the shape \[num_heads\]"),
    ({}, {"layer": 2}, "layer is outside kv_cache"),
    ({}, {"layer": -1}, "layer is outside kv_cache"),
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


@pytest.mark.parametrize("name", NATIVE)
def test_a_required_attribute_that_is_missing(name: str) -> None:
    inputs: dict[str, Inputs] = {
        "Linear": {"x": X, "weight": BLOB},
        "Embedding": {"ids": np.zeros(1, np.int32), "weight": BLOB},
        "PagedAttention": attention(Case().inputs("float32")),
    }
    required = next(a.name for a in OPERATORS[name].attributes if a.default is None)
    attributes = attributes_of(Case()) if name == "PagedAttention" else linear(weight())
    del attributes[required]
    with pytest.raises(Exception, match=required):
        run(name, inputs[name], **attributes)


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
