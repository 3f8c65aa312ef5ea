"""A Hugging Face directory: config.json, safetensors (one file or shards), tokenizer files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipstream.builder.checkpoints.base import (
    generation_config,
    unknown_tensor,
    write_json,
)
from slipstream.builder.checkpoints.safetensors_file import StoredTensor, read_header
from slipstream.builder.models.config import ModelConfig
from slipstream.errors import CheckpointError
from slipstream.quantize.tensor import KVScales, LazyTensor, QuantTensor, WeightFormat

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model*.bin", "consolidated*.pth", "*.pt")


@dataclass(frozen=True, slots=True)
class HuggingFaceCheckpoint:
    """A directory whose weights are dense float32, float16 or bfloat16."""

    path: Path
    config: ModelConfig
    stored: Mapping[str, StoredTensor]
    kv_scales: KVScales | None = None

    def names(self) -> tuple[str, ...]:
        """Every tensor of the checkpoint."""
        return tuple(self.stored)

    def tensor(self, name: str) -> LazyTensor:
        """One dense weight, not yet read."""
        if name not in self.stored:
            raise unknown_tensor(self.path, name, self.names())
        stored = self.stored[name]
        form = WeightFormat(stored.shape, "dense", stored.numpy_dtype().name)
        return LazyTensor(name, form, lambda: QuantTensor(name, form, stored.map()))

    def write_tokenizer(self, directory: Path) -> None:
        """Copies the tokenizer files; the chat template always ends in chat_template.jinja."""
        if not (self.path / "tokenizer.json").is_file():
            raise CheckpointError(
                f'{self.path} has no tokenizer.json; write one with python -c "from transformers '
                f"import AutoTokenizer as T; T.from_pretrained('{self.path}').save_pretrained("
                f"'{self.path}')\""
            )
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, directory / name)
        if not (directory / "tokenizer_config.json").is_file():
            write_json(directory / "tokenizer_config.json", {})
        if not (directory / "generation_config.json").is_file():
            config = generation_config(self.config.bos_token_id, self.config.eos_token_ids)
            write_json(directory / "generation_config.json", config)
        template = _chat_template(self.path)
        if template is not None:
            (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def open_checkpoint(source: str | os.PathLike[str]) -> HuggingFaceCheckpoint:
    """Opens a directory that has config.json; reads headers, no weights."""
    path = Path(source)
    raw = _config(path)
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            method = raw[key].get("quant_method", "unknown")
            raise CheckpointError(
                f"{path} is quantized (quant_method {method!r}), a format that cannot be read yet; "
                "pass the unquantized checkpoint it was made from (and --quantization), or a GGUF "
                "file of the model"
            )
    return HuggingFaceCheckpoint(path, ModelConfig.from_huggingface(raw), _weights(path))


def _config(path: Path) -> dict[str, Any]:
    if (path / "config.json").is_file():
        return _read_json(path / "config.json")
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    remedy = f"pass one of its files: {', '.join(ggufs)}" if ggufs else "check the path"
    raise CheckpointError(f"{path} has no config.json, so it is no checkpoint; {remedy}")


def _weights(path: Path) -> dict[str, StoredTensor]:
    if (path / _INDEX).is_file():
        return _sharded_weights(path)
    if (path / _WEIGHTS).is_file():
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


def _sharded_weights(path: Path) -> dict[str, StoredTensor]:
    shard_of = _read_json(path / _INDEX).get("weight_map")
    if not isinstance(shard_of, dict):
        raise CheckpointError(f"{path / _INDEX} has no weight_map; download the checkpoint again")
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


def _chat_template(path: Path) -> str | None:
    """The template from its own file, else from tokenizer_config.json, as in older models."""
    own = path / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    config = path / "tokenizer_config.json"
    template = _read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again")
    return data
