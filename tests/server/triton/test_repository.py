"""``slipstream triton-repo``, without a server."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from slipstream.errors import BuildError, InvalidRequestError
from slipstream.server.cli import slipstream
from slipstream.server.triton import repository, settings
from slipstream.server.triton.ensemble import ENSEMBLE_INPUTS, ENSEMBLE_OUTPUTS
from slipstream.server.triton.interface import INPUTS, OUTPUTS
from slipstream.server.triton.repository import Deployment, write_repository
from slipstream.server.triton.settings import Settings, read_settings


def run(*arguments: Any) -> Result:  # noqa: ANN401 - paths, numbers and texts
    return CliRunner().invoke(slipstream, ["triton-repo", *map(str, arguments)])


def test_a_repository_refers_to_its_engine(tiny_engine: Path, tmp_path: Path) -> None:
    output = tmp_path / "triton"
    result = run(tiny_engine, "-o", output, "--max-batch-size", 4, "--kv-cache-bytes", "2M")
    assert result.exit_code == 0, result.output
    files = {str(f.relative_to(output)) for f in output.rglob("*") if f.is_file()}
    assert files == {
        "models/engine/config.pbtxt",
        "models/engine/1/model.json",
        "backends/slipstream/model.py",
    }
    assert str(output / "models") in result.stdout
    assert json.loads((output / "models/engine/1/model.json").read_text()) == {
        "model": str(tiny_engine),
        "max_batch_size": 4,
        "kv_cache_bytes": 2 << 20,
    }
    config = (output / "models/engine/config.pbtxt").read_text()
    for line in (
        'backend: "slipstream"',
        "max_batch_size: 0",
        "decoupled: true",
        "kind: KIND_MODEL, count: 1",
        "latest { num_versions: 1 }",
    ):
        assert line in config
    assert len(config.splitlines()) < 10


def test_versions_stand_beside_each_other(tiny_engine: Path, tmp_path: Path) -> None:
    options = ("-o", tmp_path, "--name", "m", "--version-policy", "all", "--instances", 3)
    assert run(tiny_engine, *options).exit_code == 0
    assert run(tiny_engine, *options, "--version", 2, "--copy-engine").exit_code == 0
    model = tmp_path / "models" / "m"
    assert {path.name for path in model.iterdir()} == {"1", "2", "config.pbtxt"}
    assert "all { }" in (model / "config.pbtxt").read_text()
    assert "count: 3" in (model / "config.pbtxt").read_text()
    copied = read_settings(model / "2")
    assert copied == Settings(str(model / "2" / "engine"))
    for file in tiny_engine.iterdir():
        assert (Path(copied.model) / file.name).read_bytes() == file.read_bytes()


def test_a_version_that_stands_there_is_replaced(tiny_engine: Path, tmp_path: Path) -> None:
    write_repository(tmp_path, tiny_engine, Deployment("m", copy_engine=True), {})
    write_repository(tmp_path, tiny_engine, Deployment("m"), {"max_batch_size": 2})
    assert [path.name for path in (tmp_path / "models" / "m" / "1").iterdir()] == ["model.json"]


def test_an_engine_inside_the_version_is_not_lost(tiny_engine: Path, tmp_path: Path) -> None:
    written = write_repository(tmp_path, tiny_engine, Deployment("m", copy_engine=True), {})
    engine = written.model / "1" / "engine"
    with pytest.raises(InvalidRequestError, match="is to be replaced; move the engine"):
        write_repository(tmp_path, engine, Deployment("m"), {})
    assert (engine / "engine.json").is_file()


def test_an_ensemble_stands_beside_its_model(tiny_engine: Path, tmp_path: Path) -> None:
    options = ("-o", tmp_path, "--name", "m", "--ensemble")
    assert run(tiny_engine, *options).exit_code == 0
    ensemble = tmp_path / "models" / "ensemble"
    assert {path.name for path in ensemble.iterdir()} == {"1", "config.pbtxt"}
    config = (ensemble / "config.pbtxt").read_text()
    assert 'model_name: "m"' in config and "max_batch_size: 1" in config
    assert 'input_map { key: "random_seed" value: "seed" }' in config
    assert config.count("optional: true") == len(ENSEMBLE_INPUTS)
    assert run(tiny_engine, *options, "--version", 2).exit_code == 0
    before = config
    other = run(tiny_engine, "-o", tmp_path, "--name", "other", "--ensemble")
    assert other.exit_code == 1 and "belongs to another model" in other.stderr
    assert not (tmp_path / "models" / "other").exists()
    assert (ensemble / "config.pbtxt").read_text() == before


def test_what_the_ensemble_names_is_of_its_model_and_in_the_page() -> None:
    assert set(ENSEMBLE_INPUTS.values()) <= INPUTS.keys()
    assert set(ENSEMBLE_OUTPUTS) <= OUTPUTS.keys()
    page = (Path(__file__).parents[3] / "docs" / "triton.md").read_text(encoding="utf-8")
    for name in (*ENSEMBLE_INPUTS, *ENSEMBLE_OUTPUTS, *INPUTS, *OUTPUTS):
        assert f"`{name}`" in page, name


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--name", "../m"], 1, "cannot be a model's name; use letters"),
        (["--name", "a b"], 1, "cannot be a model's name"),
        (["--name", "ensemble", "--ensemble"], 1, "is the name of the ensemble itself"),
        (["--version", "0"], 2, "--version"),
        (["--instances", "0"], 2, "--instances"),
        (["--max-batch-size", "0"], 2, "--max-batch-size"),
    ],
)
def test_bad_usage(
    tiny_engine: Path, tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    result = run(tiny_engine, "-o", tmp_path / "out", *arguments)
    assert (result.exit_code, message in result.stderr) == (status, True), result.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_no_engine(tmp_path: Path) -> None:
    result = run(tmp_path / "nothing", "-o", tmp_path / "out")
    assert result.exit_code == 1 and "does not exist" in result.stderr


def test_instances_on_a_gpu_need_a_cache_size(tiny_engine: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    manifest = json.loads((tiny_engine / "engine.json").read_text())
    (engine / "engine.json").write_text(json.dumps({**manifest, "target": "cuda"}))
    plan = Deployment("m", instances=2)
    with pytest.raises(InvalidRequestError, match="say with --kv-cache-bytes"):
        write_repository(tmp_path, engine, plan, {})
    write_repository(tmp_path, engine, plan, {"kv_cache_bytes": 1 << 20})


def test_instances_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "usable_cores", lambda: 9)
    monkeypatch.setattr(settings, "gpu_capability", lambda: None)
    assert Settings("m").shared_among(1) == Settings("m")
    assert Settings("m").shared_among(4) == Settings("m", {"num_threads": 2})
    assert Settings("m").shared_among(20) == Settings("m", {"num_threads": 1})
    given = Settings("m", {"num_threads": 8})
    assert given.shared_among(4) == given


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "model.json cannot be read"),
        ("{", "model.json cannot be read"),
        ("[" * 200_000, "model.json cannot be read"),
        ("[]", "does not name its model"),
        ('{"max_batch_size": 4}', "does not name its model"),
        ('{"model": 5}', "does not name its model"),
    ],
)
def test_a_damaged_model_json_says_so(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "model.json").write_text(text)
    with pytest.raises(InvalidRequestError, match=re.escape(message)):
        read_settings(tmp_path)


def test_the_backend_is_the_file_of_the_package(tiny_engine: Path, tmp_path: Path) -> None:
    written = write_repository(tmp_path, tiny_engine, Deployment("m"), {})
    source = Path(repository.__file__).with_name("model.py")
    assert (written.backend / "model.py").read_bytes() == source.read_bytes()


def test_nothing_of_a_users_is_deleted(tiny_engine: Path, tmp_path: Path) -> None:
    written = write_repository(tmp_path, tiny_engine, Deployment("m", copy_engine=True), {})
    for place in (written.model / "1" / "engine", written.model / "1"):
        (place / "notes.txt").write_text("mine")
        with pytest.raises(BuildError, match="files that are not part of its version of a Triton"):
            write_repository(tmp_path, tiny_engine, Deployment("m"), {})
        (place / "notes.txt").unlink()
    (written.model / "config.pbtxt").write_text("# mine")
    with pytest.raises(InvalidRequestError, match="was not written by slipstream triton-repo"):
        write_repository(tmp_path, tiny_engine, Deployment("m", version=2), {})
    assert (written.model / "config.pbtxt").read_text() == "# mine"
    assert sorted(path.name for path in written.model.iterdir()) == ["1", "config.pbtxt"]


def test_options_that_triton_would_fail_on_are_refused(tiny_engine: Path, tmp_path: Path) -> None:
    for options in ({"max_seq_len": 1 << 20}, {"kv_cache_free_gpu_memory_fraction": 0.5}):
        with pytest.raises(InvalidRequestError, match=r"was built for|does nothing for"):
            write_repository(tmp_path / "new", tiny_engine, Deployment("m"), options)
    assert not (tmp_path / "new").exists()


def test_the_engine_of_a_checkpoint_is_copied(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = run(tiny_checkpoint, "-o", tmp_path / "triton", "--name", "m")
    assert result.exit_code == 0, result.output
    assert read_settings(tmp_path / "triton/models/m/1").model.startswith(str(tmp_path / "triton"))
