"""A Hugging Face directory: config.json, safetensors (one file or shards), tokenizer files."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from slipstream.builder.checkpoints import sentence_transformers
from slipstream.builder.checkpoints.base import (
    check_templates,
    generation_config,
    tell_left_out,
    unknown_tensor,
    write_json,
)
from slipstream.builder.checkpoints.huggingface.experts import by_expert
from slipstream.builder.checkpoints.huggingface.text_model import (
    counted,
    text_config,
    text_modules,
    text_name,
    text_tensors,
)
from slipstream.builder.checkpoints.names import REDUNDANT, layer_of
from slipstream.builder.checkpoints.quantized import (
    QUANTIZED_SUFFIXES,
    SIDE_FILES,
    Stored,
    quantization_config,
    read_quantized,
)
from slipstream.builder.models import HEADLESS, architecture_of
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.module import Module
from slipstream.builder.pooling import StatedPooling
from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields, Origin, is_file_name, read_fields, read_text
from slipstream.weights.safetensors import StoredTensor, read_header
from slipstream.weights.tensor import KVScales, LazyTensor

logger = logging.getLogger(__name__)

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_HEAD = "lm_head.weight"
_PREFIX = "model."
_CONFIG_AGAIN = "download config.json again"
_MEND_TEMPLATE = "correct chat_template.jinja, or else tokenizer_config.json, and build again"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
_TEMPLATE = "chat_template.jinja"
_PICKLES = ("pytorch_model*.bin", "consolidated*.pth", "*.pt")


@dataclass(frozen=True, slots=True)
class HuggingFaceCheckpoint:
    """A directory whose weights are float32, float16, bfloat16, or quantized in a known format."""

    path: Path
    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    kv_scales: KVScales | None = None
    pooling: StatedPooling | None = None

    def names(self) -> tuple[str, ...]:
        """Every weight of the checkpoint; scales and the like belong to their weight."""
        return tuple(self.tensors)

    def tensor(self, name: str) -> LazyTensor:
        """One weight, not yet read."""
        if name not in self.tensors:
            raise unknown_tensor(self.path, name, self.names())
        return self.tensors[name]

    def write_tokenizer(self, directory: Path) -> None:
        """Copies the tokenizer files; the chat template always ends in chat_template.jinja."""
        if not (self.path / "tokenizer.json").is_file():
            raise CheckpointError(
                f'{self.path} has no tokenizer.json; write one with python -c "from transformers '
                f"import AutoTokenizer as T; T.from_pretrained('{self.path}').save_pretrained("
                f"'{self.path}')\""
            )
        for name in _TOKENIZER_FILES:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, directory / name)
        if not (directory / "tokenizer_config.json").is_file():
            write_json(directory / "tokenizer_config.json", {})
        _complete_generation_config(directory / "generation_config.json", self)
        templates = _chat_templates(self.path)
        check_templates(templates, Origin(self.path, _MEND_TEMPLATE))
        if list(templates) == ["default"]:
            template = templates["default"]
            (directory / _TEMPLATE).write_text(template, encoding="utf-8")


def open_checkpoint(
    source: str | os.PathLike[str], *, strict: bool = False
) -> HuggingFaceCheckpoint:
    """Opens a directory that has config.json; reads headers and small tensors, no weights.

    Of a model that sees or hears, too, the text model is opened; with ``strict`` it is refused.
    """
    path = Path(source)
    raw, stored = read_config(path), stored_weights(path)
    quantization, pooling = quantization_config(path, raw), _pooling(path, raw)
    text = _text_config(raw, stored)
    if text is not None:
        stored = _without_others(path, stored, strict=strict)
        quantization = None if quantization is None else text_modules(quantization)
    config = ModelConfig.from_huggingface((text or raw).values)
    modules = architecture_of(config.architecture).modules
    whole = _with_embedding(_with_prefix(stored, modules), config)
    read = _without_unread(path, whole, text or raw, config, strict=strict)
    stored = by_expert(read, modules, config)
    if quantization is None:
        return HuggingFaceCheckpoint(path, config, _dense(path, stored), pooling=pooling)
    weights = read_quantized(Stored(path, stored), config, quantization)
    for note in weights.notes:
        logger.warning("%s: %s", path.name, note)
    return HuggingFaceCheckpoint(path, config, weights.tensors, weights.kv_scales, pooling)


def files_of(path: Path) -> list[Path]:
    """Every file that is read, if it is there; CheckpointError for an index that cannot be."""
    shards = set(_shards(path).values()) if (path / _INDEX).is_file() else set()
    names = {_CONFIG, _INDEX, _WEIGHTS, _TEMPLATE, *_TOKENIZER_FILES, *SIDE_FILES, *shards}
    found = [path / name for name in sorted(names) if (path / name).is_file()]
    return [*found, *sentence_transformers.files_of(path)]


def _pooling(path: Path, raw: Fields) -> StatedPooling | None:
    """What the model is used for, by the files beside it, or because it has no head."""
    if not raw.flag("is_causal", True):
        raise raw.refusal("is_causal", "true: a token sees those before it, and none after")
    stated = sentence_transformers.read_sentence_transformers(path)
    headless = all(name.endswith(HEADLESS) for name in raw.texts("architectures", ("",)))
    return StatedPooling("embed") if stated is None and headless else stated


def _with_prefix(
    stored: Mapping[str, StoredTensor], modules: Iterable[Module]
) -> Mapping[str, StoredTensor]:
    """Files of a model without a head name its tensors without the ``model.`` of one with."""
    embedding = next(f"{m.name}.weight" for m in modules if m.role == "embedding")
    if embedding in stored or embedding.removeprefix(_PREFIX) not in stored:
        return stored
    renamed = {name: name if name == _HEAD else _PREFIX + name for name in stored}
    return {renamed[name]: replace(t, name=renamed[name]) for name, t in stored.items()}


def _text_config(raw: Fields, stored: Iterable[str]) -> Fields | None:
    return text_config(raw, has_head=any(text_name(name) == _HEAD for name in stored))


def _without_others(
    path: Path, stored: Mapping[str, StoredTensor], *, strict: bool
) -> dict[str, StoredTensor]:
    """The text model's tensors; the others are named, and refused if they must be."""
    text = text_tensors(stored)
    if text.left_out and strict:
        raise CheckpointError(
            f"{path} holds {len(text.left_out)} tensors beside its text model "
            f"({counted(text.left_out)}), which would be left out; build without --strict-tensors"
        )
    logger.warning(
        "%s: its text model is read; %d tensors beside it are left out (%s)",
        path.name, len(text.left_out), counted(text.left_out),
    )  # fmt: skip
    return dict(text.tensors)


def _without_unread(
    path: Path,
    stored: Mapping[str, StoredTensor],
    keys: Fields,
    config: ModelConfig,
    *,
    strict: bool,
) -> dict[str, StoredTensor]:
    """The tensors without those of layers behind the last, which predict further tokens, and
    others that a file may hold all the same; they are named, and refused if they must be."""
    architecture = architecture_of(config.architecture)
    more = keys.integer("num_nextn_predict_layers", 0)
    layers = range(config.num_layers, config.num_layers + more)
    left_out = [
        name
        for name in stored
        if layer_of(name) in layers
        or name.endswith(REDUNDANT)
        or architecture.is_redundant(config, name)
    ]
    tell_left_out(path, left_out, strict=strict)
    without = dict.fromkeys(left_out)
    return {name: tensor for name, tensor in stored.items() if name not in without}


def _dense(path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, LazyTensor]:
    quantized = [name for name in stored if name.endswith(QUANTIZED_SUFFIXES)]
    if quantized:
        raise CheckpointError(
            f"{path} holds {len(quantized)} quantized tensors such as {quantized[0]}, but neither "
            "config.json nor a file beside it says how they are quantized; download config.json "
            "(its quantization_config) or quantize_config.json of the model"
        )
    return {name: tensor.dense() for name, tensor in stored.items()}


def read_config(path: Path) -> Fields:
    """config.json; CheckpointError where there is none."""
    if (path / "config.json").is_file():
        return read_fields(path / "config.json", Origin(path / "config.json", _CONFIG_AGAIN))
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    remedy = f"pass one of its files: {', '.join(ggufs)}" if ggufs else "check the path"
    raise CheckpointError(f"{path} has no config.json, so it is no checkpoint; {remedy}")


def _with_embedding(
    stored: Mapping[str, StoredTensor], config: ModelConfig
) -> Mapping[str, StoredTensor]:
    """A file of a tied model may hold the matrix that embedding and head share as the head's."""
    modules = architecture_of(config.architecture).modules
    embedding = next(f"{m.name}.weight" for m in modules if m.role == "embedding")
    heads = [stored[f"{m.name}.weight"] for m in modules if m.tied and f"{m.name}.weight" in stored]
    if not config.tie_word_embeddings or embedding in stored or not heads:
        return stored
    return {**stored, embedding: replace(heads[0], name=embedding)}


def stored_weights(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a directory.

    As transformers does, one whole file is read before shards: what index lies beside it is of
    another download, unless it counts that file among its shards.
    """
    whole = (path / _WEIGHTS).is_file()
    if (path / _INDEX).is_file():
        shard_of = _shards(path)
        if not whole or {_WEIGHTS} < set(shard_of.values()):
            return _sharded_weights(path, shard_of)
        logger.info("%s: %s is not read, because %s is there", path.name, _INDEX, _WEIGHTS)
    if whole:
        return read_header(path / _WEIGHTS)
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{path} has its weights only as pickles ({pickles[0]}), which can run code when they "
            'are read; convert them with python -c "from transformers import AutoModelForCausalLM '
            f"as M; M.from_pretrained('{path}').save_pretrained('{path}')\""
        )
    raise CheckpointError(
        f"{path} has neither {_WEIGHTS} nor {_INDEX}; download the checkpoint again"
    )


def _shards(path: Path) -> dict[str, str]:
    """The file of each tensor, by the index."""
    index = read_fields(path / _INDEX, Origin(path / _INDEX, "download the checkpoint again"))
    if not index.has("weight_map"):
        raise index.origin.refusal("has no weight_map")
    shard_of = index.texts_by_name("weight_map")
    for name, shard in shard_of.items():
        if not is_file_name(shard):
            raise index.fields("weight_map").refusal(name, "a file beside the index")
    return shard_of


def _sharded_weights(path: Path, shard_of: Mapping[str, str]) -> dict[str, StoredTensor]:
    shards = sorted(set(shard_of.values()))
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of its {len(shards)} shards: {', '.join(missing)}; "
            "download them into that directory"
        )
    headers = {shard: read_header(path / shard) for shard in shards}
    absent = [name for name, shard in shard_of.items() if name not in headers[shard]]
    if absent:
        raise CheckpointError(
            f"{path / _INDEX} lists {len(absent)} tensors that their shards do not hold, such as "
            f"{absent[0]} in {shard_of[absent[0]]}; index and shards are of different downloads: "
            "download the checkpoint again"
        )
    return {name: headers[shard][name] for name, shard in shard_of.items()}


def _complete_generation_config(file: Path, checkpoint: HuggingFaceCheckpoint) -> None:
    """Ends of a completion that only config.json names go into the file as well."""
    config, raw = checkpoint.config, read_config(checkpoint.path)
    known = generation_config(config.bos_token_id, config.eos_token_ids)
    if not file.is_file():
        write_json(file, known)
        return
    given = read_fields(file)
    # An architecture's default says nothing about this model.
    says = raw.has("eos_token_id") or raw.fields("text_config", {}).has("eos_token_id")
    if not given.has("eos_token_id") and says:
        write_json(file, {**given.values, "eos_token_id": list(config.eos_token_ids)})


def _chat_templates(path: Path) -> dict[str, str]:
    """The template from its own file, else those of tokenizer_config.json, as in older models."""
    own = path / _TEMPLATE
    if own.is_file():
        return {"default": read_text(own)}
    config = path / "tokenizer_config.json"
    fields = read_fields(config) if config.is_file() else Fields({}, Origin(config))
    if isinstance(fields.values.get("chat_template"), list):
        named = fields.list_of_fields("chat_template")
        return {entry.text("name"): entry.text("template") for entry in named}
    template = fields.optional_text("chat_template")
    return {} if template is None else {"default": template}
