"""open_checkpoint: which reader gets what, and the hub."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.builder.checkpoints.gguf.models import tiny

from slipstream.builder.checkpoints import open_checkpoint
from slipstream.errors import CheckpointError, MissingDependencyError


class FakeHub(ModuleType):
    """huggingface_hub with one function, which answers with a directory or an error."""

    def __init__(self, answer: Path | Exception) -> None:
        super().__init__("huggingface_hub")
        self.answer = answer
        self.asked: list[Any] = []

    def snapshot_download(
        self, name: str, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        self.asked += [name, allow_patterns, ignore_patterns]
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


@pytest.fixture(name="directory")
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with nothing in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "missing",
    ["no/such/directory", "./model", "/no/model", "model.gguf", "a/model.gguf", "~/m", ""],
)
def test_a_path_that_does_not_exist_is_no_hub_id(directory: Path, missing: str) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist|has no config\.json"):
        open_checkpoint(missing)


def test_a_file_of_another_kind_is_refused(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")

    with pytest.raises(CheckpointError, match="pass the directory that holds the checkpoint"):
        open_checkpoint(directory / "model.safetensors")


@pytest.mark.parametrize("name", ["M.GGUF", "sha256-0123abcd", "model.bin"])
def test_a_gguf_file_is_known_by_its_first_bytes(directory: Path, name: str) -> None:
    tiny().write(directory / name)
    assert open_checkpoint(directory / name).config.architecture == "llama"


def test_a_directory_of_gguf_files_names_them(directory: Path) -> None:
    (directory / "tiny.Q4_0.gguf").write_bytes(b"")

    with pytest.raises(CheckpointError, match=r"pass one of its files: tiny\.Q4_0\.gguf"):
        open_checkpoint(directory)


WANTED = (
    *("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"),
    *("model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors"),
    *("hf_quant_config.json", "quant-00001.safetensors"),
)
UNWANTED = (
    *(
        "original/params.json",
        "original/model.safetensors",
        "onnx/config.json",
        "1/2/a.safetensors",
    ),
    *("consolidated.safetensors", "consolidated.00.pth", "consolidated.safetensors.index.json"),
    *("adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "README.md"),
)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "gpt2"])
def test_of_a_hub_id_only_what_is_read_is_downloaded(
    directory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from huggingface_hub.utils._paths import filter_repo_objects

    hub = FakeHub(directory)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)

    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(name)
    asked, wanted, others = hub.asked
    found = filter_repo_objects([*WANTED, *UNWANTED], allow_patterns=wanted, ignore_patterns=others)
    assert asked == name and tuple(found) == WANTED


@pytest.mark.parametrize("error", [ConnectionError("offline\nlong story"), ValueError("bad id")])
def test_an_unreachable_hub_is_one_sentence(
    directory: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub(error))

    with pytest.raises(CheckpointError, match=r"could not be fetched .*\((offline|bad id)\)") as e:
        open_checkpoint("Qwen/Qwen3-0.6B")
    assert "\n" not in str(e.value)


def test_the_real_client_reports_being_offline_as_we_expect(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory))

    with pytest.raises(CheckpointError, match="could not be fetched from the Hugging Face hub"):
        open_checkpoint("slipstream-tests/no-such-model")


def test_without_the_client_the_pip_command_is_named(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)

    with pytest.raises(MissingDependencyError, match="pip install huggingface_hub"):
        open_checkpoint("Qwen/Qwen3-0.6B")
