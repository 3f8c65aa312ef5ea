"""What files of sentence-transformers say, in the shapes of its old and new versions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.builder.checkpoints.gguf.models import tiny
from tests.quantized_models import quantized_llama
from tests.tiny_models import LLAMA, llama_tensors, save_llama

from slipstream.builder.build import plan
from slipstream.builder.checkpoints import files_of, open_checkpoint
from slipstream.builder.checkpoints.huggingface.writer import DirectoryWriter
from slipstream.builder.checkpoints.quantized import create_layout
from slipstream.builder.checkpoints.sentence_transformers import (
    read_sentence_transformers,
    write_sentence_transformers,
)
from slipstream.builder.models import find_architecture
from slipstream.builder.options import BuildOptions
from slipstream.builder.pooling import StatedPooling
from slipstream.errors import BuildError, CheckpointError

QWEN3_PROMPTS = {"query": "Instruct: find\nQuery:", "document": ""}
LAST_TOKEN = {
    "word_embedding_dimension": 64,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_lasttoken": True,
    "include_prompt": True,
}


def write(
    path: Path,
    pooling: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    modules: tuple[str, ...] = ("Transformer", "Pooling", "Normalize"),
    **files: dict[str, Any],
) -> Path:
    """The files of a model; ``pooling`` is the configuration of its second module."""
    path.mkdir(exist_ok=True)
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"a.b.{kind}"}
        for i, kind in enumerate(modules)
    ]
    (path / "modules.json").write_text(json.dumps(listed))
    if len(modules) > 1:
        (path / f"1_{modules[1]}").mkdir(exist_ok=True)
        config = LAST_TOKEN if pooling is None else pooling
        (path / f"1_{modules[1]}" / "config.json").write_text(json.dumps(config))
    if settings is not None:
        (path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_qwen3_embedding(tmp_path: Path) -> None:
    settings = {
        "prompts": QWEN3_PROMPTS,
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    stated = read_sentence_transformers(write(tmp_path, LAST_TOKEN, settings))
    assert stated == StatedPooling("embed", "last", True, "cosine", QWEN3_PROMPTS)


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [
        ({"pooling_mode": "lasttoken", "include_prompt": True}, "last"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({}, "mean"),
        ({"pooling_mode_lasttoken": True, "include_prompt": False}, "last"),
    ],
    ids=str,
)
def test_modes(pooling: dict[str, Any], mode: str, tmp_path: Path) -> None:
    stated = read_sentence_transformers(
        write(tmp_path, pooling, modules=("Transformer", "Pooling"))
    )
    assert stated is not None and (stated.mode, stated.normalize) == (mode, False)


def test_a_default_prompt_and_another_similarity(tmp_path: Path) -> None:
    settings = {
        "prompts": {"web": "w: "},
        "default_prompt_name": "web",
        "similarity_fn_name": "dot",
    }
    stated = read_sentence_transformers(write(tmp_path, settings=settings))
    assert stated is not None and (stated.similarity, stated.default_prompt) == ("dot", "web")


@pytest.mark.parametrize(
    ("config", "settings", "answers", "normalize"),
    [
        ({"true_token_id": 9, "false_token_id": 3}, {}, (9, 3), True),
        ({"true_token_id": 9, "false_token_id": None}, {"activation_fn": "a.Sigmoid"}, (9,), True),
        ({"true_token_id": 9}, {"activation_fn": "torch.nn.modules.linear.Identity"}, (9,), False),
    ],
)
def test_rerankers(
    config: dict[str, Any],
    settings: dict[str, Any],
    answers: tuple[int, ...],
    normalize: bool,
    tmp_path: Path,
) -> None:
    modules = ("Transformer", "LogitScore")
    stated = read_sentence_transformers(write(tmp_path, config, settings, modules))
    assert stated is not None and stated.task == "score"
    assert (stated.answers, stated.normalize) == (answers, normalize)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"pooling": {"pooling_mode": "cls"}}, "pooling_mode is 'cls'; expected one of lasttoken"),
        ({"pooling": {"pooling_mode": ["mean", "max"]}}, r"pooling_mode is \['mean', 'max'\]"),
        ({"pooling": {"pooling_mode_max_tokens": True}}, "pooling_mode_max_tokens is True"),
        ({"pooling": {"pooling_mode": "mean", "include_prompt": False}}, "include_prompt is False"),
        ({"modules": ("Transformer", "Pooling", "Dense")}, "a module Dense follows the model"),
        ({"settings": {"similarity_fn_name": "euclidean"}}, "similarity_fn_name is 'euclidean'"),
        ({"settings": {"default_prompt_name": "x"}}, "default_prompt_name is 'x'"),
        ({"sentence_bert_config": {"modality_config": {"message": {}}}}, "chat template"),
        ({"modules": ("Transformer", "LogitScore"), "pooling": {}}, "true_token_id is None"),
    ],
    ids=str,
)
def test_what_no_engine_computes(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_sentence_transformers(write(tmp_path, **files))


@pytest.mark.parametrize("place", ["../1_Pooling", "/etc"])
def test_a_folder_that_is_elsewhere(place: str, tmp_path: Path) -> None:
    modules = [{"path": place, "type": "a.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match="is no folder beside it"):
        read_sentence_transformers(tmp_path)


def test_an_engine_follows_from_these_files_too(tmp_path: Path) -> None:
    checkpoint = save_llama(tmp_path / "m", llama_tensors())
    assert open_checkpoint(checkpoint).pooling is None
    write(checkpoint, settings={})
    found = {str(file.relative_to(checkpoint)) for file in files_of(checkpoint)}
    assert found >= {"modules.json", "config_sentence_transformers.json", "1_Pooling/config.json"}
    assert open_checkpoint(checkpoint).pooling == StatedPooling("embed")


@pytest.mark.parametrize(
    "stated",
    [
        StatedPooling("embed", "mean", False, "dot", {"a": "b"}, "a"),
        StatedPooling("embed", prompts=QWEN3_PROMPTS),
        StatedPooling("score", similarity="dot", answers=(5, 6)),
        StatedPooling("score", normalize=False, similarity="dot", answers=(5,)),
    ],
    ids=str,
)
def test_what_is_written_is_read_again(stated: StatedPooling, tmp_path: Path) -> None:
    write_sentence_transformers(tmp_path, stated, 64)
    assert read_sentence_transformers(tmp_path) == stated


def test_a_checkpoint_that_is_written_anew_stays_what_it_was(tmp_path: Path) -> None:
    """As ``slipstream quantize`` and ``convert`` write it."""
    stated = StatedPooling("embed", "mean", prompts={"query": "q: "})
    checkpoint = replace(quantized_llama({}), pooling=stated)
    writer = DirectoryWriter(tmp_path, create_layout("compressed-tensors", {}), 1)
    writer.write(0, (checkpoint.tensor(name).load() for name in checkpoint.names()))
    writer.describe(checkpoint, kv_scales=False)
    assert open_checkpoint(tmp_path).pooling == stated


def test_a_class_without_a_head(tmp_path: Path) -> None:
    checkpoint = save_llama(tmp_path / "m", llama_tensors(), architectures=["LlamaModel"])
    assert open_checkpoint(checkpoint).pooling == StatedPooling("embed")
    assert find_architecture(["Qwen3Model"], None).name == "qwen3"
    with pytest.raises(CheckpointError, match="architecture BertModel is not supported"):
        find_architecture(["BertModel"], None)


def test_tokens_that_see_those_after_them_are_refused(tmp_path: Path) -> None:
    checkpoint = save_llama(tmp_path / "m", llama_tensors(), is_causal=False)
    with pytest.raises(CheckpointError, match="is_causal is False; expected true"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(("kind", "mode"), [(0, None), (1, "mean"), (3, "last")])
def test_gguf(kind: int, mode: str | None, tmp_path: Path) -> None:
    model = tiny()
    model.metadata["pooling_type"] = kind
    pooling = open_checkpoint(model.write(tmp_path / "m.gguf")).pooling
    assert (None if pooling is None else pooling.mode) == mode


def test_a_reranker_in_gguf_is_refused(tmp_path: Path) -> None:
    model = tiny()
    model.metadata["pooling_type"] = 4
    with pytest.raises(CheckpointError, match="pooling_type is 4; expected 0, 1 or 3"):
        plan(model.write(tmp_path / "m.gguf"), BuildOptions(target="cpu"))


@pytest.mark.parametrize(
    ("options", "task", "mode"),
    [
        ({}, "embed", "last"),
        ({"pooling": "mean"}, "embed", "mean"),
        ({"task": "embed"}, "embed", "last"),
        ({"task": "generate"}, None, None),
    ],
    ids=str,
)
def test_options_go_before_files(
    options: dict[str, Any], task: str | None, mode: str | None, tmp_path: Path
) -> None:
    checkpoint = write(save_llama(tmp_path / "m", llama_tensors()))
    planned = plan(checkpoint, BuildOptions(target="cpu", **options))
    pooling = planned.pooling
    assert (pooling and pooling.task, pooling and pooling.mode) == (task, mode)
    names = ["logits", "top_token", "top_logit"] if task is None else ["states"]
    assert [output.name for output in planned.graphs["target"].outputs] == names
    if pooling is not None:
        assert (pooling.dimensions, pooling.vocab_size) == (LLAMA["hidden_size"], 320)


def test_options_that_make_no_engine(tmp_path: Path) -> None:
    checkpoint = save_llama(tmp_path / "m", llama_tensors())
    with pytest.raises(BuildError, match="pooling is mean, but the checkpoint does not say"):
        plan(checkpoint, BuildOptions(target="cpu", pooling="mean"))
    with pytest.raises(BuildError, match="does not have both yes and no as tokens"):
        plan(checkpoint, BuildOptions(target="cpu", task="score"))
    write(checkpoint, {"true_token_id": 320}, modules=("Transformer", "LogitScore"))
    with pytest.raises(BuildError, match="tokens 320, and its vocabulary has 320"):
        plan(checkpoint, BuildOptions(target="cpu"))
    with pytest.raises(BuildError, match="pooling is last, but an engine for task score makes no"):
        BuildOptions(task="score", pooling="last")
