from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from slipstream.runtime.testing import EOS, VOCAB_SIZE, counting_engine
from slipstream.server.dynamo.model_files import write_model_files


def test_a_frontend_finds_what_it_renders_and_encodes_with(tmp_path: Path) -> None:
    engine = counting_engine(max_seq_len=128)
    write_model_files(engine, tmp_path)

    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["vocab_size"], config["max_position_embeddings"]) == (VOCAB_SIZE, 128)
    assert config["eos_token_id"] == [EOS] and "bos_token_id" not in config
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<eos>"
    read = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert read.encode("abc").ids == [0, 1, 2]
    assert (tmp_path / "chat_template.jinja").read_text() == engine.tokenizer.chat_template
    # How answers are sampled is the engine's to say.
    assert set(json.loads((tmp_path / "generation_config.json").read_text())) == {"eos_token_id"}
