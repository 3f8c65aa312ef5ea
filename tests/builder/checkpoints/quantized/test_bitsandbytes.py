"""bitsandbytes: linears as it saves them, and the numbers it decodes them to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.builder.checkpoints.quantized.files import (
    MODULE,
    Arrays,
    packed,
    read_arrays,
    read_linear,
)

from slipstream.errors import CheckpointError
from slipstream.weights.tensor import QuantTensor

Edit = Callable[[Arrays], object]
NAME = f"{MODULE}.weight"
STATE = "weight.quant_state.bitsandbytes__nf4"
# Of each linear: rows, columns, and the group its blocks of 64 become.
CASES = {
    "nf4": (20, 576, 64),
    "nf4_double": (20, 576, 64),
    "fp4": (24, 128, 64),
    "nf4_straddling": (24, 96, 32),
}
SETTINGS = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def load(tmp_path: Path, arrays: Arrays) -> QuantTensor:
    weights = read_linear(tmp_path, arrays, **SETTINGS)
    assert weights.notes == () and list(weights.tensors) == [NAME]
    lazy = weights.tensors[NAME]
    tensor = lazy.load()
    assert (tensor.name, tensor.format) == (NAME, lazy.format)
    return tensor


@pytest.mark.parametrize("case", CASES)
def test_four_bits_decode_to_what_bitsandbytes_decodes(tmp_path: Path, case: str) -> None:
    arrays, expected = packed("bitsandbytes", case)

    tensor = load(tmp_path, arrays)

    *shape, group = CASES[case]
    assert (tensor.format.kind, tensor.format.bits) == ("codebook", 4)
    assert (tensor.format.shape, tensor.format.group) == (tuple(shape), group)
    np.testing.assert_array_equal(tensor.dequantize(), expected["weight"])


@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales_are_those_of_a_plain_decoder(tmp_path: Path, case: str) -> None:
    arrays, _ = packed("bitsandbytes", case)
    n, k, group = CASES[case]
    codes = np.zeros(n * k, np.uint8)
    for index, byte in enumerate(arrays["weight"].ravel()):
        codes[2 * index], codes[2 * index + 1] = byte // 16, byte % 16
    absmax = [np.float32(x) for x in arrays["weight.absmax"]]
    if "weight.nested_absmax" in arrays:
        state = json.loads(arrays[STATE].tobytes())
        table, outer = arrays["weight.nested_quant_map"], arrays["weight.nested_absmax"]
        absmax = [
            table[code] * outer[index // 256] + np.float32(state["nested_offset"])
            for index, code in enumerate(arrays["weight.absmax"])
        ]
    scales = [absmax[element // 64] for element in range(0, n * k, group)]

    tensor = load(tmp_path, arrays)

    np.testing.assert_array_equal(tensor.unpacked_codes(), codes.reshape(n, k))
    np.testing.assert_array_equal(tensor.scale, np.array(scales).reshape(n, k // group))
    np.testing.assert_array_equal(tensor.codebook, arrays["weight.quant_map"])


def test_blocks_that_end_within_a_row_become_dense(tmp_path: Path) -> None:
    arrays, expected = packed("bitsandbytes", "nf4_ragged")

    weights = read_linear(tmp_path, arrays, **SETTINGS)

    assert weights.notes == (
        f"{NAME}: blocks of 64 do not end with rows of 40; it becomes dense float32",
    )
    lazy = weights.tensors[NAME]
    assert (lazy.format.kind, lazy.format.shape) == ("dense", (24, 40))
    np.testing.assert_array_equal(lazy.load().codes, expected["weight"])


def test_codes_may_be_stored_as_another_type(tmp_path: Path) -> None:
    arrays, expected = packed("bitsandbytes", "nf4_double")
    arrays["weight"] = arrays["weight"].ravel().view(ml_dtypes.bfloat16)[:, None]

    np.testing.assert_array_equal(load(tmp_path, arrays).dequantize(), expected["weight"])


def test_int8_rows_have_a_scale_each(tmp_path: Path) -> None:
    arrays, expected = packed("bitsandbytes", "int8")

    weights = read_linear(tmp_path, arrays, quant_method="bitsandbytes", load_in_8bit=True)

    assert weights.notes == (
        f"{MODULE}: llm_int8_threshold 6.0 is not used: weights stay int8, activations are not "
        "rounded",
    )
    tensor = weights.tensors[NAME].load()
    assert tensor.format == weights.tensors[NAME].format
    assert (tensor.format.bits, tensor.format.group, tensor.format.zero) == (8, 576, "midpoint")
    signed = tensor.unpacked_codes().astype(np.int16) - 128
    np.testing.assert_array_equal(signed, arrays["weight"])
    np.testing.assert_array_equal(tensor.scale, arrays["SCB"][:, None] / np.float32(127))
    # It multiplies by 1/127 last, so the last bit may differ.
    np.testing.assert_allclose(tensor.dequantize(), expected["weight"], rtol=2e-7)


def test_a_linear_that_is_left_out_without_a_word_is_noted(tmp_path: Path) -> None:
    arrays, _ = packed("bitsandbytes", "nf4")
    stored = {f"{MODULE}.{key}": array for key, array in arrays.items()}
    stored["model.layers.0.mlp.up_proj.weight"] = np.ones((4, 4), np.float16)

    weights = read_arrays(tmp_path, stored, **SETTINGS)
    listed = read_arrays(tmp_path, stored, **SETTINGS, llm_int8_skip_modules=["up_proj"])

    assert weights.notes == (
        "model.layers.0.mlp.up_proj: not quantized, though llm_int8_skip_modules does not list it",
    )
    assert listed.notes == ()


def state(**changes: Any) -> Edit:  # noqa: ANN401
    def edit(arrays: Arrays) -> None:
        data = json.loads(arrays[STATE].tobytes())
        text = json.dumps({key: v for key, v in {**data, **changes}.items() if v is not None})
        arrays[STATE] = np.frombuffer(text.encode(), np.uint8)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a: a.pop("weight"), "lacks the tensor .*down_proj.weight, .*download"),
        (lambda a: a.pop("weight.absmax"), "lacks the tensor .*down_proj.weight.absmax"),
        (lambda a: a.pop("weight.nested_quant_map"), "lacks .*weight.nested_quant_map"),
        (lambda a: a.pop(STATE), "neither .SCB nor .quant_state"),
        (lambda a: a.update(extra=a["weight"]), "does not account for.*down_proj.extra"),
        (lambda a: a.update(weight=a["weight"][:-1]), r"5759 bytes, .* says \[20, 576\] at 4"),
        (
            lambda a: a.update({"weight.absmax": a["weight.absmax"][:-1]}),
            r"absmax has shape \[179\].*should be \[180\]",
        ),
        (state(shape=None), "without a shape .N, K. or a blocksize"),
        (state(shape=[20, 575]), r"says \[20, 575\] at 4 bits"),
        (state(blocksize="x"), "blocksize is 'x'; expected an integer of at least 1"),
        (lambda a: a.update({STATE: a[STATE][:-1]}), "bitsandbytes__nf4 cannot be read"),
        (lambda a: a.update({STATE: np.frombuffer(b"[1]", np.uint8)}), "is not a JSON object"),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path: Path, edit: Edit, message: str) -> None:
    arrays, _ = packed("bitsandbytes", "nf4_double")
    edit(arrays)

    with pytest.raises(CheckpointError, match=message):
        read_linear(tmp_path, arrays, **SETTINGS)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a: a.update(weight_format=np.array(2, np.uint8)), "tiles of .*weight_format 2"),
        (lambda a: a.update(SCB=a["SCB"][:-1]), r"SCB has shape \[19\].*\[20\]"),
        (lambda a: a.update(weight=a["weight"].ravel()), "not .N, K."),
        (lambda a: a.update(weight=a["weight"].view(np.uint8)), "has type U8"),
    ],
)
def test_int8_that_does_not_belong_together_is_refused(
    tmp_path: Path, edit: Edit, message: str
) -> None:
    arrays, _ = packed("bitsandbytes", "int8")
    edit(arrays)

    with pytest.raises(CheckpointError, match=message):
        read_linear(tmp_path, arrays, **SETTINGS)
