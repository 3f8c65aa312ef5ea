"""What the commands say of, and refuse to, an engine that generates nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from slipstream.builder.engine import open_engine
from slipstream.server.cli import slipstream

REFUSED = "this engine makes vectors of texts and has no logits (it was built for task embed)"


def run(*arguments: Any, text: str = "") -> Result:  # noqa: ANN401 - paths and texts
    return CliRunner().invoke(slipstream, [*map(str, arguments)], input=text)


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pooling") / "engine"
    result = run("build", tiny_checkpoint, "-o", path, "--task", "embed", "--target", "cpu")
    assert result.exit_code == 0, result.output
    assert f"next: slipstream serve {path}" in result.output
    return path


def test_it_says_what_it_is_for(engine: Path, tiny_engine: Path, tiny_checkpoint: Path) -> None:
    vectors = "embed: vectors of 64 numbers, of length 1, by the last token"
    assert vectors in " ".join(run("inspect", engine, "--verify").output.split())
    assert "task generate: text" in " ".join(run("inspect", tiny_engine).output.split())
    options = ("--task", "embed", "--pooling", "mean", "--estimate")
    estimated = " ".join(run("build", tiny_checkpoint, *options).output.split())
    assert "task embed: vectors of 64 numbers, of length 1, by the mean of all tokens" in estimated
    assert "--task embed" in open_engine(engine).manifest.command


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "ENGINE", "a"),
        ("chat", "ENGINE"),
        ("eval", "ENGINE"),
        ("triton-repo", "ENGINE", "-o", "OUTPUT"),
        ("bench", "latency", "ENGINE"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_that_need_text(arguments: tuple[str, ...], engine: Path, tmp_path: Path) -> None:
    places = {"ENGINE": engine, "OUTPUT": tmp_path / "triton"}
    result = run(*(places.get(argument, argument) for argument in arguments), text="a\n")
    assert result.exit_code == 1
    assert REFUSED in " ".join(result.output.split())
    assert not (tmp_path / "triton").exists()
