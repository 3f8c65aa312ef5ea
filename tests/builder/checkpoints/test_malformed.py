"""Every file that others write, malformed in every way we know: a typed error with file and remedy,
or it reads fine; nothing else escapes."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.builder.checkpoints.bounds import MEMORY, bounded
from tests.builder.checkpoints.gguf.models import TinyModel, tiny
from tests.builder.checkpoints.quantized.files import (
    pack_awq,
    pack_gptq,
    pack_nf4,
    save_quantized_llama,
)
from tests.tiny_models import llama_tensors, save_llama

from slipstream.builder.build import build
from slipstream.builder.checkpoints import open_checkpoint
from slipstream.builder.engine import open_engine
from slipstream.builder.options import BuildOptions
from slipstream.errors import SlipstreamError
from slipstream.runtime.loading import generation_defaults
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.weights.safetensors import write_arrays

FIXTURES = Path(__file__).parents[2] / "fixtures"
# What may stand in place of a value: JSON texts.
VALUES = (
    *("null", "true", "false", "0", "-1", "-7", "7", "0.5", "-0.0", "1e400", "-1e400", "NaN"),
    *("18446744073709551616", "1" + "0" * 400, "9" * 5000, "1e9", "1e300", "1e-300"),
    *map(
        str, (2**20 + 1, 2**30, 2**31 - 1, 2**31, 10**9, 10**12, 2**53, 2**62, 2**63 - 1, -(2**63))
    ),
    *('""', '"text"', '"4"', '"-1"', '"0x0"', '"re:("', r'"\ud800"', r'"\u0000"', r'["\udfff"]'),
    *("[]", "[0]", "[-1]", "[null]", '["a"]', "[[]]", "[1, 2, 3]", "[true, false]", "[0, 0]"),
    *("{}", '{"a": 1}', '{"a": null}', '{"": []}', '{"a": {"a": {}}}', '{"a": 1, "a": 2}'),
    *("[" + "0," * 1_000_001 + "0]", "[" + "7," * 9_000 + "7]", json.dumps("x" * 1_000_000)),
    json.dumps({str(i): i for i in range(5_000)}),
    *("[" * 60 + "]" * 60, "[" * 200_000 + "]" * 200_000, '{"a":' * 200_000 + "1" + "}" * 200_000),
)
# What may stand in place of a file.
FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "one brace": lambda _: b"{",
    "null": lambda _: b"null",
    "a number": lambda _: b"1e400",
    "a list": lambda _: b"[]",
    "an empty object": lambda _: b"{}",
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "UTF-32": lambda data: data.decode().encode("utf-32"),
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "not UTF-8": lambda data: data.replace(b'"', b'"\xff', 1),
    "zeros": lambda data: bytes(len(data)),
    "twice": lambda data: data + data,
    "nested lists": lambda _: b"[" * 200_000,
    "nested objects": lambda _: b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "a list of itself": lambda data: b"[" + data + b"]",
}
PLACE = "@@"
# Of the values, how many apart are those that one place sees; all of them take minutes.
STRIDE = 5
REMEDIES = ("download", "pass ", "use ", "build", "correct", "choose", "check", "expected one of",
            "fetch", "save ", "convert", "config.json", "another --")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A directory, the JSON file of it that is malformed, and what reads it."""

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    file: str
    # Keys of the top level that are malformed; None is all of them.
    keys: tuple[str, ...] | None = None

    def get(self, directory: Path) -> bytes:
        data = (directory / self.file).read_bytes()
        if self.file.endswith(".safetensors"):
            return data[8 : 8 + int.from_bytes(data[:8], "little")]
        return data

    def put(self, directory: Path, text: bytes) -> None:
        path = directory / self.file
        if self.file.endswith(".safetensors"):
            data = path.read_bytes()
            rest = data[8 + int.from_bytes(data[:8], "little") :]
            text = len(text).to_bytes(8, "little") + text + rest
        path.write_bytes(text)


def read_checkpoint(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    for name in checkpoint.names():
        if ".layers.0." in name:
            checkpoint.tensor(name).load()
    (directory / "written").mkdir(exist_ok=True)
    checkpoint.write_tokenizer(directory / "written")


def quantized(pack: Any, **section: Any) -> Callable[[Path], object]:  # noqa: ANN401
    return lambda directory: save_quantized_llama(directory, pack, section)


def fixture(name: str, **changes: Any) -> Callable[[Path], object]:  # noqa: ANN401
    def make(directory: Path) -> None:
        shutil.copytree(FIXTURES / name, directory, dirs_exist_ok=True)
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"] |= changes
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "tokenizer.json").write_text("{}")

    return make


def float8(directory: Path) -> None:
    arrays: dict[str, Any] = {}
    for name, array in llama_tensors().items():
        arrays[name] = array
        if name.endswith("_proj.weight"):
            arrays[name] = np.ones(array.shape, ml_dtypes.float8_e4m3fn)
            cells = tuple(-(-n // 128) for n in array.shape)
            arrays[f"{name}_scale_inv"] = np.ones(cells, np.float32)
    section = {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["a"]}
    section |= {"activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
    save_llama(directory, llama_tensors(), quantization_config=section)
    write_arrays(directory / "model.safetensors", arrays)


def sharded(directory: Path) -> None:
    tensors = llama_tensors()
    save_llama(directory, tensors)
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def llama(directory: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32.0, "attention_factor": 1.0,
            "original_max_position_embeddings": 256, "mscale": 1.0, "truncate": True}  # fmt: skip
    more = {"rope_scaling": rope, "rope_theta": 1e4, "head_dim": 32, "hidden_act": "silu",
            "eos_token_id": [1, 2], "bos_token_id": 0, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False, "attention_bias": False}  # fmt: skip
    save_llama(directory, llama_tensors(), **more)


def qwen(directory: Path) -> None:
    window = {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1,
              "layer_types": ["full_attention", "sliding_attention"],
              "partial_rotary_factor": 0.5}  # fmt: skip
    save_llama(directory, llama_tensors(), **{"architectures": ["Qwen2ForCausalLM"], **window})


def engine(directory: Path) -> None:
    """The files of an engine that come from elsewhere."""
    save_llama(directory, {"a": np.zeros(1, np.float32)})
    token = {"content": "<|im_end|>", "lstrip": False}
    templates = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]
    special = {"bos_token": "<|im_start|>", "eos_token": token}
    (directory / "tokenizer_config.json").write_text(
        json.dumps(special | {"chat_template": templates})
    )
    (directory / "special_tokens_map.json").write_text(json.dumps(special))
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "do_sample": True}
    (directory / "generation_config.json").write_text(
        json.dumps(sampling | {"repetition_penalty": 1.1, "max_new_tokens": 5, "eos_token_id": [1]})
    )


def whole_engine(directory: Path) -> None:
    checkpoint = save_llama(directory / "checkpoint", llama_tensors())
    build(checkpoint, directory / "engine", BuildOptions())
    for file in (directory / "engine").iterdir():
        file.rename(directory / file.name)


def read_manifest(directory: Path) -> None:
    open_engine(directory).verify_files()


def read_engine(directory: Path) -> None:
    Tokenizer.from_directory(directory)
    generation_defaults(directory, "slipstream build x")


SECTION = ("quantization_config",)
ARGUMENTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32,
             "symmetric": True, "dynamic": False}  # fmt: skip
GROUPS = {
    "group_0": {
        "targets": ["Linear", "re:.*nothing"],
        "weights": ARGUMENTS | {"block_structure": None},
        "input_activations": ARGUMENTS | {"num_bits": 8, "dynamic": True},
        "format": "pack-quantized",
    }
}
CASES = {
    "config.json": Case(llama, read_checkpoint, "config.json"),
    "config.json with windows": Case(qwen, read_checkpoint, "config.json"),
    "awq": Case(
        quantized(
            pack_awq(32), quant_method="awq", bits=4, group_size=32, version="gemm",
            zero_point=True, backend="autoawq", modules_to_not_convert=["lm_head"],
        ), read_checkpoint, "config.json", SECTION,
    ),
    "gptq": Case(
        quantized(
            pack_gptq(4, 32), quant_method="gptq", bits=4, group_size=32, desc_act=False, sym=False,
            checkpoint_format="gptq", is_marlin_format=False, rotation="",
            dynamic={"+:.*nothing": {"bits": 8}, "-:lm_head": {}},
            meta={"quantizer": ["gptqmodel:1.0"]}, modules_in_block_to_quantize=[["mlp.up_proj"]],
        ), read_checkpoint, "config.json", SECTION,
    ),
    "bitsandbytes": Case(
        quantized(
            pack_nf4, quant_method="bitsandbytes", load_in_4bit=True, llm_int8_threshold=6.0,
            llm_int8_skip_modules=["lm_head"],
        ), read_checkpoint, "config.json", SECTION,
    ),
    "fp8": Case(float8, read_checkpoint, "config.json", SECTION),
    "compressed-tensors": Case(
        fixture(
            "compressed_tensors/int4_act_order", ignore=["lm_head", "re:.*nothing"],
            kv_cache_scheme={"num_bits": 8, "type": "float"}, sparsity_config={"format": "dense"},
            transform_config={"config_groups": {"R1": {"apply": [{"location": "weight_input"}]}}},
        ), read_checkpoint, "config.json", SECTION,
    ),
    "compressed-tensors, other keys": Case(
        fixture("compressed_tensors/int4_act_order", config_groups=GROUPS),
        read_checkpoint, "config.json", SECTION,
    ),
    "modelopt": Case(
        fixture("modelopt/mixed", kv_cache_scheme={"type": "float"}),
        read_checkpoint, "config.json", SECTION,
    ),
    "modelopt's own file": Case(fixture("modelopt/fp8"), read_checkpoint, "hf_quant_config.json"),
    "shard index": Case(sharded, read_checkpoint, "model.safetensors.index.json"),
    "safetensors header": Case(llama, read_checkpoint, "model.safetensors"),
    "float8 header": Case(float8, read_checkpoint, "model.safetensors"),
    "tokenizer_config.json of a checkpoint": Case(llama, read_checkpoint, "tokenizer_config.json"),
    "tokenizer.json": Case(engine, read_engine, "tokenizer.json", ("model", "decoder")),
    "tokenizer_config.json": Case(engine, read_engine, "tokenizer_config.json"),
    "special_tokens_map.json": Case(engine, read_engine, "special_tokens_map.json"),
    "generation_config.json": Case(engine, read_engine, "generation_config.json"),
    "engine.json": Case(whole_engine, read_manifest, "engine.json"),
}  # fmt: skip


def places(document: Any, depth: int = 0) -> Iterator[list[Any]]:  # noqa: ANN401
    """Paths to values; of many alike (tensors, shards, tokens) the first two."""
    items: list[Any] = []
    if isinstance(document, dict):
        alike = len({type(value) for value in document.values()}) == 1
        items = list(document.items())[: 2 if alike and len(document) > 4 else None]
    elif isinstance(document, list):
        items = list(enumerate(document))[:2]
    for key, value in items:
        yield [key]
        if depth < 6:
            yield from ([key, *rest] for rest in places(value, depth + 1))


def malformed(document: Any, path: list[Any]) -> Iterator[bytes]:  # noqa: ANN401
    """The document with one value replaced by each of ``VALUES``, and without it."""
    changed = copy.deepcopy(document)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = PLACE
    before, after = json.dumps(changed).split(f'"{PLACE}"')
    yield from (f"{before}{value}{after}".encode() for value in VALUES)
    del inner[path[-1]]
    yield json.dumps(changed).encode()


def test_the_bounds_hold() -> None:
    with pytest.raises(MemoryError), bounded():
        np.ones(4 * MEMORY, np.uint8)


def check(case: Case, directory: Path) -> str | None:
    """The message of the error, None if it reads fine; fails for any other error."""
    try:
        with bounded():
            case.read(directory)
    except SlipstreamError as error:
        message = str(error)
        assert any(name in message for name in (str(directory), "config.json", "GGUF")), message[
            :500
        ]
        assert any(remedy in message for remedy in REMEDIES), message[:500]
        assert len(message) < 1500, message[:500]
        return message
    return None


@pytest.fixture(scope="module", params=CASES)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, Path, bytes]:
    """A case, a directory of it that reads, and what its file says there."""
    case = CASES[request.param]
    directory = tmp_path_factory.mktemp("malformed")
    case.make(directory)
    case.read(directory)
    return case, directory, case.get(directory)


def test_a_malformed_value_is_a_typed_error(made: tuple[Case, Path, bytes]) -> None:
    """At every place one value of ``STRIDE``, each place beginning with another, so that each value
    stands at as many of the places."""
    case, directory, original = made
    document = json.loads(original)
    keys = case.keys or document.keys()
    refused = 0
    for number, path in enumerate(places({key: document[key] for key in keys})):
        for text in itertools.islice(malformed(document, path), number % STRIDE, None, STRIDE):
            case.put(directory, text)
            try:
                refused += check(case, directory) is not None
            except Exception as error:
                error.add_note(f"{case.file}: {path}: {text[:1000]!r}")
                raise
    assert refused > len(VALUES) / STRIDE / 3


@pytest.mark.parametrize("change", FILES)
def test_a_malformed_file_is_a_typed_error(made: tuple[Case, Path, bytes], change: str) -> None:
    case, directory, original = made
    case.put(directory, FILES[change](original))
    refused = check(case, directory)
    assert refused or change == "an empty object"


# What may stand in place of a value of GGUF metadata, of every type that its writer knows.
METADATA = (
    *(True, False, 0, 1, 7, 2**32 - 1, 0.0, -1.0, 0.5, math.inf, math.nan, "", "text", "4", "\0"),
    *(2**30, 2**31 - 1, 10**9, 1e9, 3e38, 1e-40, "x" * 100_000, [7] * 100_000),
    *([0], [1, 2], [True], [0.5], [math.nan], ["a"], ["a", "b c"], [[0]], [["a"]]),
)


def gguf_model() -> TinyModel:
    """A model with every key of metadata that somebody reads."""
    model = tiny()
    tokens = ["<unk>", "<s>", "</s>", *(chr(97 + i) for i in range(26)), "ab"]
    model.metadata |= {
        "attention.key_length": 16, "rope.dimension_count": 16, "attention.sliding_window": 128,
        "rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 1.0,
        "rope.scaling.original_context_length": 128, "rope.scaling.yarn_beta_fast": 32.0,
        "expert_count": 0, "split.count": 1, "tokenizer.chat_template": "x",
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.5] * len(tokens), "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.eot_token_id": 2,
    }  # fmt: skip
    return model


def read_gguf(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names():
        checkpoint.tensor(name).load()
    checkpoint.write_tokenizer(path.parent)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("key", gguf_model().metadata)
def test_malformed_metadata_of_gguf_is_a_typed_error(key: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    case = Case(lambda _: None, lambda _: read_gguf(path), path.name)
    for value in (None, *METADATA):
        model = gguf_model()
        model.metadata["tokenizer.ggml.model"] = kind
        model.metadata[key] = value
        if value is None:
            del model.metadata[key]
        model.write(path)
        try:
            check(case, tmp_path)
        except Exception as error:
            error.add_note(f"{key}: {value!r}")
            raise
