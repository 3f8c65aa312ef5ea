from __future__ import annotations

from tests.programs import assert_close, dense, grouped, listing, outputs, parse

from slipstream.builder.graph.passes.quantize_fp8 import quantize_fp8_weights

TEXT = """g (int32[T] ids, float[320, 128] e, float[64, 128] w, float[64] b, float[320, 64] head)
  => (float[T, 320] y) {
  x = slipstream.Embedding <in_features = 128, out_features = 320> (ids, e)
  h = slipstream.Linear <in_features = 128, out_features = 64> (x, w, b)
  y = slipstream.Linear <in_features = 64, out_features = 320> (h, head)
}"""
WEIGHTS = (dense("e", 320, 128), dense("w", 64, 128), dense("b", 64), dense("head", 320, 64))


def test_linears_are_quantized_and_an_embedding_of_its_own_is_not() -> None:
    program = parse(TEXT, *WEIGHTS)
    before = listing(program)
    assert quantize_fp8_weights(program) == 2
    assert listing(program) == before
    formats = {name: weight.format for name, weight in program.weights.items()}
    assert [formats[name].kind for name in ("e", "w", "b", "head")] == [
        "dense",
        "float8_e4m3",
        "dense",
        "float8_e4m3",
    ]
    assert (formats["w"].group, formats["w"].rows, formats["w"].activation) == (128, 1, "token")
    for tensor in program.weights.values():
        assert tensor.load().format == tensor.format


def test_weights_that_the_checkpoint_quantized_stay_as_they_are() -> None:
    kept = grouped("w", 64, 128)
    program = parse(TEXT, WEIGHTS[0], kept, *WEIGHTS[2:])
    assert quantize_fp8_weights(program) == 1
    assert program.weights["w"] is kept


def test_three_bits_of_mantissa_change_the_result_a_little() -> None:
    program = parse(TEXT, *WEIGHTS)
    want = outputs(program)
    quantize_fp8_weights(program)
    got = outputs(program)
    assert_close(got, want, 0.05)
    assert any((got[name] != want[name]).any() for name in want)
