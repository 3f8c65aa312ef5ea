from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pexpect
import pytest
from click.testing import CliRunner, Result

from slipstream.runtime import testing
from slipstream.runtime.llm import LLM
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.testing import counting_engine
from slipstream.server import text
from slipstream.server.cli import slipstream
from slipstream.server.commands import generate as module

# The counting model, which says one token and no more until standard input ends.
GATED = """
import sys
from slipstream.runtime.testing import counting_engine
import slipstream.server.commands.generate as module
from slipstream.server.cli import main
engine = counting_engine()
land = engine.executor.land
def gated(step):
    if engine.executor.steps == 2:
        sys.stdout.write("|")  # what is told from here on finds it waiting
        sys.stdout.flush()
        sys.stdin.read()
    land(step)
engine.executor.land = gated
module.load_model = lambda model, runtime: engine
main()
"""


def run(*arguments: Any, stdin: str | None = None) -> Result:  # noqa: ANN401 - paths and texts
    return CliRunner().invoke(slipstream, ["generate", *map(str, arguments)], input=stdin)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """``generate`` on the counting model, which continues "abc" with "defg"."""
    monkeypatch.setattr(module, "load_model", lambda model, runtime: counting_engine())


def test_an_engine_answers_as_the_library_does(tiny_engine: Path) -> None:
    result = run(tiny_engine, "the cat", "--temperature", 0, "--max-tokens", 12)
    with LLM(tiny_engine) as llm:
        messages = [{"role": "user", "content": "the cat"}]
        (expected,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=12))
    assert result.exit_code == 0, result.output
    assert result.stdout == expected.outputs[0].text + "\n"
    assert result.stderr == ""


def test_a_checkpoint_is_compiled_once(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = [tiny_checkpoint, "the cat", "--temperature", 0, "--max-tokens", 3]
    first, second = run(*arguments), run(*arguments)
    assert first.exit_code == 0, first.output
    assert f"compiling {tiny_checkpoint} for this machine" in first.stderr
    assert (second.stdout, second.stderr) == (first.stdout, "")
    assert len(list(tmp_path.glob("slipstream/engines/*"))) == 1


@pytest.mark.usefixtures("counting")
def test_raw_continues_and_chat_answers() -> None:
    assert run("m", "abc", "--raw", "--max-tokens", 4).stdout == "defg\n"
    template = run("m", "abc", "--max-tokens", 4).stdout
    assert template == run("m", "abc", "--chat", "--max-tokens", 4).stdout == ";!?-\n"


@pytest.mark.usefixtures("counting")
def test_the_prompt_may_come_from_standard_input() -> None:
    assert run("m", "--raw", "--max-tokens", 3, stdin="xyz\n").stdout == "ABC\n"


@pytest.mark.usefixtures("counting")
def test_stop_strings_and_runtime_defaults_of_the_model() -> None:
    assert run("m", "abc", "--raw", "--stop", "fg", "--stop", "zzz").stdout == "de\n"
    assert len(run("m", "abc", "--raw").stdout) == 17  # its generation defaults say 16 tokens


@pytest.mark.usefixtures("counting")
def test_several_answers_come_with_headings() -> None:
    result = run("m", "abc", "--raw", "--max-tokens", 2, "--n", 2)
    assert result.stdout == "=== 1 of 2 ===\nde\n=== 2 of 2 ===\nde\n"


@pytest.mark.usefixtures("counting")
def test_json_holds_texts_reasons_and_usage() -> None:
    result = run("m", "abc", "--raw", "--max-tokens", 2, "--n", 2, "--json", "--logprobs", 1)
    report = json.loads(result.stdout)
    assert [choice["text"] for choice in report["choices"]] == ["de", "de"]
    assert {choice["finish_reason"] for choice in report["choices"]} == {"length"}
    assert (report["sampling"]["temperature"], report["sampling"]["n"]) == (0, 2)
    assert report["usage"] == {
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "completion_tokens": 4,
        "total_tokens": 7,
    }
    assert 0 <= report["timing"]["time_to_first_token"] <= report["timing"]["total_time"]
    first = report["choices"][0]["logprobs"][0]
    assert (first["token"], first["token_id"], first["rank"]) == ("d", 3, 1)
    assert first["top"][0]["token"] == "d"


@pytest.mark.usefixtures("counting")
def test_a_stop_string_is_the_reason() -> None:
    report = json.loads(run("m", "abc", "--raw", "--stop", "f", "--json").stdout)
    (choice,) = report["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("de", "stop", "f")


@pytest.mark.usefixtures("counting")
def test_stats_go_to_stderr() -> None:
    result = run("m", "abc", "--raw", "--max-tokens", 4, "--stats")
    assert result.stdout == "defg\n"
    assert re.fullmatch(
        r"temperature 0.0\nprompt 3 tokens \(0 cached\), answer 4 tokens, "
        r"first after \d+ ms, then [\d.]+ tokens/s\n",
        result.stderr,
    )


def test_where_nobody_says_how_it_samples_as_users_of_local_engines_expect(
    tiny_engine: Path,
) -> None:
    result = run(tiny_engine, "the cat", "--max-tokens", 1, "--stats")
    assert result.stderr.startswith("temperature 0.7, top_p 0.95, min_p 0.05\n")
    result = run(
        tiny_engine, "the cat", "--max-tokens", 1, "--stats", "--temperature", 1, "--seed", 3
    )
    assert result.stderr.startswith("temperature 1.0, top_p 0.95, min_p 0.05, seed 3\n")
    assert "[default: the model's, or 0.7]" in " ".join(run("--help").stdout.split())


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize(
    ("arguments", "written", "shown"),
    [
        ([], "\x1b](\x9b\x7f\x07\n", r"\x1b](\x9b\x7f\x07"),
        (["--n", 2], "=\n\x1b](\x9b\x7f\x07\n", r"\x1b](\x9b\x7f\x07"),
        (["--json"], '"\\u001b](\x9b\x7f\\u0007"', r'"\u001b](\x9b\x7f\u0007"'),
    ],
)
def test_a_terminal_gets_no_control_sequences_and_a_pipe_the_text_as_it_is(
    arguments: list[Any], written: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        testing, "ALPHABET", testing.ALPHABET.replace("defghi", "\x1b](\x9b\x7f\x07")
    )
    command = ["m", "abc", "--raw", "--max-tokens", 6, *arguments]
    assert written in run(*command).stdout
    monkeypatch.setattr(text, "sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))
    assert shown in run(*command).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature=-1.0 is not a number in [0, 1000]"),
        (["--max-tokens", "many"], "--max-tokens"),
        (["--kv-cache-bytes", "2X"], "is not a size"),
        (["--scheduler-policy", "lottery"], "lottery"),
        (["--logprobs", "2"], "--logprobs needs --json"),
    ],
)
def test_bad_usage(arguments: list[str], message: str) -> None:
    result = run("no-such-model", "hi", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr and result.stdout == ""


def test_without_a_model_the_usage_is_shown() -> None:
    result = run()
    assert result.exit_code == 2 and "MODEL" in result.stderr


def assert_one_error(result: Result, message: str) -> None:
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_a_missing_model(tmp_path: Path) -> None:
    assert_one_error(run(tmp_path / "engine.d", "hi"), "does not exist")


def test_a_changed_byte_names_the_file_and_the_remedy(tiny_engine: Path, tmp_path: Path) -> None:
    for file in tiny_engine.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = bytearray((tmp_path / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "weights.safetensors").write_bytes(weights)
    assert_one_error(run(tmp_path, "hi"), "weights.safetensors")


def test_an_engine_of_another_format(tiny_engine: Path, tmp_path: Path) -> None:
    manifest = json.loads((tiny_engine / "engine.json").read_text())
    (tmp_path / "engine.json").write_text(json.dumps({**manifest, "format_version": 99}))
    assert_one_error(run(tmp_path, "hi"), "build it again: slipstream build")


def test_limits_beyond_the_engines(tiny_engine: Path) -> None:
    assert_one_error(run(tiny_engine, "hi", "--max-seq-len", 100000), "max_seq_len is 100000")


def test_a_prompt_that_is_too_long(tiny_engine: Path) -> None:
    assert_one_error(run(tiny_engine, "cat " * 2000), "Shorten the prompt")


def test_a_real_terminal_gets_no_control_sequences_and_how_it_was_sampled() -> None:
    escape = "t.ALPHABET = t.ALPHABET.replace('b', chr(27))"
    program = f"import slipstream.runtime.testing as t\n{escape}\n{GATED}"
    command = ["-c", program, "generate", "m", "--raw", "a", "--max-tokens", "1", "--seed", "1"]
    child = pexpect.spawn(sys.executable, command, encoding="utf-8", timeout=120)
    shown = child.read()
    assert "temperature 0.0\x1b[0m\r\n" in shown
    assert shown.endswith("\\x1b\r\n")


def gated(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", GATED, "generate", "m", "--raw", "a", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, stdin=pipe, text=True)


def test_text_comes_as_it_is_made() -> None:
    process = gated("--max-tokens", "60")
    assert process.stdout is not None
    assert process.stdout.read(2) == "b|"
    assert process.poll() is None
    assert len(process.communicate(timeout=120)[0]) == 60


def test_ctrl_c_ends_quietly() -> None:
    process = gated("--max-tokens", "200", "--ignore-eos")
    assert process.stdout is not None
    assert process.stdout.read(2) == "b|"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors.strip()) == (130, "")


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    process = gated("--max-tokens", "200", "--ignore-eos")
    assert process.stdin and process.stdout and process.stderr
    assert process.stdout.read(2) == "b|"
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=120) == 1
