from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tests.tiny_models import llama_tensors, save_llama

from slipstream.builder.checkpoints import Checkpoint, open_checkpoint
from slipstream.builder.checkpoints.huggingface.writer import DirectoryWriter, kv_arrays
from slipstream.builder.checkpoints.names import linears
from slipstream.builder.checkpoints.quantized import create_layout
from slipstream.builder.checkpoints.quantized.packing import pack_words
from slipstream.builder.options import OutputFormat
from slipstream.errors import BuildError
from slipstream.weights.safetensors import (
    write_arrays,
)
from slipstream.weights.tensor import (
    InputTransform,
    QuantTensor,
    WeightFormat,
    numpy_dtype,
    pack_nibbles,
)

HIDDEN, INNER = 96, 160  # groups of 64 do not divide the second
INT4_ASYMMETRIC = {"bits": 4, "group": 32, "zero": "zero"}
INT4 = {"bits": 4, "group": 32}
INT8 = {"bits": 8, "group": 32}
W8A8 = {"bits": 8, "group": 0, "dtype": "float32", "activation": "token"}
FP8 = {**W8A8, "kind": "float8_e4m3"}
FP8_STATIC = {**FP8, "activation": "static"}
FP8_BLOCK = {**FP8, "activation": "group", "group": 128, "rows": 128}
NVFP4 = {"kind": "float4_e2m1", "bits": 4, "group": 16, "dtype": "float8_e4m3fn"}
Changes = Mapping[str, Any]


def make(name: str, shape: tuple[int, int], changes: Changes, seed: int = 0) -> QuantTensor:
    """Random codes and scales of a format; group 0 is a whole row."""
    rng = np.random.default_rng((seed, *map(ord, name)))
    n, k = shape
    group = changes.get("group") or k
    form = WeightFormat(shape, **{"kind": "int", "dtype": "float16", **changes, "group": group})
    grid = (-(-n // form.rows), -(-k // group))
    scale = rng.uniform(0.5, 2, grid).astype(getattr(ml_dtypes, form.dtype, form.dtype))
    codes: NDArray[Any] = rng.integers(0, 2**form.bits, shape, np.uint8)
    if form.kind == "float8_e4m3":
        codes = rng.normal(0, 9, shape).astype(ml_dtypes.float8_e4m3fn)
        if form.activation == "static":
            scale[:] = scale[0, 0]
    zero = rng.integers(0, 2**form.bits, grid, np.uint8) if form.zero == "zero" else None
    packed = pack_nibbles(codes) if form.bits == 4 else codes
    static = np.array([0.75], np.float32) if form.activation == "static" else None
    scale2 = np.array([0.25], np.float32) if form.kind == "float4_e2m1" else None
    return QuantTensor(name, form, packed, scale, zero, input_scale=static, scale2=scale2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    shape = {"hidden_size": HIDDEN, "intermediate_size": INNER}
    directory = save_llama(
        tmp_path_factory.mktemp("writers") / "source", {}, **shape, dtype="bfloat16"
    )
    arrays = llama_tensors(**shape).items()
    write_arrays(
        directory / "model.safetensors",
        {name: values.astype(ml_dtypes.bfloat16) for name, values in arrays},
    )
    return open_checkpoint(directory)


def quantized(
    source: Checkpoint, changes: Changes, only: Callable[[str], bool] = lambda name: True
) -> dict[str, QuantTensor]:
    shapes = {name: source.tensor(name).format.shape for name in source.names()}
    names = [f"{module}.weight" for module in linears(shapes)]
    return {
        name: make(name, (shapes[name][0], shapes[name][1]), changes)
        for name in names
        if only(name)
    }


def write(
    source: Checkpoint,
    weights: Mapping[str, QuantTensor],
    directory: Path,
    layout: OutputFormat = "compressed-tensors",
    kv: tuple[float, float] | None = None,
    float8_inputs: tuple[str, ...] = (),
) -> Checkpoint:
    directory.mkdir()
    formats = {name: (tensor.format, tensor.input) for name, tensor in weights.items()}
    writer = DirectoryWriter(directory, create_layout(layout, formats, float8_inputs), 3)
    outer = [name for name in source.names() if not name.startswith("model.layers.")]
    writer.stream(0, [source.tensor(name) for name in outer])
    for layer in range(2):
        names = [name for name in source.names() if name.startswith(f"model.layers.{layer}.")]
        tensors = [weights.get(name) or source.tensor(name).load() for name in names]
        writer.write(layer + 1, tensors, kv_arrays(kv, layer) if kv else None)
    writer.describe(source, kv_scales=kv is not None)
    source.write_tokenizer(directory)
    return open_checkpoint(directory)


def assert_same(found: QuantTensor, expected: QuantTensor) -> None:
    assert found.format == expected.format
    for name in ("codes", "scale", "zero", "input_scale", "scale2"):
        mine, other = getattr(found, name), getattr(expected, name)
        assert (mine is None) == (other is None), name
        if mine is not None:
            assert mine.dtype == other.dtype and np.array_equal(
                mine.view(np.uint8), np.ascontiguousarray(other).view(np.uint8)
            ), name


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        *(("compressed-tensors", c) for c in (INT4_ASYMMETRIC, INT4, INT8, W8A8)),
        *(("compressed-tensors", c) for c in (FP8, FP8_STATIC, FP8_BLOCK, NVFP4)),
        ("compressed-tensors", {"bits": 4, "group": 0}),
        ("compressed-tensors", {"bits": 8, "group": 0, "zero": "zero"}),
        *(("gptq", c) for c in (INT4_ASYMMETRIC, INT4, INT8, {"bits": 4, "group": 0})),
        ("gptq", {"bits": 4, "group": 64}),
        ("gptq", {"bits": 8, "group": 64, "zero": "zero"}),
        *(("awq", c) for c in (INT4_ASYMMETRIC, INT4, {"bits": 4, "group": 0, "zero": "zero"})),
    ],
)
def test_what_is_written_is_read_back_bit_for_bit(
    source: Checkpoint, tmp_path: Path, layout: OutputFormat, changes: Changes
) -> None:
    weights = quantized(source, changes)
    back = write(source, weights, tmp_path / "out", layout)
    assert back.names() and set(back.names()) == set(source.names())
    assert back.config == source.config
    for name in source.names():
        tensor = back.tensor(name).load()
        assert_same(tensor, weights.get(name) or source.tensor(name).load())


def test_the_container_is_the_one_of_safetensors(source: Checkpoint, tmp_path: Path) -> None:
    write(source, quantized(source, INT4_ASYMMETRIC), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    size = 0
    for shard in sorted(set(index["weight_map"].values())):
        for name, array in load_file(tmp_path / "out" / shard).items():
            assert index["weight_map"].pop(name) == shard
            size += array.nbytes
    assert index == {"metadata": {"total_size": size}, "weight_map": {}}


def test_gptq_agrees_with_a_packer_that_goes_bit_by_bit(source: Checkpoint, tmp_path: Path) -> None:
    weights = quantized(source, INT4)
    write(source, weights, tmp_path / "out", "gptq")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == config["checkpoint_format"] == "gptq"
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, True)
    stored = load_file(tmp_path / "out" / "model-00002-of-00003.safetensors")
    module = "model.layers.0.mlp.down_proj"
    codes = weights[f"{module}.weight"].unpacked_codes()
    n, k = codes.shape
    words = stored[f"{module}.qweight"].view(np.uint32)
    unpacked = [[int(words[c // 8, r]) >> 4 * (c % 8) & 15 for c in range(k)] for r in range(n)]
    assert np.array_equal(unpacked, codes)
    assert np.all(stored[f"{module}.qzeros"].view(np.uint32) == 0x77777777)
    assert stored[f"{module}.g_idx"].tolist() == [c // 32 for c in range(k)]
    assert np.array_equal(stored[f"{module}.scales"], weights[f"{module}.weight"].scale.T)  # type: ignore[union-attr]


def test_awq_agrees_with_a_packer_that_goes_bit_by_bit(source: Checkpoint, tmp_path: Path) -> None:
    weights = quantized(source, INT4_ASYMMETRIC)
    write(source, weights, tmp_path / "out", "awq")
    stored = load_file(tmp_path / "out" / "model-00002-of-00003.safetensors")
    module = "model.layers.0.mlp.up_proj"
    tensor = weights[f"{module}.weight"]
    assert tensor.zero is not None
    for name, expected in (("qweight", tensor.unpacked_codes()), ("qzeros", tensor.zero)):
        words = stored[f"{module}.{name}"].view(np.uint32)
        unpacked = np.zeros_like(expected)
        for column in range(expected.shape[1]):
            for word in range(words.shape[1]):
                for nibble, offset in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                    code = int(words[column, word]) >> 4 * nibble & 15
                    unpacked[word * 8 + offset, column] = code
        assert np.array_equal(unpacked, expected), name


def test_act_order_goes_through_gptq(source: Checkpoint, tmp_path: Path) -> None:
    def ordered(tensor: QuantTensor) -> QuantTensor:
        group_of = np.arange(tensor.format.shape[1]) // tensor.format.group
        np.random.default_rng(1).shuffle(group_of)
        perm = np.argsort(group_of, kind="stable").astype(np.int32)
        return replace(tensor, input=InputTransform(perm=perm))

    plain = quantized(source, INT4_ASYMMETRIC)
    weights = {name: ordered(tensor) for name, tensor in plain.items()}
    back = write(source, weights, tmp_path / "out", "gptq")
    for name, tensor in weights.items():
        found = back.tensor(name).load()
        assert_same(found, tensor)
        assert np.array_equal(found.dequantize(), tensor.dequantize())
    with pytest.raises(BuildError, match=r"layers\.0\..*act-order.*use another --format"):
        write(source, weights, tmp_path / "no")


def test_mixed_precision_is_read_back(source: Checkpoint, tmp_path: Path) -> None:
    weights = quantized(source, INT4_ASYMMETRIC, lambda name: "up_proj" in name)
    weights |= quantized(source, INT8, lambda name: "down_proj" in name)
    weights |= quantized(source, FP8, lambda name: "o_proj" in name)
    back = write(source, weights, tmp_path / "out")
    for name in source.names():
        assert_same(back.tensor(name).load(), weights.get(name) or source.tensor(name).load())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 3
    assert "model.layers.0.self_attn.q_proj" in config["ignore"]
    assert "model.layers.0.mlp.up_proj" not in config["ignore"]


def test_mixed_bits_go_through_gptq_by_dynamic(source: Checkpoint, tmp_path: Path) -> None:
    weights = quantized(source, INT4, lambda name: "mlp" in name)
    weights |= quantized(source, {**INT8, "zero": "zero"}, lambda name: "o_proj" in name)
    back = write(source, weights, tmp_path / "out", "gptq")
    for name in source.names():
        assert_same(back.tensor(name).load(), weights.get(name) or source.tensor(name).load())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "gptq_v2" and config["bits"] == 4
    override = config["dynamic"][r"+:^model\.layers\.0\.self_attn\.o_proj$"]
    assert override == {"bits": 8, "group_size": 32, "sym": False, "desc_act": False}


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq", "awq"])
def test_vllm_wants_linears_that_it_multiplies_as_one_to_be_alike(layout: OutputFormat) -> None:
    up, gate, down = (f"model.layers.0.mlp.{x}_proj" for x in ("up", "gate", "down"))
    weights = [make(f"{name}.weight", (64, 96), INT4) for name in (up, gate, down)]
    made = create_layout(layout, {w.name: (w.format, None) for w in weights})
    same = {w.name.removesuffix(".weight"): made.encode(w).settings for w in weights}
    assert made.loaders(same)["vLLM"] == made.loaders({down: same[down]})["vLLM"] == ""
    assert made.loaders({down: same[down], up: same[up]})["vLLM"].startswith(f"{up} and gate_proj")
    if layout == "awq":
        return
    wide = made.encode(make(f"{up}.weight", (64, 96), INT8)).settings
    assert made.loaders({**same, down: wide})["vLLM"] == "", "it is multiplied by itself"
    assert up in made.loaders({**same, up: wide})["vLLM"]


@pytest.mark.parametrize("layout", ["compressed-tensors", "awq"])
def test_a_shorter_last_group_becomes_finer_groups(
    source: Checkpoint, tmp_path: Path, layout: OutputFormat
) -> None:
    weights = quantized(source, {"bits": 4, "group": 64, "zero": "zero"})
    back = write(source, weights, tmp_path / "out", layout)
    for name, tensor in weights.items():
        found = back.tensor(name).load()
        assert found.format.group == 32
        assert np.array_equal(found.dequantize(), tensor.dequantize())


def test_kv_scales_are_read_back(source: Checkpoint, tmp_path: Path) -> None:
    back = write(source, quantized(source, INT4), tmp_path / "out", kv=(0.5, 0.25))
    assert back.kv_scales is not None
    assert (back.kv_scales.k, back.kv_scales.v) == ((0.5, 0.5), (0.25, 0.25))
    assert set(back.names()) == set(source.names())


@pytest.mark.parametrize(
    ("layout", "changes", "reason"),
    [
        ("gptq", FP8, "GPTQ holds integers"),
        ("gptq", W8A8, "GPTQ quantizes weights alone"),
        ("gptq", {**INT4, "dtype": "float32"}, "scales are float32 and do not fit float16"),
        ("awq", INT8, "AWQ holds 4-bit integers"),
        ("awq", NVFP4, "AWQ holds 4-bit integers"),
        ("compressed-tensors", {**NVFP4, "group": 32}, "not those of NVFP4"),
        ("compressed-tensors", {**INT4, "kind": "codebook"}, "codebook"),
        ("compressed-tensors", {**INT4, "zero": "offset"}, "float offsets"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused_by_name(
    source: Checkpoint, tmp_path: Path, layout: OutputFormat, changes: Changes, reason: str
) -> None:
    with pytest.raises(BuildError, match=rf"layers\.0\.\S+\.weight cannot be stored.*{reason}"):
        write(source, quantized(source, changes), tmp_path / "out", layout)


def test_version_1_of_gptq_has_no_zero_of_0() -> None:
    from slipstream.builder.checkpoints.quantized.gptq.writer import GPTQ

    tensor = make("a.weight", (8, 32), {"bits": 4, "group": 32, "zero": "zero"})
    with pytest.raises(BuildError, match=r"a\.weight.*no zero points of 0"):
        GPTQ(1).encode(replace(tensor, zero=np.zeros((8, 1), np.uint8)))
    encoded = GPTQ(1).encode(replace(tensor, zero=np.full((8, 1), 3, np.uint8)))
    assert encoded.arrays["qzeros"].view(np.uint32).tolist() == [[0x22222222]]


def test_words_are_filled_from_their_lowest_bits() -> None:
    packed = pack_words(np.arange(1, 11, dtype=np.uint8)[None], 4)
    assert packed.view(np.uint32).tolist() == [[0x87654321, 0xA9]]


@pytest.mark.parametrize("changes", [INT4_ASYMMETRIC, INT4, INT8, W8A8, FP8, FP8_STATIC, FP8_BLOCK])
def test_the_compressed_tensors_package_decodes_the_same_weights(
    source: Checkpoint, tmp_path: Path, changes: Changes
) -> None:
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    weights = quantized(source, changes)
    write(source, weights, tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(raw)
    (scheme,) = config.config_groups.values()
    decoder = BaseCompressor.get_value_from_registry(config.format)
    from safetensors.torch import load_file as load_torch

    stored = load_torch(tmp_path / "out" / "model-00002-of-00003.safetensors")
    for name, tensor in weights.items():
        prefix = name.removesuffix("weight")
        state = {
            key[len(prefix) :]: value for key, value in stored.items() if key.startswith(prefix)
        }
        if not state:
            continue
        state["weight_scale"] = state["weight_scale"].float()
        decoded = decoder.decompress(state, scheme)["weight"].to(torch.float32).numpy()
        assert np.array_equal(decoded, tensor.dequantize()), name


@pytest.mark.filterwarnings("ignore:You passed .quantization_config.")
@pytest.mark.parametrize("changes", [INT4_ASYMMETRIC, INT4, INT8, W8A8, FP8, NVFP4])
def test_transformers_loads_it_with_the_same_logits(
    source: Checkpoint, tmp_path: Path, changes: Changes
) -> None:
    pytest.importorskip("compressed_tensors")
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    weights = {
        name: replace(
            tensor,
            scale=(np.asarray(tensor.scale, np.float32) / 64).astype(
                numpy_dtype(tensor.format.dtype)
            ),
        )
        for name, tensor in quantized(source, changes).items()
    }
    write(source, weights, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    expected = AutoModelForCausalLM.from_pretrained(source.path)
    state = {name: torch.from_numpy(tensor.dequantize()) for name, tensor in weights.items()}
    expected.load_state_dict(state, strict=False)
    tokens = torch.arange(1, 40)[None]
    with torch.inference_mode():
        found, wanted = loaded(tokens).logits.float(), expected(tokens).logits.float()
    assert loaded.dtype == torch.bfloat16
    assert (found - wanted).abs().max() <= 0.02 * wanted.abs().max()
