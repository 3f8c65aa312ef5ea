"""GPTQ: linears that AutoGPTQ and GPTQModel packed, both conventions of zeros, act-order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.builder.checkpoints.quantized.files import (
    MODULE,
    Arrays,
    pack_gptq,
    packed,
    read_arrays,
    read_linear,
    unpack_bits,
)

from slipstream.errors import CheckpointError
from slipstream.weights.tensor import LazyTensor, QuantTensor

Edit = Callable[[Arrays], object]
NAME = f"{MODULE}.weight"
# Of each linear: tool, bits, group size, checkpoint_format.
CASES: dict[str, tuple[str, int, int, str]] = {
    "v1_2": ("auto_gptq", 2, 32, "gptq"),
    "v1_3": ("auto_gptq", 3, 32, "gptq"),
    "v1_4": ("auto_gptq", 4, 32, "gptq"),
    "v1_8": ("auto_gptq", 8, 32, "gptq"),
    "v1_symmetric": ("auto_gptq", 4, 64, "gptq"),
    "v1_act_order": ("auto_gptq", 4, 32, "gptq"),
    "v2_partial": ("gptqmodel", 4, 128, "gptq_v2"),
    "v2_act_order": ("gptqmodel", 4, 128, "gptq_v2"),
    **{f"v2_{bits}": ("gptqmodel", bits, 32, "gptq_v2") for bits in (2, 3, 4, 8)},
    **{f"v1_of_v2_{bits}": ("gptqmodel", bits, 32, "gptq") for bits in (2, 3, 4, 8)},
}
SYMMETRIC = ("v1_8", "v1_symmetric", "v2_act_order")


def settings(case: str, **changes: Any) -> dict[str, Any]:  # noqa: ANN401
    tool, bits, group, version = CASES[case]
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": case in SYMMETRIC,
        "desc_act": "act_order" in case,
        "checkpoint_format": version,
        "meta": {"quantizer": ["gptqmodel:7.7.0"]} if tool == "gptqmodel" else None,
        **changes,
    }


def load(lazy: LazyTensor) -> QuantTensor:
    tensor = lazy.load()
    assert (tensor.name, tensor.format, tensor.input) == (NAME, lazy.format, lazy.input)
    return tensor


@pytest.mark.parametrize("case", CASES)
def test_codes_scales_and_zeros_are_those_that_were_packed(tmp_path: Path, case: str) -> None:
    tool, bits, group, _ = CASES[case]
    arrays, expected = packed(tool, case)

    weights = read_linear(tmp_path, arrays, **settings(case))

    assert weights.notes == () and list(weights.tensors) == [NAME]
    tensor = load(weights.tensors[NAME])
    order = np.argsort(arrays["g_idx"], kind="stable")
    assert tensor.format.shape == expected["codes"].shape
    assert (tensor.format.bits, tensor.format.group) == (8 if bits == 8 else 4, group)
    np.testing.assert_array_equal(tensor.unpacked_codes(), expected["codes"][:, order])
    np.testing.assert_array_equal(tensor.scale, expected["scales"])
    if case in SYMMETRIC:
        assert tensor.format.zero == "midpoint"
    else:
        np.testing.assert_array_equal(tensor.zero, expected["zeros"])
    if "act_order" in case:
        assert tensor.input is not None and tensor.input.scale is None
        np.testing.assert_array_equal(tensor.input.perm, order)
    else:
        assert tensor.input is None


@pytest.mark.parametrize("case", CASES)
def test_weights_equal_those_of_a_plain_decoder(tmp_path: Path, case: str) -> None:
    tool, bits, _, _ = CASES[case]
    arrays, expected = packed(tool, case)
    (k,), n = arrays["g_idx"].shape, arrays["scales"].shape[1]
    codes = unpack_bits(arrays["qweight"], bits, k)
    weight = np.zeros((n, k), np.float32)
    for column, group in enumerate(arrays["g_idx"]):
        for row in range(n):
            scale = np.float32(arrays["scales"][group, row])
            weight[row, column] = (int(codes[column, row]) - int(expected["zeros"][row, group])) * (
                scale
            )

    tensor = load(read_linear(tmp_path, arrays, **settings(case)).tensors[NAME])

    np.testing.assert_array_equal(tensor.dequantize(), weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_that_autogptq_lost_are_read_as_it_reads_them(tmp_path: Path, bits: int) -> None:
    arrays, expected = packed("auto_gptq", f"v1_lost_zero_{bits}")

    weights = read_linear(tmp_path, arrays, **settings("v1_4", bits=bits))

    (note,) = weights.notes
    assert f"zero points of -1, which its format turns into {2**bits}" in note
    tensor = load(weights.tensors[NAME])
    assert (tensor.format.zero, tensor.format.bits) == ("offset", bits)
    np.testing.assert_array_equal(tensor.dequantize(), expected["weight"])


@pytest.mark.parametrize(
    ("case", "configured"), [("v1_symmetric", "gptq_v2"), ("v2_act_order", "gptq")]
)
def test_symmetric_zeros_tell_v1_from_v2(tmp_path: Path, case: str, configured: str) -> None:
    arrays, expected = packed(CASES[case][0], case)
    stored = CASES[case][3]

    weights = read_linear(tmp_path, arrays, **settings(case, checkpoint_format=configured))

    (note,) = weights.notes
    assert f"says checkpoint_format {configured}, its zero points are {stored}'s" in note
    tensor = load(weights.tensors[NAME])
    assert tensor.format.zero == "midpoint"
    np.testing.assert_array_equal(tensor.scale, expected["scales"])


def test_ambiguous_zeros_are_read_as_the_configuration_says(tmp_path: Path) -> None:
    arrays, expected = packed("auto_gptq", "v1_4")

    weights = read_linear(tmp_path, arrays, **settings("v1_4", checkpoint_format="gptq_v2"))

    assert weights.notes == ()
    np.testing.assert_array_equal(load(weights.tensors[NAME]).zero, expected["zeros"] - 1)


def test_a_file_without_g_idx_has_its_groups_in_order(tmp_path: Path) -> None:
    arrays, expected = packed("auto_gptq", "v1_4")
    stored = {key: array for key, array in arrays.items() if key != "g_idx"}
    # The tiny model's down_proj has 256 input features.
    stored["qweight"] = np.concatenate([arrays["qweight"]] * 3)[:32]
    stored["qzeros"], stored["scales"] = (
        np.concatenate([arrays[key]] * 3)[:8] for key in ("qzeros", "scales")
    )

    tensor = load(read_linear(tmp_path, stored, **settings("v1_4")).tensors[NAME])

    assert tensor.format.shape == (32, 256) and tensor.format.group == 32
    np.testing.assert_array_equal(tensor.unpacked_codes()[:, :96], expected["codes"])
    np.testing.assert_array_equal(tensor.unpacked_codes()[:, 192:], expected["codes"][:, :64])


def test_one_group_is_the_whole_row(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(32, 96)).astype(np.float32)
    arrays = pack_gptq(4, 96)(MODULE, weight)

    weights = read_arrays(tmp_path, arrays, **settings("v1_4", group_size=-1))

    assert weights.notes == ()
    tensor = load(weights.tensors[NAME])
    assert tensor.format.group == 96 and tensor.scale is not None
    assert np.abs(tensor.dequantize() - weight).max() <= tensor.scale.max() * 0.51


@pytest.mark.parametrize("word", [np.int8, np.int16, np.int64])
def test_words_may_be_of_any_size(tmp_path: Path, word: type[np.generic]) -> None:
    arrays, expected = packed("gptqmodel", "v2_4")
    arrays["qzeros"] = arrays["qzeros"].view(word)
    columns = np.ascontiguousarray(arrays["qweight"].T)
    arrays["qweight"] = np.ascontiguousarray(columns.view(word).T)

    tensor = load(read_linear(tmp_path, arrays, **settings("v2_4")).tensors[NAME])

    np.testing.assert_array_equal(tensor.unpacked_codes(), expected["codes"])
    np.testing.assert_array_equal(tensor.zero, expected["zeros"])


def test_overrides_of_single_modules_are_followed(tmp_path: Path) -> None:
    arrays, expected = packed("auto_gptq", "v1_8")
    up = "model.layers.0.mlp.up_proj"
    stored = {f"{MODULE}.{key}": array for key, array in arrays.items()}
    stored[f"{up}.weight"] = np.ones((4, 4), np.float16)
    dynamic = {
        "-:.*up_proj": {},
        "+:.*down_proj": {"bits": 8, "group_size": 32},
        ".*": {"bits": 2},
    }

    weights = read_arrays(tmp_path, stored, **settings("v1_4", group_size=128, dynamic=dynamic))

    assert weights.notes == ()
    np.testing.assert_array_equal(load(weights.tensors[NAME]).codes, expected["codes"])
    assert weights.tensors[f"{up}.weight"].format.kind == "dense"


def test_groups_of_several_sizes_become_dense(tmp_path: Path) -> None:
    arrays, expected = packed("gptqmodel", "v2_4")
    arrays["g_idx"] = np.repeat([1, 0, 2], [30, 33, 33]).astype(np.int32)

    weights = read_linear(tmp_path, arrays, **settings("v2_4", desc_act=True))

    assert "groups of several sizes; it becomes dense float32" in weights.notes[-1]
    zeros, scales = (expected[key][:, arrays["g_idx"]] for key in ("zeros", "scales"))
    np.testing.assert_array_equal(
        load(weights.tensors[NAME]).dequantize(),
        (expected["codes"].astype(np.float32) - zeros) * scales.astype(np.float32),
    )


@pytest.mark.parametrize(
    ("edit", "changes", "note"),
    [
        (lambda _: None, {"bits": 8}, "says 8 bits, its tensors 4"),
        (lambda _: None, {"group_size": 128}, "says group_size 128, its tensors 32"),
        (lambda a: a.pop("g_idx"), {"group_size": 100}, "says group_size 100, its tensors 32"),
        (lambda a: a.update(g_idx=a["g_idx"] * 0), {}, "its g_idx is all 0"),
        (lambda _: None, {"dynamic": {"-:.*": {}}}, "quantized, though config.json leaves it out"),
        (lambda _: None, {"sym": True}, None),
    ],
)
def test_tensors_win_over_the_configuration(
    tmp_path: Path, edit: Edit, changes: dict[str, Any], note: str | None
) -> None:
    arrays, expected = packed("auto_gptq", "v1_4")
    edit(arrays)
    name = "model.layers.0.other"
    stored = {f"{name}.{key}": array for key, array in arrays.items()}

    weights = read_arrays(tmp_path, stored, **settings("v1_4", **changes))

    assert [f"{name}: " in said and (note or "") in said for said in weights.notes] == (
        [] if note is None else [True]
    )
    tensor = weights.tensors[f"{name}.weight"].load()
    # Without g_idx, K follows from the bits, which are right here.
    np.testing.assert_array_equal(tensor.unpacked_codes(), expected["codes"])
    np.testing.assert_array_equal(tensor.zero, expected["zeros"])


def awq_shaped(arrays: Arrays) -> None:
    arrays.update(packed("awq", "gemm")[0])


def marlin_shaped(arrays: Arrays) -> None:
    arrays["qweight"] = np.zeros((6, 64), np.int32)


@pytest.mark.parametrize(
    ("edit", "changes", "message"),
    [
        (lambda a: a.pop("scales"), {}, "lacks the tensor .*down_proj.scales.*download"),
        (lambda a: a.pop("qzeros"), {}, "lacks the tensor .*down_proj.qzeros.*download"),
        (lambda a: a.update(lora_A=a["scales"]), {}, "does not account for.*down_proj.lora_A"),
        (lambda a: a.update(qweight=a["scales"]), {}, "qweight has type F16"),
        (lambda a: a.update(qzeros=a["qzeros"][:-1]), {}, r"qzeros has shape \[2, 4\].*\[3, 4\]"),
        (lambda a: a.update(qweight=a["qweight"][:-1]), {}, "11 rows of 32 bits for 96 input"),
        (lambda a: a.update(g_idx=a["g_idx"] + 1), {}, "names groups 1 to 3, but there are .* 3"),
        (awq_shaped, {}, "which is AWQ's layout, but config.json says quant_method 'gptq'"),
        (marlin_shaped, {}, "quantized with Marlin"),
        (lambda _: None, {"checkpoint_format": "marlin"}, "quantized with Marlin.*plain GPTQ"),
        (lambda _: None, {"is_marlin_format": True}, "quantized with Marlin"),
        (lambda _: None, {"checkpoint_format": "bitblas"}, "quantized with BitBLAS"),
        (lambda _: None, {"checkpoint_format": "gptq_p", "bits": 3}, "codes of 3 bits into planes"),
        (lambda _: None, {"checkpoint_format": "new"}, "'new', which cannot be read"),
        (lambda _: None, {"bits": "four"}, "bits is 'four'; expected an integer"),
        (lambda _: None, {"group_size": []}, "group_size is ..; expected an integer"),
        (lambda _: None, {"dynamic": {"-:(": {}}}, "pattern '.', which is no regular"),
        (lambda _: None, {"rotation": "hadamard"}, "rotation 'hadamard'"),
        (lambda a: a.clear(), {}, "no tensor that ends in .qweight"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, edit: Edit, changes: dict[str, Any], message: str
) -> None:
    arrays, _ = packed("auto_gptq", "v1_4")
    edit(arrays)

    with pytest.raises(CheckpointError, match=message):
        read_linear(tmp_path, arrays, **settings("v1_4", **changes))


def test_groups_that_no_size_gives_are_refused(tmp_path: Path) -> None:
    arrays, _ = packed("gptqmodel", "v2_partial")
    del arrays["g_idx"]
    stored = {f"model.layers.0.other.{key}": array for key, array in arrays.items()}

    with pytest.raises(CheckpointError, match=r"for 5 groups of its 576 .* says are of 64"):
        read_arrays(tmp_path, stored, **settings("v2_partial", group_size=64))


def test_a_quantized_embedding_is_refused(tmp_path: Path) -> None:
    arrays, _ = packed("auto_gptq", "v1_4")
    stored = {f"model.embed_tokens.{key}": array for key, array in arrays.items()}

    with pytest.raises(CheckpointError, match=r"quantizes the embedding model\.embed_tokens"):
        read_arrays(tmp_path, stored, **settings("v1_4"))


def test_a_linear_that_is_left_out_without_a_word_is_noted(tmp_path: Path) -> None:
    arrays, _ = packed("auto_gptq", "v1_4")
    stored = {f"{MODULE}.{key}": array for key, array in arrays.items()}
    stored["model.layers.0.mlp.up_proj.weight"] = np.ones((4, 4), np.float16)
    chosen = {"modules_in_block_to_quantize": [["mlp.down_proj"]]}

    weights = read_arrays(tmp_path, stored, **settings("v1_4"))

    assert weights.notes == (
        "model.layers.0.mlp.up_proj: not quantized, though config.json does not leave it out",
    )
    assert read_arrays(tmp_path, stored, **settings("v1_4", **chosen)).notes == ()
