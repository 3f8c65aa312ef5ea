"""Shells complete what the parser knows; bash does it for real, since every test machine has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from slipstream.server.cli import slipstream

SRC = Path(__file__).parents[3] / "src"


def completed(*words: str) -> dict[str, str]:
    """What may stand for the last of these words, and what kind each is."""
    *arguments, incomplete = words
    complete = ShellComplete(slipstream, {}, "slipstream", "_SLIPSTREAM_COMPLETE")
    return {item.value: item.type for item in complete.get_completions(arguments, incomplete)}


def test_commands_come_from_the_table_without_being_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("slipstream.server.command.import_module", None)
    assert completed("") == dict.fromkeys(slipstream.table, "plain")
    assert completed("do") == {"doctor": "plain"}
    assert set(completed("--")) == {"--version", "--help"}


def test_options_choices_and_nested_commands_are_the_parsers() -> None:
    assert {"--quantization", "--max-seq-len", "--estimate"} <= completed("build", "--").keys()
    assert completed("build", "--quantization", "int") == {"int8_wo": "plain", "int4_wo": "plain"}
    assert completed("bench", "la") == {"latency": "plain"}
    assert completed("completion", "") == dict.fromkeys(("bash", "zsh", "fish"), "plain")


@pytest.mark.parametrize(
    "words", [("serve",), ("build",), ("eval",), ("inspect",), ("build", "checkpoint", "-o")]
)
def test_what_may_be_a_path_is_left_to_the_shell(words: tuple[str, ...]) -> None:
    assert completed(*words, "engi") == {"engi": "file"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_for_all_three_programs(shell: str) -> None:
    result = CliRunner().invoke(slipstream, ["completion", shell])
    assert result.exit_code == 0
    for variable in ("_SLIPSTREAM_COMPLETE", "_SLIPSTREAM_BUILD_COMPLETE"):
        assert f"{variable}={shell}_complete" in result.stdout
    for program in ("slipstream", "slipstream-build", "slipstream-quantize"):
        assert f" {program}" in result.stdout


def test_another_shell_lists_those_there_are() -> None:
    result = CliRunner().invoke(slipstream, ["completion", "tcsh"])
    assert result.exit_code == 2 and "'bash', 'zsh', 'fish'" in result.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes(tmp_path: Path) -> None:
    for name, main in (("slipstream", "main"), ("slipstream-build", "build_main")):
        program = tmp_path / name
        program.write_text(
            f"#!{sys.executable}\nfrom slipstream.server.cli import {main}\n{main}()\n"
        )
        program.chmod(0o755)
    script = """
eval "$(slipstream completion bash)"
COMP_WORDS=(slipstream do) COMP_CWORD=1
_slipstream_completion slipstream && echo "${COMPREPLY[@]}"
COMPREPLY=() COMP_WORDS=(slipstream-build --quantization fp) COMP_CWORD=2
_slipstream_build_completion slipstream-build && echo "${COMPREPLY[@]}"
complete -p slipstream
"""
    path = os.pathsep.join((str(tmp_path), os.environ["PATH"]))
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(SRC)},
    )
    command, value, registered = done.stdout.splitlines()
    assert (command, value) == ("doctor", "fp8"), done.stderr
    assert registered.endswith("-F _slipstream_completion slipstream")
