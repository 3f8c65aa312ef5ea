"""What Dynamo's frontends render, encode and detokenize with."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from slipstream.runtime.loaded_engine import Model


def write_model_files(model: Model, root: Path) -> Path:
    """A directory in ``root`` that is filled as a checkpoint on the hub is, without weights.

    Its name depends on what is in it: workers are replicas for a frontend only if their directories
    are called the same. How answers are sampled where a request does not say stays with the engine.
    """
    files = model_files(model)
    name = sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as place:
        made = Path(place) / name
        made.mkdir()
        for file, text in files.items():
            (made / file).write_text(text, encoding="utf-8")
        with suppress(OSError):  # another worker was first
            made.rename(root / name)
    return root / name


def model_files(model: Model) -> Mapping[str, str]:
    """Texts of the files by name."""
    tokenizer = model.tokenizer
    special = dict(tokenizer.special_tokens)
    ends: dict[str, Any] = {"eos_token_id": sorted(tokenizer.eos_token_ids)}
    if "bos_token" in special:
        ends["bos_token_id"] = tokenizer.token_to_id(special["bos_token"])
    described = {
        "architectures": ["SlipstreamForCausalLM"],
        "model_type": "slipstream",
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.config.max_seq_len,
        **ends,
    }
    files = {
        "tokenizer.json": tokenizer.to_json(),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", **special}
        ),
        "generation_config.json": json.dumps(ends),
        "config.json": json.dumps(described),
    }
    if tokenizer.chat_template is not None:
        files["chat_template.jinja"] = tokenizer.chat_template
    return files
