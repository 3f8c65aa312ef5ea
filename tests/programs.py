"""Small programs in ONNX text, and two ways to run them: by reference and in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from tests.plugins.linear.weights import random_weight

from slipstream.builder.graph.passes import Pass
from slipstream.builder.graph.program import Program
from slipstream.builder.graph.verifier import verify
from slipstream.plugins import library
from slipstream.plugins.linear import ACTIVATIONS, WEIGHT_TYPES, ZERO_KINDS
from slipstream.plugins.linear.cpu.packing import unpack
from slipstream.plugins.operators import DOMAIN, OPERATORS
from slipstream.plugins.paged_attention import reference as attention
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat, ZeroKind

Arrays = dict[str, NDArray[Any]]
TOKENS = 5  # the size of every dimension that a program leaves open
_HEADER = '<ir_version: 11, opset_import: ["": 23, "slipstream": 1, "com.microsoft": 1]>\n'


def dense(name: str, *shape: int, dtype: str = "float32", seed: int = 0) -> LazyTensor:
    """A random dense weight; one with a single axis is around 1, as norm weights are."""
    rng = np.random.default_rng([seed, *name.encode()])
    values = rng.normal(1.0 if len(shape) == 1 else 0.0, 0.3, shape).astype(np.float32)
    form = WeightFormat(shape, "dense", dtype)
    codes = values.astype(ir.DataType[dtype.upper().replace("32", "")].numpy())
    return LazyTensor(name, form, lambda: QuantTensor(name, form, codes))


def grouped(
    name: str, n: int, k: int, *, bits: int = 4, group: int = 32, zero: ZeroKind = "zero"
) -> LazyTensor:
    """A random weight of integer groups."""
    form = WeightFormat((n, k), "int", "float16", bits, group, zero)
    tensor = random_weight(form, seed=sum(name.encode()))
    return LazyTensor(name, form, lambda: tensor)


def parse(text: str, *weights: LazyTensor) -> Program:
    """The program of an ONNX graph whose inputs include the weights, by name.

    Shapes that the text leaves out are found by running the program.
    """
    model = ir.from_onnx_text(_HEADER + text)
    for index, node in enumerate(model.graph):
        node.name = node.name or f"{node.op_type}_{index}"
    program = Program(model)
    for weight in weights:
        value = next(v for v in model.graph.inputs if v.name == weight.name)
        model.graph.inputs.remove(value)
        made = program.add_weight(weight)
        value.replace_all_uses_with(made)
    for name, array in evaluate(program, feeds(program)).items():
        value = _values(program)[name]
        if value.shape is None:
            value.shape = ir.Shape(["T" if size == TOKENS else size for size in array.shape])
            value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    return program


def graph_input(
    program: Program, name: str, dtype: ir.DataType, shape: tuple[int | str, ...]
) -> ir.Value:
    """A new input of a graph that is not an engine's."""
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    program.graph.inputs.append(value)
    return value


def listing(program: Program) -> list[str]:
    """Every node as text: ``y, z = Op(a, _, b) k=1 l=2``, with ``_`` for an input left out."""
    lines = []
    for node in program.graph:
        inputs = ", ".join("_" if value is None else str(value.name) for value in node.inputs)
        outputs = ", ".join(str(value.name) for value in node.outputs)
        values = sorted((a.name, _shown(a.value)) for a in node.attributes.values())
        line = f"{outputs} = {node.op_type}({inputs})"
        lines.append(" ".join([line, *(f"{name}={value}" for name, value in values)]))
    return lines


def feeds(program: Program, seed: int = 1) -> Arrays:
    """Random inputs; integers are valid rows of everything, and repeat."""
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}
    for value in program.graph.inputs:
        assert value.shape is not None and value.dtype is not None and value.name is not None
        shape = [size if isinstance(size, int) else TOKENS for size in value.shape]
        if value.dtype == ir.DataType.INT32:
            arrays[value.name] = rng.integers(0, TOKENS, shape).astype(np.int32)
        else:
            arrays[value.name] = rng.normal(0, 1, shape).astype(np.float32)
    return arrays


def outputs(program: Program, seed: int = 1) -> Arrays:
    """The outputs of a program that is not lowered yet, by reference, for random inputs."""
    values = evaluate(program, feeds(program, seed))
    return {str(value.name): values[str(value.name)] for value in program.graph.outputs}


def evaluate(program: Program, inputs: Arrays) -> Arrays:
    """Every value that the nodes make: this package's operators by their NumPy references."""
    known: dict[str, Any] = {**inputs, **{n: t.load() for n, t in program.weights.items()}}
    for name, value in program.graph.initializers.items():
        if name not in known and not isinstance(value.const_value, ir.ExternalTensor):
            assert value.const_value is not None
            known[name] = value.const_value.numpy()
    known |= {part.name: array for s in program.stored.values()
              for part, array in zip(s.parts, s.load(), strict=True)}  # fmt: skip
    made: Arrays = {}
    for node in program.graph:
        given = [None if value is None else known[str(value.name)] for value in node.inputs]
        results = _run(node, given)
        made |= {str(v.name): r for v, r in zip(node.outputs, results, strict=True)}
        known |= made
    return made


def apply(program: Program, *passes: Pass) -> list[int]:
    """Run passes as the compiler does, verified, and return how often each matched."""
    counts = []
    for transform in passes:
        counts.append(transform(program))
        program.drop_unused_weights()
        verify(program, str(transform))
    return counts


def run_onnxruntime(program: Program, inputs: Arrays) -> Arrays:
    """The outputs of a lowered program in an onnxruntime session."""
    for weight in program.stored.values():
        for part, array in zip(weight.parts, weight.load(), strict=True):
            assert (array.shape, array.dtype) == (part.shape, part.dtype)
            program.graph.initializers[part.name].const_value = ir.Tensor(array, name=part.name)
    names = [str(value.name) for value in program.graph.outputs]
    run = session(ir.to_proto(program.model).SerializeToString())
    return dict(zip(names, run.run(names, inputs), strict=True))


def session(model: bytes) -> ort.InferenceSession:
    """A session that knows this package's operators."""
    options = ort.SessionOptions()
    options.register_custom_ops_library(library.path())
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def assert_close(got: Arrays, want: Arrays, tolerance: float = 1e-5) -> None:
    """Equal names and shapes, values within ``tolerance`` of the largest value of each array."""
    assert got.keys() == want.keys()
    for name, array in want.items():
        atol = tolerance * max(float(np.abs(array).max()), 1e-6)
        np.testing.assert_allclose(got[name], array, rtol=0, atol=atol, err_msg=name)


def _run(node: ir.Node, given: list[Any]) -> list[NDArray[Any]]:
    if node.domain == DOMAIN:
        return _CALLS[node.op_type](node, given)
    arrays = [_plain(value) for value in given]
    feed = {str(v.name): a for v, a in zip(node.inputs, arrays, strict=True) if v is not None}
    return list(ReferenceEvaluator(ir.to_proto(node)).run(None, feed))


def _reference(op_type: str) -> Callable[..., Any]:
    module, name = OPERATORS[op_type].reference.split(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


def _linear(node: ir.Node, given: list[Any]) -> list[NDArray[Any]]:
    x, weight, bias, residual, norm = (*map(_plain, given[:1]), *_padded(given)[1:])
    attributes = _attributes(node)
    weight, gated = _weight(weight, attributes), bool(attributes.get("gated", 0))
    options = {"bias": bias, "residual": residual, "norm_weight": norm}
    eps = attributes.get("norm_eps", 1e-6)
    known: dict[str, Any] = {name: _plain(value) for name, value in options.items()}
    # What is not lowered yet is computed as a CPU will.
    rounding = "none" if weight.format.kind == "dense" else "block"
    number = attributes.get("activation", ACTIVATIONS[rounding])
    known["activation"] = {value: name for name, value in ACTIVATIONS.items()}[number]
    return [_reference("Linear")(x, weight, **known, norm_eps=eps, gated=gated)]


def _expert_linear(node: ir.Node, given: list[Any]) -> list[NDArray[Any]]:
    x, weight, ids, weights, bias, residual = _padded(given, 6)
    sizes = ("in_features", "out_features", "top_k")
    attributes = {k: v for k, v in _attributes(node).items() if k not in sizes}
    added = {"bias": _plain(bias), "residual": residual}
    return [_reference("ExpertLinear")(x, weight, ids, weights, **added, **attributes)]


def _normed_router(node: ir.Node, given: list[Any]) -> list[NDArray[Any]]:
    x, weight, norm_weight, bias, correction = _padded(given)
    known = (_plain(value) for value in (norm_weight, bias, correction))
    sizes = ("in_features", "out_features")
    attributes = {k: v for k, v in _attributes(node).items() if k not in sizes}
    return list(_reference("NormedRouter")(x, _weight(weight, {}), *known, **attributes))


def _embedding(node: ir.Node, given: list[Any]) -> list[NDArray[Any]]:
    return [_reference("Embedding")(given[0], _weight(given[1], _attributes(node)))]


def _embedding_shard(node: ir.Node, given: list[Any]) -> list[NDArray[Any]]:
    ids, weight, first = given
    return [_reference("EmbeddingShard")(ids, _weight(weight, _attributes(node)), _plain(first))]


def _together(node: ir.Node, given: list[Any]) -> list[NDArray[Any]]:
    """What ranks do that are all alike."""
    x, *others = map(_plain, given)
    attributes = _attributes(node)
    ranks = attributes.pop("ranks")
    result = _reference(node.op_type)([x] * ranks, *others, **attributes)
    return list(result) if isinstance(result, tuple) else [result]


def _paged_attention(node: ir.Node, given: list[Any]) -> list[NDArray[Any]]:
    names = [tensor.name for tensor in OPERATORS["PagedAttention"].inputs]
    found = {name: _plain(value) for name, value in zip(names, given, strict=False)}
    found["qkv"] = np.asarray(found["qkv"], np.float32)
    attributes = attention.Attributes(**_attributes(node))
    return [attention.paged_attention(attention.Inputs(**found), attributes)]


def _elementwise(node: ir.Node, given: list[Any]) -> list[NDArray[Any]]:
    result = _reference(node.op_type)(*map(_plain, given), **_attributes(node))
    return list(result) if isinstance(result, tuple) else [result]


_CALLS: Mapping[str, Callable[[ir.Node, list[Any]], list[NDArray[Any]]]] = {
    "Linear": _linear,
    "ExpertLinear": _expert_linear,
    "Embedding": _embedding,
    "PagedAttention": _paged_attention,
    "GatedActivation": _elementwise,
    "FusedAddRMSNorm": _elementwise,
    "SoftCap": _elementwise,
    "Router": _elementwise,
    "NormedRouter": _normed_router,
    "EmbeddingShard": _embedding_shard,
    "AllReduce": _together,
    "AllReduceAddRMSNorm": _together,
}


def _weight(weight: Any, attributes: Mapping[str, Any]) -> QuantTensor:  # noqa: ANN401
    """A weight in its own format, or the one in a packed blob that the attributes describe."""
    if isinstance(weight, QuantTensor):
        return weight
    shape = (attributes["out_features"], attributes["in_features"])
    gated = bool(attributes.get("gated", 0))
    kind = {number: name for name, number in WEIGHT_TYPES.items()}[attributes["weight_type"]]
    if kind in ("float32", "float16", "bfloat16"):
        return unpack(weight, WeightFormat(shape, "dense", kind), gated)
    zero = {kind: name for name, kind in ZERO_KINDS.items()}[attributes["zero_kind"]]
    form = WeightFormat(
        shape,
        "int",
        {2: "float16", 4: "float32"}[attributes["scale_bytes"]],
        attributes["bits"],
        attributes["group_size"],
        zero,  # type: ignore[arg-type]
    )
    return unpack(weight, form, gated)


def _plain(value: Any) -> Any:  # noqa: ANN401 - an array, a weight or None
    return value.dequantize() if isinstance(value, QuantTensor) else value


def _padded(values: list[Any], count: int = 5) -> list[Any]:
    return [*values, *[None] * (count - len(values))]


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {attribute.name: attribute.value for attribute in node.attributes.values()}


def _shown(value: Any) -> str:  # noqa: ANN401 - whatever an attribute holds
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _values(program: Program) -> dict[str, ir.Value]:
    return {str(value.name): value for node in program.graph for value in node.outputs}
