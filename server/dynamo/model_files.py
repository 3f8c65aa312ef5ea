"""What Dynamo's frontends render, encode and detokenize with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slipstream.runtime.loaded_engine import Model


def write_model_files(model: Model, directory: Path) -> None:
    """Fill a directory as a checkpoint on the hub is, without weights.

    How answers are sampled where a request does not say stays with the engine.
    """
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
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
