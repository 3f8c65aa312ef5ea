"""``slipstream chat`` over plain streams, in process, and on a terminal of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from click.testing import CliRunner, Result
from tests.server.openai.marked import MarkedDialect

from slipstream.runtime.chat import composer
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.testing import counting_engine
from slipstream.server.cli import slipstream
from slipstream.server.commands import chat as module

# The counting model, which answers for ten minutes unless it is interrupted.
MAX_TOKENS = 30_000
ENDLESS = """
from slipstream.runtime.testing import counting_engine
import slipstream.server.commands.chat as module
from slipstream.server.cli import main
module.load_model = lambda model, runtime: counting_engine(2**13, delay=0.02, max_seq_len=2**15)
main()
"""


def run(lines: str, *arguments: Any) -> Result:  # noqa: ANN401 - paths and texts
    return CliRunner().invoke(slipstream, ["chat", *map(str, arguments)], input=lines)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """``chat`` on the counting model, which answers ";!?-..." to everything."""
    monkeypatch.setattr(module, "load_model", lambda model, runtime: counting_engine())


def test_an_engine_chats(tiny_engine: Path) -> None:
    result = run("the cat\n/stats\n", tiny_engine, "--max-tokens", 5, "--ignore-eos")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("\n") and len(result.stdout) > 1
    assert "answer 5 tokens" in result.stderr and "of 512 tokens" in result.stderr


@pytest.mark.usefixtures("counting")
def test_answers_are_alone_on_standard_output() -> None:
    result = run("hi\n\nagain\n", "m", "--max-tokens", 3)
    assert (result.exit_code, result.stdout) == (0, ";!?\n;!?\n")


def test_it_says_how_it_samples(tiny_engine: Path) -> None:
    assert "temperature 0.7, top_p 0.95, min_p 0.05\n" in run("", tiny_engine).stderr
    assert (
        "temperature 0.2, top_p 0.95, min_p 0.05\n"
        in run("", tiny_engine, "--temperature", 0.2).stderr
    )


@pytest.mark.usefixtures("counting")
def test_the_conversation_is_remembered_saved_and_reset(tmp_path: Path) -> None:
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    lines = f'hi\n"""two\nlines"""\n/save {first}\n/reset\n/save {second}\n'
    result = run(lines, "m", "--max-tokens", 2, "--system", "be brief")
    assert result.exit_code == 0, result.output
    assert [(m["role"], m["content"]) for m in json.loads(first.read_text())] == [
        ("system", "be brief"),
        ("user", "hi"),
        ("assistant", ";!"),
        ("user", "two\nlines"),
        ("assistant", ";!"),
    ]
    assert [m["role"] for m in json.loads(second.read_text())] == ["system"]


@pytest.mark.usefixtures("counting")
def test_settings_change_the_answers() -> None:
    lines = '/set max_tokens=2\nhi\n/set stop=["?"]\n/set max-tokens=9\nhi\n/set stop=-\nhi\n/set\n'
    result = run(lines, "m")
    assert result.stdout == ";!\n;!\n;!?\n"
    assert "max_tokens = 9" in result.stderr and "temperature = 0.0" in result.stderr


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temperature=-1", "error: temperature=-1 is not a number in [0, 1000]"),
        ("/set temperature=hot", "error: temperature='hot' is not a number in [0, 1000]"),
        ("/set temperature", "error: /set temperature has no value"),
        ("/set colour=1", "error: there is no setting colour"),
        ("/set n=2", "error: there is no setting n"),
        ("/dance", "error: there is no /dance; /help lists the commands"),
        ("/json yes", "error: /json yes is neither on nor off; write /json on"),
        ("/think 3", "error: /think 3 is neither on nor off"),
        ("/tools /no/such/file", "error: /no/such/file cannot be read"),
        ("/save", "error: /save needs the name of a file"),
        ("/save /no/such/directory/f", "cannot be written"),
        ("x" * 300, "Shorten the prompt"),
    ],
)
def test_a_mistake_is_one_line_and_the_chat_goes_on(line: str, message: str) -> None:
    result = run(f"{line}\nhi\n", "m", "--max-tokens", 3)
    assert (result.exit_code, result.stdout) == (0, ";!?\n")
    assert message in result.stderr


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> MarkedDialect:
    """The dialect of the counting model: thoughts after ";", an answer after "?"."""
    dialect = MarkedDialect(";?xyz")
    monkeypatch.setattr(composer, "dialect_of", lambda tokenizer: dialect)
    return dialect


@pytest.mark.usefixtures("counting")
def test_thoughts_are_apart_from_the_answer_and_forgotten(
    marked: MarkedDialect, tmp_path: Path
) -> None:
    file = tmp_path / "chat.json"
    result = run(f"hi\n/save {file}\n", "m", "--max-tokens", 5)
    assert result.stdout == "-_\n"
    assert "\n!\n" in result.stderr
    assert json.loads(file.read_text())[-1] == {"role": "assistant", "content": "-_"}


@pytest.mark.usefixtures("counting")
def test_answers_can_be_held_to_json_and_thinking_chosen(marked: MarkedDialect) -> None:
    lines = "/json\n/think\n/json on\n/think off\nhi\n"
    result = run(lines, "m")
    told = [line for line in result.stderr.splitlines() if line.startswith(("answers", "think"))]
    assert told == [
        "answers in JSON: off", "thinking: as the model likes", "answers in JSON: on",
        "thinking: off",
    ]  # fmt: skip
    assert marked.asked is not None
    options, wanted, _ = marked.asked
    assert options.thinking is False and wanted == StructuredOutput(json_object=True)
    run(lines + "/json off\n/think on\nhi\n", "m")
    assert marked.asked[0].thinking is True and marked.asked[1] is None


@pytest.mark.usefixtures("counting")
def test_a_call_is_shown_and_the_next_message_answers_it(
    marked: MarkedDialect, tmp_path: Path
) -> None:
    marked.marks = "yz;x!"
    tools, file = tmp_path / "tools.json", tmp_path / "chat.json"
    tools.write_text('[{"type": "function", "function": {"name": "f"}}]')
    result = run(f"/tools {tools}\nhi\nsunny\n/save {file}\n/tools off\n", "m", "--max-tokens", 5)
    assert result.stdout == "\n(?-_)\n" * 2
    assert "may call: f\n" in result.stderr and "may call: none\n" in result.stderr
    assert "your next message is what the function returns" in result.stderr
    messages = json.loads(file.read_text())
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"][0]["function"] == {"name": "", "arguments": "?-_"}
    assert messages[2] == {"role": "tool", "tool_call_id": "call_0", "content": "sunny"}


@pytest.mark.usefixtures("counting")
def test_system_and_help_and_exit() -> None:
    result = run("/system\n/system be kind\n/system\n/help\n/stats\n/exit\nhi\n", "m")
    assert result.stdout == ""
    assert result.stderr.count("system prompt: be kind") == 2
    assert "system prompt: none" in result.stderr and "no answer yet" in result.stderr
    names = ("/help", "/reset", "/system", "/set", "/think", "/json", "/tools", "/stats", "/save")
    for name in (*names, "/exit", "Ctrl-C"):
        assert name in result.stderr


@pytest.mark.usefixtures("counting")
def test_the_oldest_turns_make_room_with_a_notice() -> None:
    # Each turn takes about 60 of the model's 256 tokens.
    result = run("x" * 50 + "\n" + ("y" * 50 + "\n") * 4, "m", "--max-tokens", 4)
    assert result.exit_code == 0 and result.stdout.count("\n") == 5
    assert "the oldest turn was dropped: the model reads 256 tokens" in result.stderr


def test_a_model_without_a_template_is_refused_at_once_and_the_remedy_works(
    tiny_engine: Path, tmp_path: Path
) -> None:
    from slipstream.builder.build import build
    from slipstream.builder.options import BuildOptions

    checkpoint = tmp_path / "base"
    checkpoint.mkdir()
    source = Path(json.loads((tiny_engine / "engine.json").read_text())["source"])
    for file in source.iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    (checkpoint / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    build(checkpoint, tmp_path / "engine", BuildOptions())
    result = run("hi\n", tmp_path / "engine")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: this model has no default chat template")

    assert "--chat-template FILE" in result.stderr
    (tmp_path / "mine.jinja").write_text("{{ messages[-1].content }}")
    options = ("--chat-template", tmp_path / "mine.jinja", "--max-tokens", 2)
    assert run("hi\n", tmp_path / "engine", *options).exit_code == 0


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Any]:
    """A chat with the endless counting model on a terminal."""
    child = pexpect.spawn(
        sys.executable,
        ["-c", ENDLESS, "chat", "m", "--max-tokens", str(MAX_TOKENS), "--ignore-eos"],
        env={"XDG_STATE_HOME": str(tmp_path), "TERM": "dumb", "PATH": "/usr/bin:/bin", **_python()},
        encoding="utf-8",
        timeout=120,
        dimensions=(24, 400),
    )
    child.expect_exact(">>> ")
    yield child
    child.close(force=True)


def _python() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}


def press(terminal: Any, key: Callable[[], None], seen: Any) -> None:  # noqa: ANN401
    """A key at the prompt, again until what it does is seen: one that comes between the prompt and
    ``readline``'s wait for a key is lost, and Ctrl-C throws away the keys before it."""
    key()
    while terminal.expect([seen, pexpect.TIMEOUT], timeout=5):
        key()


def test_ctrl_c_stops_the_answer_and_ctrl_d_the_chat(terminal: Any, tmp_path: Path) -> None:  # noqa: ANN401
    terminal.sendline("hello")
    terminal.expect_exact(";!?-")
    terminal.sendintr()
    terminal.expect_exact("stopped")
    terminal.expect_exact(">>> ")
    terminal.sendline("/stats")
    terminal.expect(r"answer (\d+) tokens")
    assert 4 <= int(terminal.match[1]) < MAX_TOKENS
    terminal.expect_exact(">>> ")
    press(terminal, terminal.sendintr, "Ctrl-D leaves")  # it does not leave
    terminal.expect_exact(">>> ")
    press(terminal, terminal.sendeof, pexpect.EOF)
    terminal.close()
    assert (terminal.exitstatus, terminal.signalstatus) == (0, None)
    assert "hello" in (tmp_path / "slipstream" / "chat_history").read_text().splitlines()


def test_messages_of_several_lines_and_exit(terminal: Any, tmp_path: Path) -> None:  # noqa: ANN401
    terminal.sendline('"""first')
    terminal.expect_exact("... ")
    terminal.sendline('second"""')
    terminal.expect_exact(";!?-")
    terminal.sendintr()
    terminal.expect_exact(">>> ")
    terminal.sendline(f"/save {tmp_path / 'chat.json'}")
    terminal.expect_exact("saved 2 messages")
    terminal.sendline("/exit")
    terminal.expect(pexpect.EOF)
    question, answer = json.loads((tmp_path / "chat.json").read_text())
    assert question["content"] == "first\nsecond"
    assert answer["content"].startswith(";!?-")  # what was said before Ctrl-C is remembered
