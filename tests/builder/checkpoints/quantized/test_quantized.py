"""Quantized directories as a whole: found, opened, every tensor accounted for, others refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.builder.checkpoints.quantized.files import (
    Pack,
    pack_awq,
    pack_gptq,
    pack_int8,
    pack_nf4,
    packed,
    read_arrays,
    save_quantized_llama,
)
from tests.tiny_models import llama_tensors, save_llama

from slipstream.builder.checkpoints import open_checkpoint, quantized
from slipstream.builder.checkpoints.quantized import quantization_config
from slipstream.builder.checkpoints.quantized.packing import unpack_codes
from slipstream.builder.checkpoints.quantized.stored import Notes, Stored
from slipstream.builder.models import architectures
from slipstream.builder.models.module import place
from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields, Origin
from slipstream.weights.safetensors import read_header

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
# Of each format: how it packs, what config.json says, and the largest error in the range of a row.
FORMATS: dict[str, tuple[Pack, dict[str, Any], float]] = {
    "awq": (pack_awq(32), AWQ, 1 / 15),
    "gptq": (pack_gptq(4, 32), GPTQ, 1 / 15),
    "gptq_v2": (pack_gptq(4, 32, version=2), {**GPTQ, "checkpoint_format": "gptq_v2"}, 1 / 15),
    "gptq_act_order": (pack_gptq(4, 32, act_order=True), {**GPTQ, "desc_act": True}, 1 / 15),
    "gptq_partial": (pack_gptq(4, 96), {**GPTQ, "group_size": 96}, 1 / 15),
    "gptq_8": (pack_gptq(8, 64), {**GPTQ, "bits": 8, "group_size": 64}, 1 / 255),
    "gptq_3": (pack_gptq(3, 32), {**GPTQ, "bits": 3}, 1 / 7),
    "nf4": (pack_nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}, 0.16),
    "int8": (pack_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, 1 / 127),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_whole_model_opens_with_every_tensor(tmp_path: Path, name: str) -> None:
    pack, quantization, step = FORMATS[name]
    original = save_quantized_llama(tmp_path, pack, quantization)

    checkpoint = open_checkpoint(tmp_path)

    assert set(checkpoint.names()) == set(original)
    for weight, values in original.items():
        lazy = checkpoint.tensor(weight)
        assert (lazy.format.kind == "dense") == (not weight.endswith("_proj.weight"))
        tensor = lazy.load()
        assert tensor.format == lazy.format and tensor.format.shape == values.shape
        span = values.max() - min(values.min(), 0)
        assert 0 < np.abs(tensor.dequantize() - values).max() <= span * step * 0.6 + 1e-3


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update(extra=t["model.norm.weight"]), "holds 1 tensors .* as extra .F16"),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.scales"), "lacks .*layers.1.mlp.up_proj.sca"),
    ],
)
def test_every_tensor_is_accounted_for(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    save_quantized_llama(tmp_path, pack_gptq(4, 32), GPTQ)
    tensors = load_file(tmp_path / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")

    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_tensors_of_modules_without_a_weight_are_read_in_every_family(tmp_path: Path) -> None:
    bare = {place(m.name, 0) for a in architectures() for m in a.modules if m.bare}
    assert len(bare) > 3

    linear = pack_gptq(4, 32)("linear", np.eye(32, dtype=np.float32))
    others = dict.fromkeys(bare, np.ones(4, np.float32))
    weights = read_arrays(tmp_path, linear | others, **GPTQ)

    assert weights.tensors.keys() == {"linear.weight", *bare}


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    save_quantized_llama(tmp_path, pack_awq(32), AWQ)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(
        CheckpointError, match=r"is truncated: it has .* bytes and its tensors need"
    ):
        open_checkpoint(tmp_path)


def test_a_weight_is_read_when_it_is_loaded(tmp_path: Path) -> None:
    save_quantized_llama(tmp_path, pack_awq(32), AWQ)
    lazy = open_checkpoint(tmp_path).tensor("model.layers.0.mlp.up_proj.weight")
    (tmp_path / "model.safetensors").unlink()

    with pytest.raises(CheckpointError, match="moved or changed during the build"):
        lazy.load()


def test_frequencies_that_the_configuration_says_are_no_loss(tmp_path: Path) -> None:
    save_quantized_llama(tmp_path, pack_awq(32), AWQ)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")

    assert len(open_checkpoint(tmp_path).names()) == len(llama_tensors())


def test_notes_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_quantized_llama(tmp_path, pack_awq(32), {**AWQ, "group_size": 128})

    with caplog.at_level(logging.WARNING):
        open_checkpoint(tmp_path)

    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path.name}: 14 modules such as model.layers.0.mlp.down_proj: config.json says "
        "group_size 128, its tensors 32"
    ]


@pytest.mark.parametrize(
    ("file", "content", "pack"),
    [
        ("quantize_config.json", GPTQ, pack_gptq(4, 32)),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}, pack_awq(32)),
    ],
)
def test_the_quantization_may_stand_in_a_file_of_its_own(
    tmp_path: Path, file: str, content: dict[str, Any], pack: Pack
) -> None:
    original = save_quantized_llama(tmp_path, pack, None)
    (tmp_path / file).write_text(json.dumps(content))

    checkpoint = open_checkpoint(tmp_path)

    assert set(checkpoint.names()) == set(original)
    assert checkpoint.tensor("model.layers.0.mlp.up_proj.weight").format.bits == 4


def test_quantized_tensors_without_a_configuration_are_refused(tmp_path: Path) -> None:
    save_quantized_llama(tmp_path, pack_gptq(4, 32), None)

    with pytest.raises(
        CheckpointError, match=r"holds 28 quantized tensors .*quantize_config\.json"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("raw", "files", "expected"),
    [
        ({}, {}, None),
        ({"quantization_config": {"quant_method": "awq"}}, {}, {"quant_method": "awq"}),
        (
            {"compression_config": {"config_groups": {}}},
            {},
            {"quant_method": "compressed-tensors", "config_groups": {}},
        ),
        (
            {"compression_config": {"quantization_config": {"format": "x"}, "sparsity_config": {}}},
            {},
            {"quant_method": "compressed-tensors", "format": "x"},
        ),
        (
            {"quantization_config": {"load_in_4bit": True, "quant_method": None}},
            {},
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
        ),
        (
            {"quantization_config": {"quant_algo": "FP8"}},
            {},
            {"quant_method": "modelopt", "quant_algo": "FP8"},
        ),
        ({"quantization_config": {"x": 1}}, {}, {"quant_method": "", "x": 1}),
        (
            {},
            {"hf_quant_config.json": {"producer": {"name": "modelopt"}, "quantization": {}}},
            {"quant_method": "modelopt", "producer": {"name": "modelopt"}, "quantization": {}},
        ),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
            {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}}},
            {
                "quant_method": "modelopt",
                "quant_algo": "FP8",
                "quantization": {"quant_algo": "NVFP4"},
            },
        ),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            {"quantize_config.json": {"bits": 8}},
            {"quant_method": "gptq"},
        ),
    ],
)
def test_where_a_quantization_is_described(
    tmp_path: Path,
    raw: dict[str, Any],
    files: dict[str, dict[str, Any]],
    expected: dict[str, Any] | None,
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))

    found = quantization_config(tmp_path, Fields(raw, Origin("config.json")))

    assert (None if found is None else found.values) == expected


def test_a_quantization_that_is_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is 'awq'; expected an object: download config"):
        origin = Origin("config.json", "download config.json again")
        quantization_config(tmp_path, Fields({"quantization_config": "awq"}, origin))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("marlin", "quantized with Marlin: .*pass the model's plain GPTQ or AWQ"),
        ("bitblas", "quantized with BitBLAS: .*pass the model's plain GPTQ"),
        ("exl2", "ExLlamaV2 .*pass the unquantized checkpoint"),
        ("exl3", "ExLlamaV3 .*pass the unquantized checkpoint"),
        ("AQLM", "AQLM, vectors of a codebook.*pass the unquantized checkpoint"),
        ("hqq", "HQQ.*pass the unquantized checkpoint"),
        ("quip", "QuIP#.*pass the unquantized checkpoint"),
        ("vptq", "VPTQ.*pass the unquantized checkpoint"),
        ("spqr", "SpQR.*pass the unquantized checkpoint"),
        ("eetq", "EETQ.*pass the unquantized checkpoint"),
        ("torchao", "torchao.*pass the unquantized checkpoint"),
        ("quark", "AMD Quark: pass the unquantized checkpoint"),
        ("auto-round", "AutoRound.*--format auto_gptq"),
        (
            "q9",
            "has quant_method 'q9', which cannot be read; awq, .*, modelopt.* can. Pass the unq",
        ),
        (None, "names no quant_method"),
    ],
)
def test_other_formats_are_refused_by_name(
    tmp_path: Path, method: str | None, message: str
) -> None:
    save_llama(tmp_path, llama_tensors(), quantization_config={"quant_method": method, "bits": 4})

    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_file_that_is_not_of_its_format_is_said_to_be(tmp_path: Path) -> None:
    save_quantized_llama(tmp_path, pack_awq(32), GPTQ)

    with pytest.raises(CheckpointError, match=r"which is AWQ's layout, but config\.json says"):
        open_checkpoint(tmp_path)


def test_a_description_without_quantized_tensors_is_refused(tmp_path: Path) -> None:
    for quantization in (AWQ, GPTQ, {"quant_method": "bitsandbytes"}):
        save_llama(tmp_path, llama_tensors(), quantization_config=quantization)
        with pytest.raises(CheckpointError, match=r"no tensor that ends in|were not saved quantiz"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("word", [np.uint8, np.int32, np.int64])
def test_codes_of_any_width_are_unpacked(bits: int, word: type[np.generic]) -> None:
    words = np.random.default_rng(bits).integers(0, 256, (3, 24), np.uint8).view(word)
    count = 24 * 8 // bits
    expected = [
        [
            int.from_bytes(row.tobytes(), "little") >> (i * bits) & (2**bits - 1)
            for i in range(count)
        ]
        for row in words
    ]

    np.testing.assert_array_equal(unpack_codes(words, bits), expected)


def test_stored_lists_what_it_has(tmp_path: Path) -> None:
    arrays, _ = packed("auto_gptq", "v1_4")
    save_file(arrays | {"a.bias": arrays["scales"]}, tmp_path / "x.safetensors")
    stored = Stored(tmp_path, read_header(tmp_path / "x.safetensors"))

    assert stored.modules("bias") == ("a",) and "qweight" in stored and "x" not in stored
    assert set(stored.names()) == {*arrays, "a.bias"}
    assert stored.take_optional("x") is None and stored.peek("x") is None
    assert set(stored.take_dense()) == {"a.bias"}
    with pytest.raises(CheckpointError, match=r"holds 4 tensors .*such as g_idx .I32 .96"):
        stored.finish()


def test_a_scalar_is_read(tmp_path: Path) -> None:
    save_file({"x": np.array(7, np.int64)}, tmp_path / "x.safetensors")

    value = read_header(tmp_path / "x.safetensors")["x"].map()

    assert value.shape == () and value == 7


def test_notes_are_joined() -> None:
    notes = Notes()
    for module in ("a", "b"):
        notes.add("is odd", module)
    notes.add("is even", "c")

    assert notes.sentences() == ("2 modules such as a: is odd", "c: is even")


def test_every_named_reader_exists() -> None:
    for module in set(quantized._READERS.values()):
        assert callable(import_module(f"{quantized.__name__}.{module}").read)
