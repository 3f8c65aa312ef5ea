from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from slipstream.runtime.testing import EOS, VOCAB_SIZE, counting_engine
from slipstream.server.dynamo.model_files import write_model_files


def test_a_frontend_finds_what_it_renders_and_encodes_with(tmp_path: Path) -> None:
    engine = counting_engine(max_seq_len=128)
    made = write_model_files(engine, tmp_path / "dynamo")

    config = json.loads((made / "config.json").read_text())
    assert (config["vocab_size"], config["max_position_embeddings"]) == (VOCAB_SIZE, 128)
    assert config["eos_token_id"] == [EOS] and "bos_token_id" not in config
    settings = json.loads((made / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<eos>"
    read = tokenizers.Tokenizer.from_file(str(made / "tokenizer.json"))
    assert read.encode("abc").ids == [0, 1, 2]
    assert (made / "chat_template.jinja").read_text() == engine.tokenizer.chat_template
    # How answers are sampled is the engine's to say.
    assert set(json.loads((made / "generation_config.json").read_text())) == {"eos_token_id"}


def test_replicas_have_one_directory_and_other_models_another(tmp_path: Path) -> None:
    made = write_model_files(counting_engine(max_seq_len=128), tmp_path)
    assert write_model_files(counting_engine(max_seq_len=128), tmp_path) == made
    other = write_model_files(counting_engine(max_seq_len=64), tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([made, other])
