"""AutoAWQ: linears that its own packing wrote, and what config.json gets wrong of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.builder.checkpoints.quantized.files import (
    MODULE,
    Arrays,
    packed,
    read_arrays,
    read_linear,
    unpack_bits,
)

from slipstream.errors import CheckpointError
from slipstream.weights.tensor import QuantTensor

Edit = Callable[[Arrays], object]
NAME = f"{MODULE}.weight"
CASES = {
    "gemm": ("gemm", 64),
    "gemm_one_group": ("gemm", 96),
    "gemv": ("gemv", 64),
    "gemv_32": ("gemv", 32),
    "gemv_fast": ("gemv_fast", 64),
}


def settings(case: str, **changes: Any) -> dict[str, Any]:  # noqa: ANN401
    version, group = CASES[case]
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "version": version,
        "zero_point": True,
        **changes,
    }


def load(tmp_path: Path, arrays: Arrays, **quantization: Any) -> QuantTensor:  # noqa: ANN401
    weights = read_linear(tmp_path, arrays, **quantization)
    assert weights.notes == ()
    lazy = weights.tensors[NAME]
    tensor = lazy.load()
    assert (tensor.name, tensor.format) == (NAME, lazy.format)
    return tensor


@pytest.mark.parametrize("case", CASES)
def test_codes_scales_and_zeros_are_those_that_were_packed(tmp_path: Path, case: str) -> None:
    arrays, expected = packed("awq", case)

    tensor = load(tmp_path, arrays, **settings(case))

    assert tensor.format.shape == expected["codes"].shape
    assert (tensor.format.bits, tensor.format.group) == (4, CASES[case][1])
    np.testing.assert_array_equal(tensor.unpacked_codes(), expected["codes"])
    np.testing.assert_array_equal(tensor.scale, expected["scales"])
    if case == "gemv_fast":
        product = expected["scales"].astype(np.float32) * expected["zeros"]
        np.testing.assert_array_equal(tensor.offset, -product.astype(np.float16))
    else:
        np.testing.assert_array_equal(tensor.zero, expected["zeros"])
    group = np.arange(expected["codes"].shape[1]) // tensor.format.group
    weight = (expected["codes"].astype(np.float32) - expected["zeros"][:, group]) * expected[
        "scales"
    ][:, group].astype(np.float32)
    np.testing.assert_array_equal(tensor.dequantize(), weight)


def test_gemm_words_are_read_nibble_by_nibble(tmp_path: Path) -> None:
    arrays, _ = packed("awq", "gemm_one_group")
    words = arrays["qweight"]
    nibbles = unpack_bits(np.ascontiguousarray(words.T), 4, words.shape[1] * 8).T
    column = {0: 0, 1: 2, 2: 4, 3: 6, 4: 1, 5: 3, 6: 5, 7: 7}
    codes = np.zeros((nibbles.shape[1], nibbles.shape[0]), np.uint8)
    for k in range(nibbles.shape[0]):
        for place in range(nibbles.shape[1]):
            codes[place // 8 * 8 + column[place % 8], k] = nibbles[k, place]

    tensor = load(tmp_path, arrays, **settings("gemm_one_group"))

    np.testing.assert_array_equal(tensor.unpacked_codes(), codes)


def test_llm_awq_calls_its_zeros_scaled(tmp_path: Path) -> None:
    arrays, expected = packed("awq", "gemv_fast")
    arrays["scaled_zeros"] = arrays.pop("qzeros")

    tensor = load(tmp_path, arrays, **settings("gemv_fast", version="gemv", backend="llm-awq"))

    np.testing.assert_array_equal(tensor.unpacked_codes(), expected["codes"])


def test_a_bias_is_kept_and_an_empty_one_dropped(tmp_path: Path) -> None:
    arrays, _ = packed("awq", "gemv")
    assert arrays["bias"].any()
    kept = read_linear(tmp_path, arrays, **settings("gemv")).tensors
    np.testing.assert_array_equal(kept[f"{MODULE}.bias"].load().codes, arrays["bias"])

    arrays["bias"] = np.zeros_like(arrays["bias"])

    assert list(read_linear(tmp_path, arrays, **settings("gemv")).tensors) == [NAME]


def test_zeros_of_a_symmetric_file_are_the_midpoint(tmp_path: Path) -> None:
    arrays, expected = packed("awq", "gemm")
    symmetric = {**arrays, "qzeros": np.full_like(arrays["qzeros"], -2004318072)}
    alone = {key: array for key, array in arrays.items() if key != "qzeros"}

    for stored in (symmetric, alone):
        tensor = load(tmp_path, stored, **settings("gemm", zero_point=False))
        assert (tensor.format.zero, tensor.zero) == ("midpoint", None)
        np.testing.assert_array_equal(tensor.unpacked_codes(), expected["codes"])


@pytest.mark.parametrize(
    ("case", "changes", "note"),
    [
        ("gemm", {"version": "gemv"}, "says version gemv, its tensors are gemm"),
        ("gemv", {"version": "gemm"}, "says version gemm, its tensors are gemv"),
        ("gemm", {"group_size": 128}, "says group_size 128, its tensors 64"),
        ("gemv", {"group_size": 128}, "says group_size 128, its tensors 64"),
        ("gemm", {"zero_point": False}, "its tensors have zero points"),
        ("gemm", {"modules_to_not_convert": ["down_proj"]}, "modules_to_not_convert lists it"),
    ],
)
def test_tensors_win_over_the_configuration(
    tmp_path: Path, case: str, changes: dict[str, Any], note: str
) -> None:
    arrays, expected = packed("awq", case)

    weights = read_linear(tmp_path, arrays, **settings(case, **changes))

    assert [note in said and MODULE in said for said in weights.notes] == [True]
    tensor = weights.tensors[NAME].load()
    np.testing.assert_array_equal(tensor.unpacked_codes(), expected["codes"])
    np.testing.assert_array_equal(tensor.zero, expected["zeros"])


def test_a_linear_that_is_left_out_without_a_word_is_noted(tmp_path: Path) -> None:
    arrays, _ = packed("awq", "gemm")
    stored = {f"{MODULE}.{key}": array for key, array in arrays.items()}
    for layer in range(2):
        stored[f"model.layers.{layer}.mlp.up_proj.weight"] = np.ones((4, 4), np.float16)

    weights = read_arrays(tmp_path, stored, **settings("gemm"))
    listed = read_arrays(tmp_path, stored, **settings("gemm", modules_to_not_convert=["up_proj"]))

    assert weights.notes == (
        "2 modules such as model.layers.0.mlp.up_proj: not quantized, though "
        "modules_to_not_convert does not list it",
    )
    assert listed.notes == ()


def gptq_shaped(arrays: Arrays) -> None:
    arrays.update(packed("auto_gptq", "v1_4")[0])


def marlin_shaped(arrays: Arrays) -> None:
    arrays["qweight"] = np.zeros((36, 192), np.int32)


@pytest.mark.parametrize(
    ("edit", "changes", "message"),
    [
        (lambda a: a.pop("scales"), {}, "lacks the tensor .*down_proj.scales.*download"),
        (lambda a: a.update(extra=a["scales"]), {}, "does not account for.*down_proj.extra"),
        (lambda a: a.update(scales=a["scales"].view(np.int16)), {}, "scales has type I16"),
        (lambda a: a.update(qzeros=a["qzeros"][:-1]), {}, r"qzeros has shape \[8, 12\].*\[9, 12\]"),
        (lambda a: a.update(scales=a["scales"][:-2]), {}, "none of AutoAWQ's layouts"),
        (lambda a: a.update(scales=a["scales"][:, :-1]), {}, "none of AutoAWQ's layouts"),
        (gptq_shaped, {}, "which is GPTQ's layout, but config.json says quant_method 'awq'"),
        (marlin_shaped, {}, "quantized with Marlin.*pass the model's plain GPTQ or AWQ"),
        (lambda _: None, {"version": "marlin"}, "quantized with Marlin"),
        (lambda a: a.clear(), {}, "no tensor that ends in .qweight"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    tmp_path: Path,
    edit: Edit,
    changes: dict[str, Any],
    message: str,
) -> None:
    arrays, _ = packed("awq", "gemm")
    edit(arrays)

    with pytest.raises(CheckpointError, match=message):
        read_linear(tmp_path, arrays, **settings("gemm", **changes))


def test_a_padded_layout_needs_a_group_size_that_fits(tmp_path: Path) -> None:
    arrays, _ = packed("awq", "gemv")
    arrays["scales"] = np.zeros((40, 80), np.float16)

    with pytest.raises(CheckpointError, match="room for 80 groups, which no group size gives"):
        read_linear(tmp_path, arrays, **settings("gemv"))


def test_scaled_activations_are_refused(tmp_path: Path) -> None:
    arrays, _ = packed("awq", "gemm")
    stored = {f"{MODULE}.{key}": array for key, array in arrays.items()}
    stored["model.layers.0.mlp.act.scales"] = np.ones(4, np.float16)

    with pytest.raises(CheckpointError, match=r"divides activations by .*mlp\.act\.scales"):
        read_arrays(tmp_path, stored, **settings("gemm"))
