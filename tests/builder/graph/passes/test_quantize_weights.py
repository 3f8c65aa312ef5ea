from __future__ import annotations

import logging

import numpy as np
import pytest
from tests.programs import assert_close, dense, grouped, listing, outputs, parse

from slipstream.builder.graph.passes import Pass
from slipstream.builder.graph.passes.quantize_fp8 import quantize_fp8_weights
from slipstream.builder.graph.passes.quantize_weights import QuantizeWeights
from slipstream.builder.graph.verifier import verify
from slipstream.errors import BuildError
from slipstream.weights.rtn import Bits, quantize_rtn

TEXT = """g (int32[T] ids, float[320, 128] e, float[64, 128] w, float[128, 64] v, float[64] b,
  float[320, 128] head) => (float[T, 320] y) {
  x = slipstream.Embedding <in_features = 128, out_features = 320> (ids, e)
  h = slipstream.Linear <in_features = 128, out_features = 64> (x, w, b)
  i = slipstream.Linear <in_features = 64, out_features = 128> (h, v)
  y = slipstream.Linear <in_features = 128, out_features = 320> (i, head)
}"""
WEIGHTS = (
    *(dense("e", 320, 128), dense("w", 64, 128), dense("v", 128, 64), dense("b", 64)),
    dense("head", 320, 128),
)
TIED = TEXT.replace(",\n  float[320, 128] head", "").replace("(i, head)", "(i, e)")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_linears_embedding_and_head_are_quantized(bits: Bits, symmetric: bool) -> None:
    program = parse(TEXT, *WEIGHTS)
    before = listing(program)
    assert QuantizeWeights(bits, 32, symmetric)(program) == 4
    assert listing(program) == before
    verify(program, "quantize")
    formats = {name: weight.format for name, weight in program.weights.items()}
    assert [formats[name].bits for name in ("e", "w", "v", "head")] == [8, bits, bits, 8]
    assert formats["b"].kind == "dense"
    zero = "midpoint" if symmetric else "zero"
    assert all(f.group == 32 and f.zero == zero for f in formats.values() if f.kind == "int")
    for tensor in program.weights.values():
        assert tensor.load().format == tensor.format
    want = quantize_rtn(WEIGHTS[1], bits=bits, group_size=32, symmetric=symmetric)
    np.testing.assert_array_equal(program.weights["w"].load().codes, want.codes)


def test_eight_bits_hardly_change_the_result() -> None:
    program = parse(TEXT, *WEIGHTS)
    want = outputs(program)
    QuantizeWeights(8, 32, symmetric=False)(program)
    assert_close(outputs(program), want, 0.03)


def test_a_tied_weight_is_quantized_once_in_8_bits() -> None:
    program = parse(TIED, *WEIGHTS[:4])
    assert QuantizeWeights(4, 64, symmetric=False)(program) == 3
    assert program.weights["e"].format.bits == 8


def test_a_group_that_does_not_divide_gives_way_to_a_smaller_one() -> None:
    program = parse(TEXT, *WEIGHTS)
    assert QuantizeWeights(4, 128, symmetric=False)(program) == 4
    assert program.weights["w"].format.group == 128
    assert program.weights["v"].format.group == 64


def test_a_width_without_a_group_stays_dense(caplog: pytest.LogCaptureFixture) -> None:
    text = TEXT.replace("64", "40")
    weights = (dense("w", 40, 128), dense("v", 128, 40), dense("b", 40))
    program = parse(text, WEIGHTS[0], *weights, WEIGHTS[4])
    with caplog.at_level(logging.WARNING):
        assert QuantizeWeights(4, 32, symmetric=False)(program) == 3
    assert program.weights["v"] is weights[1]
    told = "1 weights (v) stay dense: no group of 128, 64 or 32 divides 40 columns"
    assert caplog.messages == [told]


def test_a_warning_is_told_once_a_kind(caplog: pytest.LogCaptureFixture) -> None:
    text = """g (float[T, 40] x, float[40, 40] a, float[40, 40] b, float[72, 40] c,
      float[64, 72] d, float[40, 64] e) => (float[T, 40] y) {
      h = slipstream.Linear <in_features = 40, out_features = 40> (x, a)
      i = slipstream.Linear <in_features = 40, out_features = 40> (h, b)
      j = slipstream.Linear <in_features = 40, out_features = 72> (i, c)
      k = slipstream.Linear <in_features = 72, out_features = 64> (j, d)
      y = slipstream.Linear <in_features = 64, out_features = 40> (k, e)
    }"""
    shapes = {"a": (40, 40), "b": (40, 40), "c": (72, 40), "d": (64, 72), "e": (40, 64)}
    program = parse(text, *(dense(name, *shape) for name, shape in shapes.items()))
    with caplog.at_level(logging.WARNING):
        assert QuantizeWeights(4, 32, symmetric=False)(program) == 1
    assert caplog.messages == [
        "3 weights (a, …) stay dense: no group of 128, 64 or 32 divides 40 columns",
        "1 weights (d) stay dense: no group of 128, 64 or 32 divides 72 columns",
    ]


def test_weights_that_the_checkpoint_quantized_stay_as_they_are() -> None:
    kept = grouped("w", 64, 128, zero="offset")
    program = parse(TEXT, WEIGHTS[0], kept, *WEIGHTS[2:])
    assert QuantizeWeights(4, 32, symmetric=True)(program) == 3
    assert program.weights["w"] is kept


def test_nothing_is_read_before_it_is_wanted() -> None:
    program = parse(TEXT, *WEIGHTS)

    def fail() -> None:
        raise AssertionError("a weight was read")

    for name, tensor in program.weights.items():
        program.weights[name] = type(tensor)(name, tensor.format, fail)  # type: ignore[arg-type]
    assert QuantizeWeights(4, 32, symmetric=False)(program) == 4


@pytest.mark.parametrize("quantize", [QuantizeWeights(4, 32, False), quantize_fp8_weights])
def test_a_quantization_that_finds_nothing_is_refused(quantize: Pass) -> None:
    weights = {"e": (320, 128), "w": (64, 128), "v": (128, 64), "head": (320, 128)}
    kept = [grouped(name, *shape) for name, shape in weights.items()]
    program = parse(TEXT, *kept, WEIGHTS[3])
    with pytest.raises(BuildError, match="no weight can be quantized: each is quantized in the"):
        quantize(program)


def test_the_weight_of_a_router_stays_as_it_is() -> None:
    """Nor what says how much of a shared expert a token takes."""
    text = """g (float[T, 64] x, float[32, 64] r, float[1, 64] s, float[128, 64] w)
      => (int32[T, 2] ids, float[T, 2] weights, float[T, 1] taken, float[T, 128] y) {
      taken = slipstream.Linear <in_features = 64, out_features = 1> (x, s)
      logits = slipstream.Linear <in_features = 64, out_features = 32> (x, r)
      ids, weights = slipstream.Router <top_k = 2> (logits)
      y = slipstream.Linear <in_features = 64, out_features = 128> (x, w)
    }"""
    for quantize in (QuantizeWeights(4, 32, symmetric=False), quantize_fp8_weights):
        program = parse(text, dense("r", 32, 64), dense("s", 1, 64), dense("w", 128, 64))
        assert quantize(program) == 1
        kinds = {name: program.weights[name].format.kind for name in "rs"}
        assert kinds == {"r": "dense", "s": "dense"}
