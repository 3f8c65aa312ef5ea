"""GGUF files: the numbers of the reference decoder, Hugging Face's names and order of rows."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from tests.builder.checkpoints.gguf.models import (
    FEED_FORWARD,
    HEADS,
    HIDDEN,
    KV_HEADS,
    QUANTIZABLE,
    VOCABULARY,
    TinyModel,
    random_blocks,
    tiny,
    with_head_dim,
)

from slipstream.builder.checkpoints import open_checkpoint
from slipstream.errors import CheckpointError


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
            TinyModel("bert"),
            "'bert', which is not supported; expected one of llama, gemma, gemma2,",
        ),
        (TinyModel("qwen2", {"expert_count": 8}), "mixture of 8 experts"),
        (changed(expert_count=8), "does not use, such as blk.0.ffn_down.weight"),
        (changed(nextn_predict_layers=1), "nextn_predict_layers is 1, of 1 blocks"),
        (changed(split__count=3), "one of 3 parts, and its name does not say .* --merge"),
        (changed(attention__head_count_kv=[2, 4]), r"differs between layers \(\[2, 4\]\)"),
        (
            changed(rope__scaling__type="longrope", rope__scaling__factor=2.0),
            "short_factor is None",
        ),
        (
            changed(rope__scaling__type="yarn", rope__scaling__attn_factor=1.5),
            "yarn rope scaling has an attn_factor",
        ),
        (changed(rope__scaling__type="yarn"), "no llama.rope.scaling.factor"),
        (changed(attention__head_count=0), "attention.head_count is 0; expected a positive"),
        (changed(embedding_length="wide"), "embedding_length is 'wide'; expected a positive"),
        (changed(split__count="many"), "split.count is .many.; expected an integer"),
        (changed(rope__freq_base="far"), "rope.freq_base is 'far'; expected a positive number"),
        (changed(rope__freq_base=math.nan), "rope.freq_base is nan"),
        (changed(block_count=True), "block_count is True; expected a positive integer"),
        (changed(block_count=2**32 - 1), "block_count is 4294967295"),
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


def split(model: TinyModel, directory: Path, count: int = 3) -> list[Path]:
    """The model in several files, as llama-gguf-split writes them."""
    names = list(model.tensors)
    paths = []
    for number in range(count):
        part = TinyModel(
            model.architecture, {}, {n: model.tensors[n] for n in names[number::count]}
        )
        part.metadata = dict(model.metadata) if number == 0 else {}
        part.metadata |= {
            "split.no": number, "split.count": count, "split.tensors.count": len(names),
        }  # fmt: skip
        paths.append(part.write(directory / f"m-{number + 1:05d}-of-{count:05d}.gguf"))
    return paths


def test_a_split_model_is_read_from_any_of_its_files(tmp_path: Path) -> None:
    model = tiny()
    whole = open_checkpoint(model.write(tmp_path / "whole.gguf"))

    for path in split(model, tmp_path):
        joined = open_checkpoint(path)
        assert joined.config == whole.config
        assert set(joined.names()) == set(whole.names())
        for name in whole.names():
            assert (joined.tensor(name).load().codes == whole.tensor(name).load().codes).all()


def test_a_split_model_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    first, second, third = split(tiny(), tmp_path)
    third.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"1 are not beside it: m-00003-of-00003\.gguf"):
        open_checkpoint(first)

    third.hardlink_to(second)
    with pytest.raises(CheckpointError, match="is not part 3 of the 3"):
        open_checkpoint(first)

    third.unlink()
    fewer = TinyModel(
        "llama", {"split.no": 2, "split.count": 3, "split.tensors.count": 11},
        {"blk.0.attn_norm.weight": np.ones(64, np.float32)},
    )  # fmt: skip
    fewer.write(third)
    with pytest.raises(CheckpointError, match=r"is not part 3|hold \d+ tensors of 11"):
        open_checkpoint(first)
