from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from slipstream.errors import InvalidRequestError
from slipstream.server.chat.conversation import Conversation, Message


def encode(messages: Sequence[Message]) -> list[int]:
    """A token a character."""
    return [ord(char) for message in messages for char in message["content"]]


def conversation(turns: int) -> Conversation:
    talk = Conversation("sys")
    for number in range(turns):
        talk.ask(f"q{number}")
        talk.answer(f"a{number}")
    return talk


def contents(talk: Conversation) -> list[str]:
    return [message["content"] for message in talk.messages]


def test_messages_are_in_order_with_their_roles() -> None:
    assert contents(conversation(2)) == ["sys", "q0", "a0", "q1", "a1"]
    roles = [message["role"] for message in conversation(1).messages]
    assert roles == ["system", "user", "assistant"]


def test_what_fits_stays() -> None:
    talk = conversation(3)
    tokens, dropped = talk.fit(encode, 15)
    assert (len(tokens), dropped) == (15, 0)


def test_the_oldest_turns_go_and_the_system_prompt_stays() -> None:
    talk = conversation(3)
    tokens, dropped = talk.fit(encode, 14)
    assert dropped == 1 and contents(talk) == ["sys", "q1", "a1", "q2", "a2"]
    assert tokens == encode(talk.messages)


def test_the_last_question_is_never_dropped() -> None:
    talk = conversation(2)
    talk.ask("a long question")
    _, dropped = talk.fit(encode, 5)
    assert dropped == 2 and contents(talk) == ["sys", "a long question"]


def test_a_question_without_an_answer_is_forgotten() -> None:
    talk = conversation(1)
    talk.ask("why?")
    talk.answer("")
    assert contents(talk) == ["sys", "q0", "a0"]


def test_reset_keeps_the_system_prompt() -> None:
    talk = conversation(2)
    talk.reset()
    assert contents(talk) == ["sys"]


def test_saved_messages_are_json(tmp_path: Path) -> None:
    talk = Conversation()
    talk.ask("grüß \N{GRINNING FACE}")
    talk.save(tmp_path / "chat.json")
    assert json.loads((tmp_path / "chat.json").read_text(encoding="utf-8")) == talk.messages
    with pytest.raises(InvalidRequestError, match="cannot be written"):
        talk.save(tmp_path)
