"""Linears one after the other, of which the next reads codes that the one before made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import pytest
import torch
from tests.plugins.linear.weights import random_weight
from torch import Tensor

from slipstream.plugins.cuda.binding import Context, Run, bind, name_of
from slipstream.plugins.linear.cuda import bind as module
from slipstream.plugins.linear.cuda import blas
from slipstream.plugins.linear.cuda.packing import format_attributes, pack
from slipstream.plugins.linear.cuda.tactics import Tactic, Tactics, entry_key
from slipstream.plugins.operators import DOMAIN
from slipstream.weights.tensor import Activation, WeightFormat

pytestmark = pytest.mark.kernel

HIDDEN, INNER = 32, 48


def fp8(n: int, k: int, activation: Activation = "token") -> WeightFormat:
    return WeightFormat((n, k), "float8_e4m3", "float32", 8, k, activation=activation)


def int8(n: int, k: int) -> WeightFormat:
    return WeightFormat((n, k), "int", "float32", 8, k, "midpoint", activation="token")


@dataclass
class MLP:
    """Norm, gate and up; down and residual; norm and the first product of the next layer."""

    formats: tuple[WeightFormat, WeightFormat, WeightFormat]
    device: str
    tokens: int = 2

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.values = {
            name: torch.randn(shape).to(self.device, torch.bfloat16)
            for name, shape in (("x", (self.tokens, HIDDEN)), ("norm", (HIDDEN,)))
        }
        first, *others = (ir.Value(name=name) for name in ("x", "norm"))
        self.values |= {
            f"w{i}": torch.from_numpy(pack(random_weight(fmt, i))).to(self.device)
            for i, fmt in enumerate(self.formats)
        }
        weights = [ir.Value(name=f"w{i}") for i in range(3)]
        norm = others[0]
        gate = self.node(0, [first, weights[0], None, None, norm], gated=1)
        down = self.node(1, [gate.outputs[0], weights[1], None, first])
        self.nodes = [gate, down, self.node(2, [down.outputs[0], weights[2], None, None, norm])]

    def node(self, index: int, inputs: list[ir.Value | None], gated: int = 0) -> ir.Node:
        fmt = self.formats[index]
        sizes = {"out_features": fmt.shape[0], "in_features": fmt.shape[1]}
        attributes = {**format_attributes(fmt), **sizes, "gated": gated, "norm_eps": 1e-5}
        node = ir.node("Linear", inputs, attributes, domain=DOMAIN, name=f"linear{index}")
        node.outputs[0].name, node.outputs[0].dtype = f"y{index}", ir.DataType.BFLOAT16
        return node

    def run(self) -> tuple[list[Tensor], Run]:
        """What each of them makes, and what is left of the step."""
        tactics = Tactics((9, 0), "")
        for fmt in self.formats:  # the kernels of many tokens, whatever their number
            gated = fmt is self.formats[0]
            tactics.entries[entry_key(fmt, gated, 32 if self.tokens > 16 else 2)] = Tactic("blas")
        run = Run(dict(self.values), pdl=False)
        for node in self.nodes:
            (y,) = bind(node, Context(self.values, tactics))(run)
            run.values[name_of(node.outputs[0])] = y
        return [run.values[f"y{i}"] for i in range(3)], run


@pytest.mark.parametrize("kind", ["fp8", "static", "int8"])
def test_codes_are_made_with_what_they_are_codes_of(
    kind: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = ((2 * INNER, HIDDEN), (HIDDEN, INNER), (16, HIDDEN))
    make = {"fp8": fp8, "static": lambda n, k: fp8(n, k, "static"), "int8": int8}[kind]
    if device == "cpu":  # where the library has int8 products of any number of tokens
        monkeypatch.setattr(blas, "_INT8_TOKENS", 1)
    tokens = 2 if device == "cpu" else 17
    mlp = MLP(tuple(make(n, k) for n, k in shapes), device, tokens)  # type: ignore[arg-type]
    asked: list[str] = []

    def noted(name: str, make: Callable[..., object]) -> Callable[..., object]:
        def made(*given: object, **more: object) -> object:
            asked.append(name)
            return make(*given, **more)

        return made

    for name in ("quantize_rows", "rms_norm_quantized"):
        monkeypatch.setattr(blas, name, noted(name, getattr(blas, name)))
    (codes, stream, y), run = mlp.run()
    # Of int8, whose products have no scale yet, the sum is made first.
    assert asked == ["rms_norm_quantized"] * (2 if kind == "int8" else 1)
    assert codes.dtype == (torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    assert not run.shared, "codes live no longer than they are read"
    asked.clear()
    monkeypatch.setattr(module, "_reader_of", lambda *_: None)
    (gate, want_stream, want), _ = mlp.run()
    assert asked == ["rms_norm_quantized", "quantize_rows", "rms_norm_quantized"]
    assert gate.dtype == torch.bfloat16
    assert torch.equal(stream, want_stream) and torch.equal(y, want)


def test_who_reads_them(device: str) -> None:
    """Not a format that is multiplied otherwise, nor where another node reads the same."""
    tokens = 2 if device == "cpu" else 17
    wide = WeightFormat((HIDDEN, INNER), "dense", "bfloat16")
    shapes = ((2 * INNER, HIDDEN), (HIDDEN, INNER), (16, HIDDEN))
    mlp = MLP((fp8(*shapes[0]), wide, fp8(*shapes[2])), device, tokens)
    (gate, _, _), _ = mlp.run()
    assert gate.dtype == torch.bfloat16
    mlp = MLP(tuple(fp8(*shape) for shape in shapes), device, tokens)  # type: ignore[arg-type]
    ir.node("Sigmoid", [mlp.nodes[0].outputs[0]])
    (gate, _, _), _ = mlp.run()
    assert gate.dtype == torch.bfloat16


def graph(*more: str, output: bool = False) -> ir.Node:
    """The sum of a layer, whose residual is what an Embedding makes; and who reads that later."""
    weight, ids = ir.Value(name="w"), ir.Value(name="ids")
    embedding = ir.node("Embedding", [ids, weight], domain=DOMAIN)
    stream = embedding.outputs[0]
    inner = ir.node("Linear", [stream, weight], domain=DOMAIN)
    total = ir.node("Linear", [inner.outputs[0], weight, None, stream], domain=DOMAIN)
    readers = [ir.node(op_type, [stream, weight], domain=DOMAIN) for op_type in more]
    outputs = [total.outputs[0], *([stream] if output else [])]
    ir.Graph([ids, weight], outputs, nodes=[embedding, inner, total, *readers])
    return total


def test_a_sum_takes_the_place_of_a_residual_that_nobody_reads_again() -> None:
    assert module._ends_residual(graph())
    assert not module._ends_residual(graph("Linear"))
    assert not module._ends_residual(graph("Reshape")), "a view of it is read who knows when"
    assert not module._ends_residual(graph(output=True))


class Filling:
    """Of a communicator, what a Linear that is added up asks for."""

    def __init__(self, least: int, device: str) -> None:
        self._least, self._device = least, device
        self.sent: list[Tensor] = []

    def sending(self, rows: int, width: int, dtype: torch.dtype) -> Filling | None:
        self.x = torch.full((rows, width), torch.nan, dtype=dtype, device=self._device)
        return self if rows >= self._least else None

    def filling(self) -> Iterator[slice]:
        for first in range(0, len(self.x), 7):
            yield slice(first, first + 7)
            self.sent.append(self.x[first : first + 7].clone())


@pytest.mark.parametrize(
    "fmt", [WeightFormat((HIDDEN, INNER), dtype="bfloat16"), fp8(HIDDEN, INNER)], ids=str
)
def test_what_is_added_up_is_sent_in_pieces(
    fmt: WeightFormat, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that is large enough, and all that reads it is the sum."""
    x = torch.randn(20, INNER).to(torch.bfloat16)
    values = {"x": x, "w": torch.from_numpy(pack(random_weight(fmt, 0)))}
    values = {name: value.to(device) for name, value in values.items()}
    node = linear_node(fmt)
    ir.node("AllReduce", [node.outputs[0]], domain=DOMAIN)
    tactics = Tactics((9, 0), "")
    monkeypatch.setattr(Tactics, "find", lambda *_: Tactic("blas"))
    made, shared = list[Tensor](), list[dict[str, Any]]()
    for least in (20, 21):
        communicator: Any = Filling(least, device)
        run = Run(dict(values), pdl=False)
        made += bind(node, Context(values, tactics, communicator=communicator))(run)
        shared.append(run.shared)
    assert shared == [{"sent y": communicator_of(shared[0])}, {}]
    pieces = communicator_of(shared[0]).sent
    assert len(pieces) == 3 and torch.equal(torch.cat(pieces), made[0])
    torch.testing.assert_close(made[0], made[1], rtol=1e-2, atol=1e-2)


def communicator_of(shared: dict[str, Any]) -> Filling:
    (found,) = shared.values()
    assert isinstance(found, Filling)
    return found


def linear_node(fmt: WeightFormat) -> ir.Node:
    sizes = {"out_features": fmt.shape[0], "in_features": fmt.shape[1]}
    attributes = {**format_attributes(fmt), **sizes}
    values = [ir.Value(name=name) for name in ("x", "w")]
    node = ir.node("Linear", values, attributes, domain=DOMAIN, name="linear")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.BFLOAT16
    return node
