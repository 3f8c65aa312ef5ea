"""What can be said to the chat itself: ``/help`` and the like."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.options import split_options
from slipstream.runtime.structured.output import StructuredOutput

if TYPE_CHECKING:
    from slipstream.server.chat.session import ChatSession


@dataclass(frozen=True, slots=True)
class SlashCommand:
    """``run`` gets the session and the text after the name; its text, if any, is shown."""

    usage: str
    help: str
    run: Callable[[ChatSession, str], str | None]


def run_command(session: ChatSession, line: str) -> str | None:
    """Run ``/name argument``; raises ``InvalidRequestError`` for a bad name or argument."""
    name, _, argument = line.removeprefix("/").partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise InvalidRequestError(f"there is no /{name}; /help lists the commands")
    return command.run(session, argument.strip())


def _help(session: ChatSession, argument: str) -> str:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"  {command.usage:<{width}}  {command.help}" for command in COMMANDS.values()]
    keys = [
        f"  {chr(34) * 3:<{width}}  begins and ends a message of several lines",
        f"  {'Ctrl-C':<{width}}  stop the answer",
        f"  {'Ctrl-D':<{width}}  leave",
    ]
    return "\n".join([*lines, *keys])


def _reset(session: ChatSession, argument: str) -> str:
    session.conversation.reset()
    return "the conversation is forgotten"


def _system(session: ChatSession, argument: str) -> str:
    if argument:
        session.conversation.system = argument
    return f"system prompt: {session.conversation.system or 'none'}"


def _set(session: ChatSession, argument: str) -> str:
    if not argument:
        return "\n".join(f"  {name} = {getattr(session.params, name)}" for name in session.settable)
    name, sign, text = (part.strip() for part in argument.partition("="))
    name = name.replace("-", "_")
    if not sign:
        raise InvalidRequestError(f"/set {argument} has no value; write for example /set top_p=0.9")
    if name not in session.settable:
        raise InvalidRequestError(
            f"there is no setting {name}; the settings are {', '.join(session.settable)}"
        )
    session.set(name, _parse(text))
    return f"{name} = {getattr(session.params, name)}"


def _parse(text: str) -> object:
    """JSON where it is JSON, else the text itself: ``0.7``, ``true``, ``["a", "b"]``, ``###``."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _think(session: ChatSession, argument: str) -> str:
    if argument:
        session.options = replace(session.options, thinking=_switch("think", argument))
    thinking = session.options.thinking
    return f"thinking: {'as the model likes' if thinking is None else _WORDS[thinking]}"


def _json(session: ChatSession, argument: str) -> str:
    if argument:
        form = StructuredOutput(json_object=True) if _switch("json", argument) else None
        session.set("structured", form)
    return f"answers in JSON: {_WORDS[session.params.structured is not None]}"


_WORDS = {True: "on", False: "off"}


def _switch(name: str, argument: str) -> bool:
    values = {word: value for value, word in _WORDS.items()}
    if argument not in values:
        raise InvalidRequestError(f"/{name} {argument} is neither on nor off; write /{name} on")
    return values[argument]


def _tools(session: ChatSession, argument: str) -> str:
    if argument:
        given = [] if argument == "off" else _read_tools(Path(argument).expanduser())
        options, _ = split_options({"tools": given})
        session.options = replace(session.options, tools=options.tools)
    names = ", ".join(tool.name for tool in session.options.tools)
    return f"functions that the model may call: {names or 'none'}"


def _read_tools(file: Path) -> list[object]:
    try:
        tools = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"{file} cannot be read ({error}); name a file of JSON"
        ) from error
    if not isinstance(tools, list):
        raise InvalidRequestError(f"{file} holds no list; write tools in OpenAI's shape into one")
    return tools


def _stats(session: ChatSession, argument: str) -> str:
    if session.usage is None:
        return "no answer yet"
    used = session.usage.prompt + session.usage.generated
    return f"{session.usage.describe()}\ncontext: {used} of {session.max_seq_len} tokens"


def _save(session: ChatSession, argument: str) -> str:
    if not argument:
        raise InvalidRequestError("/save needs the name of a file, such as /save chat.json")
    file = Path(argument).expanduser()
    session.conversation.save(file)
    return f"saved {len(session.conversation.messages)} messages to {file}"


def _exit(session: ChatSession, argument: str) -> None:
    session.ended = True


COMMANDS = {
    "help": SlashCommand("/help", "show this", _help),
    "reset": SlashCommand("/reset", "forget the conversation", _reset),
    "system": SlashCommand("/system TEXT", "set the system prompt; show it without TEXT", _system),
    "set": SlashCommand("/set NAME=VALUE", "change how answers are sampled; alone, show it", _set),
    "think": SlashCommand("/think on|off", "let the model think first; alone, show it", _think),
    "json": SlashCommand("/json on|off", "hold answers to JSON objects; alone, show it", _json),
    "tools": SlashCommand(
        "/tools FILE|off", "functions to call, as JSON; alone, show them", _tools
    ),
    "stats": SlashCommand("/stats", "tokens and times of the last answer", _stats),
    "save": SlashCommand("/save FILE", "write the conversation as JSON", _save),
    "exit": SlashCommand("/exit", "leave", _exit),
}
