from __future__ import annotations

import dataclasses
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from slipstream import __version__
from slipstream.builder.options import BuildOptions
from slipstream.errors import BuildError
from slipstream.runtime.config import RuntimeConfig
from slipstream.server.cli import slipstream
from slipstream.server.command import Command, LazyGroup
from slipstream.server.commands.build import build
from slipstream.server.option_tables import RUNTIME, SAMPLING, size
from slipstream.server.options import sampling_options

HEAVY = {"numpy", "onnx", "onnxruntime", "onnx_ir", "rich", "tokenizers", "jinja2", "gguf"}
RUNNING = ("generate", "chat", "bench latency", "bench throughput")


def commands(group: LazyGroup = slipstream, prefix: str = "") -> Iterator[tuple[str, Command]]:
    for name in group.table:
        command = group.get_command(click.Context(group), name)
        if isinstance(command, LazyGroup):
            yield from commands(command, f"{prefix}{name} ")
        else:
            assert isinstance(command, Command)
            yield f"{prefix}{name}", command


def help_of(command: str) -> str:
    result = CliRunner().invoke(slipstream, [*command.split(), "--help"], terminal_width=300)
    assert result.exit_code == 0
    return result.output


def test_help_lists_the_commands_with_their_own_first_lines() -> None:
    text = help_of("")
    for name, (_, line) in slipstream.table.items():
        assert f"  {name} " in text and line in text
    for name, command in commands():
        group, _, last = name.rpartition(" ")
        table = slipstream.table
        if group:
            nested = slipstream.get_command(click.Context(slipstream), group)
            assert isinstance(nested, LazyGroup)
            table = nested.table
        assert command.help and table[last][1][:-1] in help_of(group), name


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_every_help_names_its_options_and_gives_an_example(name: str) -> None:
    text = help_of(name)
    command = dict(commands())[name]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            for flag in [*parameter.opts, *parameter.secondary_opts]:
                assert flag in text
            assert parameter.help
    assert f"slipstream {name} " in text.partition("Example")[2].partition("Options")[0]
    assert "--verbose" in text and "--debug" in text


def test_build_has_an_option_for_every_field_with_its_default() -> None:
    text = help_of("build")
    for field in dataclasses.fields(BuildOptions):
        assert f"--{field.name.replace('_', '-')}" in text
        if isinstance(field.default, str | int) and not isinstance(field.default, bool):
            assert f"[default: {field.default}]" in text
    assert "[none|int8_wo|int4_wo|fp8]" in text and "--asymmetric" in text


@pytest.mark.parametrize("name", RUNNING)
def test_commands_that_run_a_model_take_the_runtime_options(name: str) -> None:
    text = help_of(name)
    # The engine alone decides the page size, and only workers of Dynamo hand prompts over.
    assert {field.name for field in dataclasses.fields(RuntimeConfig)} - set(RUNTIME) == {
        "page_size",
        "kv_transfer_gib",
    }
    for field in RUNTIME:
        watched = name == "chat" or field != "step_timeout"
        assert (f"--{field.replace('_', '-')}" in text) == watched


def test_generate_takes_vllms_sampling_options() -> None:
    text = help_of("generate")
    for name in ("temperature", "top-p", "top-k", "min-p", "max-tokens", "seed", "stop", "n"):
        assert f"--{name} " in text
    assert "--no-ignore-eos" in text


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from slipstream.server.cli import slipstream\n"
        "for arguments in ([], ['build'], ['generate'], ['chat'], ['bench', 'latency']):\n"
        "    slipstream.main([*arguments, '--help'], standalone_mode=False)\n"
        "print('LOADED', *{name.partition('.')[0] for name in sys.modules})\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = output.stdout.rpartition("LOADED")[2].split()
    assert "click" in loaded and not HEAVY & set(loaded)


def test_version() -> None:
    result = CliRunner().invoke(slipstream, ["--version"])
    assert result.output == f"slipstream, version {__version__}\n"


def test_an_unknown_command_is_bad_usage() -> None:
    result = CliRunner().invoke(slipstream, ["compile"])
    assert result.exit_code == 2 and "compile" in result.stderr


def test_slipstream_build_is_the_build_command() -> None:
    code = "from slipstream.server.cli import build_main; build_main()"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: slipstream-build [OPTIONS] CHECKPOINT")
    assert build.get_short_help_str() == slipstream.table["build"][1]


def failing(error: BaseException) -> Command:
    @click.command(cls=Command)
    def fail() -> None:
        raise error

    assert isinstance(fail, Command)
    return fail


def test_an_error_is_one_line_and_status_1() -> None:
    result = CliRunner().invoke(failing(BuildError("the sky is green; paint it blue")))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: the sky is green; paint it blue\n"


def test_names_from_files_are_printed_escaped() -> None:
    name = "weight\x1b]0;owned\x07\nerror: run me"
    result = CliRunner().invoke(failing(BuildError(f"{name} is unknown")))
    assert result.stderr == "error: weight\\x1b]0;owned\\x07\\nerror: run me is unknown\n"

    @click.command(cls=Command)
    def warn() -> None:
        logging.getLogger("slipstream.builder").warning("%s is dropped", name)

    result = CliRunner().invoke(warn)
    assert "\x1b" not in result.stderr and "weight\\x1b]0;" in result.stderr


def test_debug_shows_the_traceback() -> None:
    result = CliRunner().invoke(failing(BuildError("no")), ["--debug"])
    assert isinstance(result.exception, BuildError)


def test_ctrl_c_is_status_130_without_a_traceback() -> None:
    result = CliRunner().invoke(failing(KeyboardInterrupt()))
    assert (result.exit_code, result.output) == (130, "\n")


@pytest.mark.parametrize(
    ("text", "count"),
    [("512M", 512 << 20), ("2G", 2 << 30), ("1.5GiB", 3 << 29), ("7k", 7168), ("1000", 1000)],
)
def test_sizes(text: str, count: int) -> None:
    assert size(text) == count


@pytest.mark.parametrize("text", ["", "G", "-1", "2X", "1e9"])
def test_what_is_no_size_is_bad_usage(text: str) -> None:
    with pytest.raises(click.BadParameter, match="512M"):
        size(text)


def parse_sampling(*arguments: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    @click.command()
    @sampling_options(*SAMPLING)
    def command(sampling: dict[str, Any]) -> None:
        seen.update(sampling)

    result = CliRunner().invoke(command, list(arguments))
    if result.exit_code:
        raise click.UsageError(result.stderr)
    return seen


def test_only_what_is_given_overrides_the_models_sampling() -> None:
    assert parse_sampling() == {}
    assert parse_sampling("--temperature", "0", "--no-ignore-eos") == {
        "temperature": 0.0,
        "ignore_eos": False,
    }
    assert parse_sampling("--stop", "a", "--stop", "b", "--stop-token-id", "3") == {
        "stop": ("a", "b"),
        "stop_token_ids": (3,),
    }


def test_impossible_sampling_is_bad_usage_with_the_engines_own_words() -> None:
    with pytest.raises(click.UsageError, match=r"top_p=1\.5 is not a number in \[0, 1\]"):
        parse_sampling("--top-p", "1.5")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["generate", "engine", "-5 degrees"], "'-5 degrees'"),
        (["generate", "engine", "--Hello? Who is there"], "'--Hello? Who is there'"),
        (["bench", "latency", "-engine"], "-engine"),
        (["chat", "-model-"], "-model-"),
    ],
)
def test_a_text_that_looks_like_an_option_gets_a_hint(arguments: list[str], word: str) -> None:
    result = CliRunner().invoke(slipstream, arguments)
    assert result.exit_code == 2
    assert f"To pass {word} as " in " ".join(result.stderr.split())
    assert "put -- before it" in " ".join(result.stderr.split())
    hinted = CliRunner().invoke(slipstream, [*arguments[:-1], "--", arguments[-1]])
    assert hinted.exit_code == 1 and "No such option" not in hinted.stderr


def test_a_misspelt_option_gets_the_right_one() -> None:
    result = CliRunner().invoke(slipstream, ["generate", "engine", "hi", "--temperatur", "0"])
    assert result.exit_code == 2 and "--temperature" in result.stderr
    assert "put --" not in result.stderr


WRITING = """
import signal, sys; from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have said nohup
from slipstream.server.command import Command
from slipstream.builder.output import scratch
import click

@click.command(cls=Command)
@click.argument("output")
def write(output):
    with scratch(Path(output)) as made:
        (made / "half").write_text("")
        print("writing", flush=True)
        sys.stdin.read()

write()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITING, str(tmp_path / "engine")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    assert list(tmp_path.iterdir()) == [tmp_path / ".engine.making"]
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    process.communicate()
    assert list(tmp_path.iterdir()) == []
