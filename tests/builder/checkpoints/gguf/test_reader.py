"""GGUF files: the numbers of the reference decoder, Hugging Face's names and order of rows."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slipstream.builder.checkpoints import open_checkpoint
from slipstream.builder.checkpoints.gguf import blocks as gguf_blocks
from slipstream.builder.checkpoints.gguf.blocks import decode
from slipstream.builder.models.config import RopeScaling
from slipstream.errors import CheckpointError

HIDDEN, HEADS, KV_HEADS, FEED_FORWARD, VOCABULARY = 64, 4, 2, 96, 40


@dataclass
class TinyModel:
    """What goes into a GGUF file; tensors are by GGUF name, in the order of their rows."""

    architecture: str = "llama"
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, NDArray[Any]] = field(default_factory=dict)
    kinds: dict[str, Type] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in self.metadata.items():
            common = key.startswith(("tokenizer.", "split."))
            add(writer, key if common else f"{self.architecture}.{key}", value)
        for name, values in self.tensors.items():
            kind = self.kinds.get(name, Type.F32)
            stored = values if kind not in QUANTIZABLE else gguf.quants.quantize(values, kind)
            writer.add_tensor(name, np.ascontiguousarray(stored), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


QUANTIZABLE = (Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_1, Type.Q8_0)


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:  # noqa: ANN401
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)


def tiny(architecture: str = "llama", *, tied: bool = True) -> TinyModel:
    """A random model of one layer."""
    rng = np.random.default_rng(0)
    head_dim = HIDDEN // HEADS
    shapes = {
        "token_embd.weight": (VOCABULARY, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (KV_HEADS * head_dim, HIDDEN),
        "blk.0.attn_v.weight": (KV_HEADS * head_dim, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_up.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FEED_FORWARD),
    }
    if not tied:
        shapes["output.weight"] = (VOCABULARY, HIDDEN)
    if architecture == "qwen2":
        shapes |= {f"blk.0.attn_{x}.bias": shapes[f"blk.0.attn_{x}.weight"][:1] for x in "qkv"}
    if architecture == "qwen3":
        shapes |= {f"blk.0.attn_{x}_norm.weight": (head_dim,) for x in "qk"}
    metadata = {
        "block_count": 1,
        "context_length": 256,
        "embedding_length": HIDDEN,
        "feed_forward_length": FEED_FORWARD,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 5000.0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    tensors = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    return TinyModel(architecture, metadata, tensors)


def random_blocks(kind: Type, rows: int, columns: int) -> NDArray[np.uint8]:
    """Random blocks of any type, their float16 scales (wherever they are) finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(3).integers(0, 256, (rows, columns // block * size), np.uint8)
    return np.where(data & 0x7C == 0x7C, data & 0xBF, data)


@pytest.mark.parametrize(
    ("kind", "bits", "group", "zero", "dtype"),
    [
        (Type.Q4_0, 4, 32, "midpoint", np.float16),
        (Type.Q4_1, 4, 32, "offset", np.float16),
        (Type.Q5_0, 8, 32, "midpoint", np.float16),
        (Type.Q5_1, 8, 32, "offset", np.float16),
        (Type.Q8_0, 8, 32, "midpoint", np.float16),
        (Type.Q2_K, 4, 16, "offset", np.float32),
        (Type.Q3_K, 4, 16, "midpoint", np.float32),
        (Type.Q4_K, 4, 32, "offset", np.float32),
        (Type.Q5_K, 8, 32, "offset", np.float32),
        (Type.Q6_K, 8, 16, "midpoint", np.float32),
        (Type.IQ4_NL, 8, 32, "midpoint", np.float16),
        (Type.IQ4_XS, 8, 32, "midpoint", np.float32),
        (Type.MXFP4, 8, 32, "midpoint", np.float32),
    ],
)
@pytest.mark.parametrize("chunk", [1 << 22, 700])
def test_blocks_stay_quantized_and_decode_like_the_reference(
    kind: Type,
    bits: int,
    group: int,
    zero: str,
    dtype: type[np.generic],
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gguf_blocks, "_CHUNK", chunk)
    data = random_blocks(kind, 47, 768)

    tensor = decode("w", kind, (47, 768), data.reshape(-1))

    form = tensor.format
    assert (form.kind, form.bits, form.group, form.zero) == ("int", bits, group, zero)
    assert form == gguf_blocks.weight_format("w", kind, (47, 768))
    assert tensor.scale is not None and tensor.scale.shape == (47, 768 // group)
    assert tensor.scale.dtype == np.dtype(form.dtype) == dtype
    assert tensor.codes.shape == (47, 768 * bits // 8)
    np.testing.assert_array_equal(tensor.dequantize(), gguf.quants.dequantize(data, kind))


@pytest.mark.parametrize("kind", [Type.TQ1_0, Type.IQ2_XXS, Type.IQ3_S, Type.IQ1_M])
def test_other_blocks_become_float32_of_the_same_numbers(kind: Type) -> None:
    data = random_blocks(kind, 4, 512)

    tensor = decode("w", kind, (4, 512), data.reshape(-1))

    assert (tensor.format.kind, tensor.format.dtype) == ("dense", "float32")
    np.testing.assert_array_equal(tensor.dequantize(), gguf.quants.dequantize(data, kind))


@pytest.mark.parametrize("kind", QUANTIZABLE)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_weights_are_those_of_the_reference_decoder(
    tmp_path: Path, architecture: str, kind: Type
) -> None:
    model = tiny(architecture)
    model.kinds = {name: kind for name, values in model.tensors.items() if values.ndim == 2}
    checkpoint = open_checkpoint(model.write(tmp_path / "m.gguf"))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}

    assert len(checkpoint.names()) == len(stored)
    for ours, theirs, heads in NAMES:
        if theirs not in stored:
            continue
        lazy = checkpoint.tensor(ours)
        loaded = lazy.load()
        expected = stored[theirs]
        if architecture == "llama" and heads:
            expected = huggingface_rows(expected, heads)
        assert loaded.format == lazy.format
        assert loaded.name == ours
        np.testing.assert_array_equal(loaded.dequantize(), expected)


NAMES = [
    ("model.embed_tokens.weight", "token_embd.weight", 0),
    ("model.norm.weight", "output_norm.weight", 0),
    ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight", 0),
    ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight", 0),
    ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight", HEADS),
    ("model.layers.0.self_attn.k_proj.weight", "blk.0.attn_k.weight", KV_HEADS),
    ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight", 0),
    ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight", 0),
    ("model.layers.0.mlp.gate_proj.weight", "blk.0.ffn_gate.weight", 0),
    ("model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight", 0),
    ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight", 0),
    ("model.layers.0.self_attn.q_proj.bias", "blk.0.attn_q.bias", HEADS),
    ("model.layers.0.self_attn.k_proj.bias", "blk.0.attn_k.bias", KV_HEADS),
    ("model.layers.0.self_attn.v_proj.bias", "blk.0.attn_v.bias", 0),
    ("model.layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight", 0),
    ("model.layers.0.self_attn.k_norm.weight", "blk.0.attn_k_norm.weight", 0),
]


def huggingface_rows(stored: NDArray[Any], heads: int) -> NDArray[Any]:
    """Row 2i of a stored head is its row i, row 2i+1 its row i + D/2."""
    dim = len(stored) // heads
    rows = np.empty_like(stored)
    for head in range(heads):
        for i in range(dim // 2):
            rows[head * dim + i] = stored[head * dim + 2 * i]
            rows[head * dim + i + dim // 2] = stored[head * dim + 2 * i + 1]
    return rows


def test_biases_of_a_llama_are_found_and_reordered(tmp_path: Path) -> None:
    model = tiny()
    bias = np.arange(HIDDEN, dtype=np.float32)
    model.tensors["blk.0.attn_q.bias"] = bias

    checkpoint = open_checkpoint(model.write(tmp_path / "m.gguf"))

    found = checkpoint.tensor("model.layers.0.self_attn.q_proj.bias").load().dequantize()
    np.testing.assert_array_equal(found, huggingface_rows(bias, HEADS))
    config = checkpoint.config
    assert (config.attention_bias, config.o_bias, config.mlp_bias) == (True, False, False)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_the_same_model(tmp_path: Path, architecture: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny(architecture, tied=tied)
    head_dim = HIDDEN // HEADS
    model.metadata |= {"rope.dimension_count": head_dim, "attention.key_length": head_dim}
    if architecture == "qwen3":
        # transformers does not read this architecture's head size and takes its default of 128.
        model = with_head_dim(model, 128)
    model.metadata["tokenizer.ggml.tokens"] = [f"t{i}" for i in range(VOCABULARY)]
    model.kinds["blk.0.attn_q.weight"] = Type.Q4_1
    model.write(tmp_path / "m.gguf")

    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")

    state = theirs.state_dict()
    assert set(state) - set(checkpoint.names()) == ({"lm_head.weight"} if tied else set())
    for name in checkpoint.names():
        expected = state[name].float().numpy()
        np.testing.assert_array_equal(checkpoint.tensor(name).load().dequantize(), expected)
    config = checkpoint.config
    assert config.tie_word_embeddings == tied == theirs.config.tie_word_embeddings
    assert config.head_dim == theirs.model.layers[0].self_attn.head_dim
    assert config.rope_theta == theirs.config.rope_parameters["rope_theta"]
    assert config.eos_token_ids == (theirs.config.eos_token_id,)


def with_head_dim(model: TinyModel, head_dim: int) -> TinyModel:
    """The same model with other sizes of q, k, v and o."""
    rng = np.random.default_rng(1)
    sizes = {"q": HEADS * head_dim, "k": KV_HEADS * head_dim, "v": KV_HEADS * head_dim}
    new: dict[str, tuple[int, ...]] = {}
    new |= {f"blk.0.attn_{x}.weight": (size, HIDDEN) for x, size in sizes.items()}
    new |= {f"blk.0.attn_{x}_norm.weight": (head_dim,) for x in "qk"}
    new |= {"blk.0.attn_output.weight": (HIDDEN, HEADS * head_dim)}
    model.tensors |= {n: rng.standard_normal(s).astype(np.float32) for n, s in new.items()}
    model.metadata |= {"rope.dimension_count": head_dim, "attention.key_length": head_dim}
    return model


def config_of(tmp_path: Path, model: TinyModel) -> Any:  # noqa: ANN401
    return open_checkpoint(model.write(tmp_path / "m.gguf")).config


def test_hyper_parameters_come_from_the_metadata(tmp_path: Path) -> None:
    model = tiny()
    model.metadata |= {"rope.dimension_count": 8, "tokenizer.ggml.eot_token_id": 7}

    config = config_of(tmp_path, model)

    assert (config.architecture, config.vocab_size) == ("llama", VOCABULARY)
    assert (config.hidden_size, config.intermediate_size) == (HIDDEN, FEED_FORWARD)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (1, HEADS, KV_HEADS)
    assert (config.head_dim, config.rotary_dim) == (16, 8)
    assert (config.max_position_embeddings, config.rope_theta) == (256, 5000.0)
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 7))
    assert config.rope_scaling == RopeScaling()


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"type": "none"}, RopeScaling()),
        ({"type": "linear", "factor": 2.0}, RopeScaling("linear", 2.0)),
        ({"type": "yarn", "factor": 4.0}, RopeScaling("yarn", 4.0, 256)),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64, "yarn_beta_fast": 8.0},
            RopeScaling("yarn", 4.0, 64, beta_fast=8.0),
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, metadata: dict[str, Any], expected: RopeScaling) -> None:
    model = tiny()
    model.metadata |= {f"rope.scaling.{key}": value for key, value in metadata.items()}

    assert config_of(tmp_path, model).rope_scaling == expected


def llama3_factors(factor: float, theta: float, dim: int) -> NDArray[np.float32]:
    """The divisors of Llama 3.1's frequencies, one by one as its paper's code gives them."""
    result = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (i / dim)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        if wavelength < 8192 / 4:
            result.append(1.0)
        elif wavelength > 8192:
            result.append(factor)
        else:
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_frequency_factors_of_llama_3_are_recognised(tmp_path: Path, factor: float) -> None:
    model = tiny()
    model.metadata["rope.freq_base"] = 500000.0
    factors = llama3_factors(factor, 500000.0, 16)
    model.tensors["rope_freqs.weight"] = factors

    expected = RopeScaling("llama3", factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert config_of(tmp_path, model).rope_scaling == expected
    assert "rope_freqs.weight" not in open_checkpoint(tmp_path / "m.gguf").names()

    model.tensors["rope_freqs.weight"] = factors[::-1]
    with pytest.raises(CheckpointError, match="not the frequency scaling of a Llama 3 model"):
        config_of(tmp_path, model)


def test_a_llama_with_a_window_is_a_mistral(tmp_path: Path) -> None:
    model = tiny()
    model.metadata["attention.sliding_window"] = 128

    config = config_of(tmp_path, model)

    assert (config.architecture, config.window(0)) == ("mistral", 128)


def test_types_that_become_float32_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny()
    model.kinds = {"blk.0.ffn_up.weight": Type.TQ2_0, "blk.0.ffn_gate.weight": Type.Q8_0}
    model.tensors["blk.0.ffn_up.weight"] = random_blocks(Type.TQ2_0, FEED_FORWARD, 256)

    with caplog.at_level(logging.INFO, "slipstream"):
        open_checkpoint(model.write(tmp_path / "m.gguf"))

    assert caplog.messages == ["m.gguf: 1 tensors of type TQ2_0 become float32"]


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tiny().write(tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"

    for size in [*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf cannot be read as GGUF"):
            open_checkpoint(cut)


def test_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = changed(tokenizer__chat_template="a template").write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"a template", b"a templat\xff"))

    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("start", "message"),
    [(b"PK\x03\x04", "magic"), (b"GGUF\x09\0\0\0", "version 9"), (b"GGUF\0\0\0\x03", "byte order")],
)
def test_another_container_is_refused(tmp_path: Path, start: bytes, message: str) -> None:
    path = tiny().write(tmp_path / "m.gguf")
    path.write_bytes(start + path.read_bytes()[len(start) :])

    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def changed(**metadata: Any) -> TinyModel:  # noqa: ANN401
    model = tiny()
    model.metadata |= {key.replace("__", "."): value for key, value in metadata.items()}
    return model


def without(key: str) -> TinyModel:
    model = tiny()
    (model.metadata if key in model.metadata else model.tensors).pop(key)
    return model


def with_tensor(name: str, values: NDArray[Any], kind: Type = Type.F32) -> TinyModel:
    model = tiny()
    model.tensors[name], model.kinds[name] = values, kind
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            TinyModel("gemma"),
            "'gemma', which is not supported; expected one of llama, qwen2, qwen3",
        ),
        (changed(expert_count=8), "mixture of 8 experts"),
        (changed(split__count=3), "one of 3 parts; join them .* --merge"),
        (changed(attention__head_count_kv=[2, 4]), r"differs between layers \(\[2, 4\]\)"),
        (changed(rope__scaling__type="longrope", rope__scaling__factor=2.0), "'longrope'"),
        (
            changed(rope__scaling__type="yarn", rope__scaling__attn_factor=1.5),
            "yarn rope scaling has an attn_factor",
        ),
        (changed(rope__scaling__type="linear"), "no llama.rope.scaling.factor"),
        (changed(attention__head_count=0), "attention.head_count is 0; expected a positive"),
        (changed(embedding_length="wide"), "embedding_length is 'wide'; expected a positive"),
        (changed(split__count="many"), "split.count is .many.; expected an integer"),
        (changed(rope__freq_base="far"), "rope.freq_base is 'far'; expected a positive number"),
        (changed(rope__freq_base=math.nan), "rope.freq_base is nan"),
        (changed(block_count=True), "block_count is True; expected a positive integer"),
        (changed(block_count=2**32 - 1), "num_hidden_layers is 4294967295"),
        (changed(attention__layer_norm_rms_epsilon="x"), "rms_norm_eps is 'x'"),
        (changed(tokenizer__ggml__eos_token_id=[1, 2]), r"eos_token_id is \[\[1, 2\]\]"),
        (without("block_count"), "no llama.block_count"),
        (without("token_embd.weight"), "no token_embd.weight"),
        (
            with_tensor("blk.0.ffn_gate_inp.weight", np.zeros(32, np.float32)),
            "does not use.*gate_inp",
        ),
        (with_tensor("extra.weight", np.zeros(32, np.float32)), "does not use, such as extra"),
        (with_tensor("strange", np.zeros(32, np.float32)), "does not use, such as strange"),
        (
            with_tensor("output.weight", np.zeros((40, 64), np.int32), Type.I32),
            "output.weight has GGUF type I32, which cannot be decoded",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, model: TinyModel, message: str) -> None:
    path = model.write(tmp_path / "m.gguf")

    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny().write(tmp_path / "m.gguf"))

    with pytest.raises(CheckpointError, match=r"no tensor 'lm_head\.weight' among its 11"):
        checkpoint.tensor("lm_head.weight")


def test_tokenizer_files_are_written(tmp_path: Path) -> None:
    model = tiny()
    model.metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "<s>", "</s>", "aa"],
        "tokenizer.ggml.merges": ["a a"],
        "tokenizer.chat_template": "{{ 'größe' }}",
    }
    engine = tmp_path / "engine"
    engine.mkdir()

    open_checkpoint(model.write(tmp_path / "m.gguf")).write_tokenizer(engine)

    assert (engine / "chat_template.jinja").read_text(encoding="utf-8") == "{{ 'größe' }}"
    generation = json.loads((engine / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2}
    assert json.loads((engine / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    assert (engine / "tokenizer.json").is_file()
