from __future__ import annotations

import pytest
from tests.programs import apply, assert_close, dense, feeds, grouped, listing, outputs, parse
from tests.programs import run_onnxruntime as run

from slipstream.builder.targets.cpu.dense import store_dense_weights
from slipstream.builder.targets.cpu.matmul_nbits import lower_matmul_nbits
from slipstream.weights.tensor import ZeroKind

TEXT = """g (float[T, 192] x, float[48, 192] w, float[48] b) => (float[T, 48] y) {
  y = slipstream.Linear <in_features = 192, out_features = 48> (x, w, b)
}"""


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_and_zero_points(bits: int, group: int) -> None:
    kinds: tuple[ZeroKind, ...] = ("midpoint", "zero")
    for zero in kinds:
        weight = grouped("w", 48, 192, bits=bits, group=group, zero=zero)
        program = parse(TEXT, weight, dense("b", 48))
        inputs, want = feeds(program), outputs(program)
        assert apply(program, lower_matmul_nbits, store_dense_weights)[0] == 1
        zeros = "w.zero" if zero == "zero" else "_"
        assert listing(program) == [
            f"y = MatMulNBits(x, w.codes, w.scale, {zeros}, _, b.float32) K=192 N=48 "
            f"accuracy_level=4 bits={bits} block_size={group}"
        ]
        # onnxruntime rounds activations to int8 in blocks, but not in those of the reference.
        assert_close(run(program, inputs), want, 0.02)


def test_an_odd_number_of_groups_has_half_a_byte_of_zeros_left() -> None:
    text = TEXT.replace("192", "96")
    program = parse(text, grouped("w", 48, 96, zero="zero"), dense("b", 48))
    inputs, want = feeds(program), outputs(program)
    assert apply(program, lower_matmul_nbits, store_dense_weights)[0] == 1
    assert [part.shape for part in program.stored["w.codes"].parts] == [
        *((48, 3, 16), (48, 3), (48, 2))
    ]
    assert_close(run(program, inputs), want, 0.02)


@pytest.mark.parametrize("bits", [4, 8])
def test_offsets_become_a_second_product_whose_sums_are_shared(bits: int) -> None:
    text = TEXT.replace("float[48] b)", "float[48] b, float[32, 192] v)")
    text = text.replace("=> (", "=> (float[T, 32] z, ")
    text = text.replace(
        "}", "  z = slipstream.Linear <in_features = 192, out_features = 32> (x, v)\n}"
    )
    program = parse(
        text,
        grouped("w", 48, 192, bits=bits, zero="offset"),
        dense("b", 48),
        grouped("v", 32, 192, bits=bits, zero="offset"),
    )
    inputs, want = feeds(program), outputs(program)
    assert apply(program, lower_matmul_nbits, store_dense_weights)[0] == 2
    assert [node.op_type for node in program.graph] == [
        *("Reshape", "ReduceSum", "MatMulNBits", "MatMul", "Add"),
        *("MatMulNBits", "MatMul", "Add"),
    ]
    assert_close(run(program, inputs), want, 0.02)


def test_other_formats_are_left() -> None:
    program = parse(TEXT, dense("w", 48, 192), dense("b", 48))
    assert lower_matmul_nbits(program) == 0
