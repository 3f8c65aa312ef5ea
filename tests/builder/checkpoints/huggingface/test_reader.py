"""Hugging Face directories: weights equal to transformers', tokenizer files, damaged downloads."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tests.integration.test_architectures import CONFIGS
from tests.tiny_models import save_tiny
from transformers import LlamaConfig, LlamaForCausalLM

from slipstream.builder.build import plan
from slipstream.builder.checkpoints import open_checkpoint
from slipstream.builder.options import BuildOptions
from slipstream.errors import CheckpointError

HEAD = "lm_head.weight"
Edit = Callable[[Path], None]


def save_llama(
    directory: Path, dtype: torch.dtype, *, shard: str = "1GB", tied: bool = False
) -> Any:  # noqa: ANN401
    """Saves a small random model and returns it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    return model


@pytest.fixture(name="saved")
def saved_model(tmp_path: Path) -> Path:
    """A directory with one model.safetensors in bfloat16."""
    save_llama(tmp_path, torch.bfloat16)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_weights_are_those_of_transformers(tmp_path: Path, dtype: torch.dtype, shard: str) -> None:
    state = save_llama(tmp_path, dtype, shard=shard).state_dict()

    checkpoint = open_checkpoint(tmp_path)

    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    assert set(checkpoint.names()) == set(state)
    for name, expected in state.items():
        lazy = checkpoint.tensor(name)
        assert lazy.format.shape == tuple(expected.shape)
        assert lazy.format.dtype == str(dtype).removeprefix("torch.")
        loaded = lazy.load()
        assert loaded.format == lazy.format
        assert loaded.codes.dtype.name == lazy.format.dtype
        np.testing.assert_array_equal(loaded.dequantize(), expected.float().numpy())


def test_the_configuration_is_read(saved: Path) -> None:
    config = open_checkpoint(str(saved)).config

    assert (config.architecture, config.num_kv_heads, config.head_dim) == ("llama", 2, 8)


def test_a_tied_checkpoint_has_no_head(tmp_path: Path) -> None:
    save_llama(tmp_path, torch.float32, tied=True)

    checkpoint = open_checkpoint(tmp_path)

    assert checkpoint.config.tie_word_embeddings
    assert "lm_head.weight" not in checkpoint.names()
    with pytest.raises(CheckpointError, match=r"no tensor 'lm_head\.weight' among its 20"):
        checkpoint.tensor("lm_head.weight")


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {"model.embed_tokens.weight": HEAD}, {}])
@pytest.mark.parametrize("tied", [True, False])
def test_a_shared_matrix_may_be_stored_as_the_head_only(
    tmp_path: Path, metadata: dict[str, str], tied: bool
) -> None:
    """As `safetensors.torch.save_model` keeps it, which says so in the header; where nothing does,
    the configuration ties the two."""
    state = save_llama(tmp_path, torch.float32, tied=True).state_dict()
    embedding = state["model.embed_tokens.weight"].numpy()
    kept = {name: t.numpy() for name, t in state.items() if name != "model.embed_tokens.weight"}
    save_file(kept, tmp_path / "model.safetensors", metadata)
    config(tie_word_embeddings=tied)(tmp_path)

    checkpoint = open_checkpoint(tmp_path)

    if tied or HEAD in metadata.values():
        planned = plan(tmp_path, BuildOptions())
        stored = [weight.parts[0].name for weight in planned.weights]
        assert any(name.startswith(HEAD) for name in stored) == (not tied)
        found = checkpoint.tensor("model.embed_tokens.weight")
        assert found.name == "model.embed_tokens.weight"
        np.testing.assert_array_equal(found.load().dequantize(), embedding)
    else:
        assert "model.embed_tokens.weight" not in checkpoint.names()


def test_a_weight_is_read_when_it_is_loaded(saved: Path) -> None:
    lazy = open_checkpoint(saved).tensor("model.norm.weight")
    (saved / "model.safetensors").unlink()

    with pytest.raises(CheckpointError, match="moved or changed during the build"):
        lazy.load()


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def weights(change: Callable[[bytes], bytes]) -> Edit:
    def edit(directory: Path) -> None:
        path = directory / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return edit


def header(change: Callable[[dict[str, Any]], object]) -> Edit:
    return lambda directory: edit_header(directory / "model.safetensors", change)


def config(**changes: Any) -> Edit:  # noqa: ANN401
    return lambda directory: edit_json(directory / "config.json", lambda data: data.update(changes))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json.*check the path"),
        (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda d: (d / "config.json").write_text("[]"), "is not a JSON object"),
        (config(architectures=["BertModel"]), "BertModel is not supported"),
        (
            config(quantization_config={"quant_method": "hqq"}),
            "quantized with HQQ.*pass the unquantized",
        ),
        (
            lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
            "only as pickles .pytorch_model.bin.*save_pretrained",
        ),
        (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (weights(lambda data: data[:4]), "has 4 bytes.*truncated"),
        (weights(lambda data: data[:200]), "has 200 bytes.*truncated"),
        (weights(lambda data: data[:-1]), "is truncated"),
        (weights(lambda data: b"\xff" * 8 + data[8:]), "truncated or not a safetensors"),
        (weights(lambda data: data[:8] + b"x" + data[9:]), "damaged header"),
        (weights(lambda data: (4).to_bytes(8, "little") + b"null"), "damaged header"),
        (header(lambda h: h[NORM].pop("dtype")), f"entry for {NORM} is"),
        (header(lambda h: h.update({NORM: 5})), f"entry for {NORM} is 5"),
        (header(lambda h: h[NORM].update(shape=[31])), f"{NORM} .* should take 62 bytes"),
        (header(lambda h: h[NORM].update(data_offsets=[64, 0])), "offsets are 64 to 0"),
    ],
)
def test_a_damaged_directory_is_refused(saved: Path, edit: Edit, message: str) -> None:
    edit(saved)

    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(saved)


def test_a_type_that_is_no_weight_is_refused(saved: Path) -> None:
    def change(entries: dict[str, Any]) -> None:
        entries[NORM].update(dtype="I64", shape=[8])

    edit_header(saved / "model.safetensors", change)

    with pytest.raises(CheckpointError, match=f"{NORM} has type I64; only F32, F16, BF16"):
        open_checkpoint(saved)


def test_shards_and_index_must_agree(tmp_path: Path) -> None:
    save_llama(tmp_path, torch.float32, shard="20KB")
    index = tmp_path / "model.safetensors.index.json"
    good = index.read_text()

    def add(data: dict[str, Any]) -> None:
        data["weight_map"]["model.extra"] = "model-00001-of-00005.safetensors"

    edit_json(index, add)
    with pytest.raises(CheckpointError, match=r"lists 1 tensors .* model\.extra in model-00001"):
        open_checkpoint(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        open_checkpoint(tmp_path)
    index.write_text(good)
    (tmp_path / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of its 5 shards: model-00002-of-00005"):
        open_checkpoint(tmp_path)


def test_a_whole_file_is_read_though_an_old_index_lies_beside_it(tmp_path: Path) -> None:
    """The shards of the index are gone, or are those of another model."""
    save_llama(tmp_path, torch.float32, shard="20KB")
    index = (tmp_path / "model.safetensors.index.json").read_text()
    for shard in tmp_path.glob("model-*.safetensors"):
        save_file({"other": np.zeros(3, np.float32)}, shard)
        if "00002" in shard.name:
            shard.unlink()
    state = save_llama(tmp_path, torch.float32).state_dict()
    (tmp_path / "model.safetensors.index.json").write_text(index)

    assert set(open_checkpoint(tmp_path).names()) == set(state)


def test_one_of_the_shards_may_have_the_name_of_a_whole_file(tmp_path: Path) -> None:
    state = save_llama(tmp_path, torch.float32, shard="20KB").state_dict()
    (tmp_path / "model-00001-of-00005.safetensors").rename(tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00005.s", "model.s"))

    assert set(open_checkpoint(tmp_path).names()) == set(state)


@pytest.mark.parametrize("shard", ["../other/a.safetensors", "/a", "b/a", "..", ".", "", "\0"])
def test_shards_lie_beside_their_index(tmp_path: Path, shard: str) -> None:
    (tmp_path / "other").mkdir()
    save_file({NORM: np.zeros(32, np.float32)}, tmp_path / "other" / "a.safetensors")
    directory = tmp_path / "model"
    save_llama(directory, torch.float32, shard="20KB")
    index = directory / "model.safetensors.index.json"
    edit_json(index, lambda data: data["weight_map"].update({NORM: shard}))

    with pytest.raises(CheckpointError, match=r"weight_map\.model\.norm\.weight is .* beside the"):
        open_checkpoint(directory)


def written(source: Path, tmp_path: Path) -> Path:
    engine = tmp_path / "engine"
    engine.mkdir()
    open_checkpoint(source).write_tokenizer(engine)
    return engine


def test_tokenizer_files_are_copied(saved: Path, tmp_path: Path) -> None:
    (saved / "tokenizer.json").write_text('{"version": "1.0"}')
    (saved / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (saved / "chat_template.jinja").write_text("{{ 'größe' }}", encoding="utf-8")
    (saved / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 2}')

    engine = written(saved, tmp_path)

    for file in engine.iterdir():
        assert file.read_bytes() == (saved / file.name).read_bytes()
    assert len(list(engine.iterdir())) == 4


def test_every_file_that_may_name_special_tokens_is_copied(saved: Path, tmp_path: Path) -> None:
    (saved / "tokenizer.json").write_text("{}")
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (saved / name).write_text('{"x_token": "</s>"}')

    engine = written(saved, tmp_path)

    for name in ("special_tokens_map.json", "added_tokens.json"):
        assert (engine / name).read_text() == '{"x_token": "</s>"}'


def test_an_end_that_only_the_configuration_names_goes_along(saved: Path, tmp_path: Path) -> None:
    (saved / "tokenizer.json").write_text("{}")
    (saved / "generation_config.json").write_text('{"temperature": 0.6}')
    config(eos_token_id=[2, 7])(saved)

    generation = json.loads((written(saved, tmp_path) / "generation_config.json").read_text())

    assert generation == {"temperature": 0.6, "eos_token_id": [2, 7]}


def test_an_old_chat_template_gets_a_file_of_its_own(saved: Path, tmp_path: Path) -> None:
    (saved / "tokenizer.json").write_text("{}")
    (saved / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')

    assert (written(saved, tmp_path) / "chat_template.jinja").read_text() == "{{ x }}"


def test_several_chat_templates_stay_where_they_are(saved: Path, tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (saved / "tokenizer.json").write_text("{}")
    (saved / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))

    engine = written(saved, tmp_path)

    assert not (engine / "chat_template.jinja").exists()
    config_file = json.loads((engine / "tokenizer_config.json").read_text())
    assert config_file == {"chat_template": templates}


def test_missing_tokenizer_extras_are_made_up_from_the_configuration(
    saved: Path, tmp_path: Path
) -> None:
    (saved / "tokenizer.json").write_text("{}")
    (saved / "generation_config.json").unlink()
    config(eos_token_id=[2, 7])(saved)

    engine = written(saved, tmp_path)

    generation = json.loads((engine / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 7]}
    assert json.loads((engine / "tokenizer_config.json").read_text()) == {}
    assert not (engine / "chat_template.jinja").exists()


def test_a_missing_tokenizer_is_said_with_its_remedy(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json; write one with python -c"):
        written(saved, tmp_path)


def test_layers_that_predict_further_tokens_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = save_tiny(CONFIGS["glm4-moe"], tmp_path)
    names = set(open_checkpoint(checkpoint).names())
    file = checkpoint / "model.safetensors"
    more = {
        f"model.layers.3.{name}.weight": np.ones((4, 4), np.float32)
        for name in ("eh_proj", "enorm", "shared_head.norm", "mlp.experts.0.up_proj")
    }
    save_file({**load_file(file), **more}, file)

    with caplog.at_level(logging.WARNING):
        assert set(open_checkpoint(checkpoint).names()) == names
    assert "4 tensors that its text model has no use for are left out" in caplog.text
    plan(checkpoint, BuildOptions())
    with pytest.raises(CheckpointError, match=r"4 tensors that its text model has .*--strict"):
        open_checkpoint(checkpoint, strict=True)
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(CheckpointError, match=r"4 tensors .* model.layers.3.eh_proj"):
        plan(checkpoint, BuildOptions())
