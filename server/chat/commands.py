"""What can be said to the chat itself: ``/help`` and the like."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slipstream.errors import InvalidRequestError

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
    "stats": SlashCommand("/stats", "tokens and times of the last answer", _stats),
    "save": SlashCommand("/save FILE", "write the conversation as JSON", _save),
    "exit": SlashCommand("/exit", "leave", _exit),
}
