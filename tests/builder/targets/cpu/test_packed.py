from __future__ import annotations

import numpy as np
import pytest
from tests.programs import apply, assert_close, dense, feeds, grouped, listing, outputs, parse
from tests.programs import run_onnxruntime as run

from slipstream.builder.targets.cpu.dense import store_dense_weights
from slipstream.builder.targets.cpu.packed import pack_embedding, pack_linear
from slipstream.plugins.linear import WEIGHT_TYPES, ZERO_KINDS
from slipstream.plugins.linear.cpu.packing import packed_size
from slipstream.weights.tensor import LazyTensor, ZeroKind

LINEAR = """g (float[T, 128] x, float[128] n, float[96, 128] w, float[96] b, float[T, 48] r)
  => (float[T, 48] y) {
  y = slipstream.Linear <in_features = 128, out_features = 96, gated = 1, norm_eps = 0.01>
    (x, w, b, r, n)
}"""


@pytest.mark.parametrize("zero", ["midpoint", "zero", "offset"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_linear_reads_a_blob_that_its_attributes_describe(
    bits: int, group: int, zero: ZeroKind
) -> None:
    weight = grouped("w", 96, 128, bits=bits, group=group, zero=zero)
    program = parse(LINEAR, dense("n", 128), weight, dense("b", 96))
    inputs, want = feeds(program), outputs(program)
    assert apply(program, pack_linear, store_dense_weights)[0] == 1
    assert listing(program) == [
        f"y = Linear(x, w.packed, b.float32, r, n.float32) activation=4 bits={bits} gated=1 "
        f"group_size={group} in_features=128 norm_eps=0.01 out_features=96 scale_bytes=2 "
        f"weight_type=0 zero_kind={ZERO_KINDS[zero]}"
    ]
    assert program.stored["w.packed"].parts[0].shape == (packed_size(weight.format, gated=True),)
    assert_close(outputs(program), want, 1e-6)
    assert_close(run(program, inputs), want)


@pytest.mark.parametrize(
    "weight",
    [grouped("e", 320, 64, bits=8), dense("e", 320, 64, dtype="bfloat16")],
    ids=["int8", "bfloat16"],
)
def test_a_tied_weight_is_one_blob(weight: LazyTensor) -> None:
    program = parse(
        """g (int32[T] ids, float[320, 64] e) => (float[T, 64] x, float[T, 320] y) {
          x = slipstream.Embedding <in_features = 64, out_features = 320> (ids, e)
          y = slipstream.Linear <in_features = 64, out_features = 320> (x, e)
        }""",
        weight,
    )
    inputs, want = feeds(program), outputs(program)
    assert pack_linear(program) == pack_embedding(program) == 1
    program.drop_unused_weights()
    assert list(program.stored) == ["e.packed"] and not program.weights
    got = run(program, inputs)
    np.testing.assert_array_equal(got["x"], want["x"])
    assert_close(got, want)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_dense_linear_reads_its_numbers_as_they_are(dtype: str) -> None:
    weight = dense("w", 96, 128, dtype=dtype)
    program = parse(LINEAR, dense("n", 128), weight, dense("b", 96))
    inputs, want = feeds(program), outputs(program)
    assert apply(program, pack_linear, store_dense_weights)[0] == 1
    assert listing(program) == [
        "y = Linear(x, w.packed, b.float32, r, n.float32) activation=0 gated=1 in_features=128 "
        f"norm_eps=0.01 out_features=96 weight_type={WEIGHT_TYPES[dtype]}"
    ]
    assert program.stored["w.packed"].parts[0].shape == (96 * 128 * (4 if "32" in dtype else 2),)
    assert_close(outputs(program), want, 1e-6)
    assert_close(run(program, inputs), want)


def test_formats_that_the_kernels_cannot_hold_are_left() -> None:
    program = parse(LINEAR.replace("gated = 1", "gated = 0").replace("48]", "96]"),
                    dense("n", 128), grouped("w", 96, 128), dense("b", 96))  # fmt: skip
    program.weights["w"] = grouped("w", 96, 128, group=16)
    before = listing(program)
    assert pack_linear(program) == 0
    assert listing(program) == before
