from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest

from slipstream.quantize import texts

WINDOW = 64
README = Path(texts.__file__).with_name("README.md")


def contents(purpose: texts.Purpose) -> list[str]:
    """Everything that a model would read, conversations message by message."""
    found = []
    for name, content in texts.load(purpose).items():
        if name.endswith(".txt"):
            found.append(content)
        else:
            rows = [json.loads(line) for line in content.splitlines()]
            found += [message["content"] for row in rows for message in row["messages"]]
    return found


def windows(purpose: texts.Purpose) -> set[str]:
    return {
        text[start : start + WINDOW]
        for text in contents(purpose)
        for start in range(len(text) - WINDOW + 1)
    }


@pytest.mark.parametrize(("purpose", "kib"), [("calibration", 256), ("evaluation", 40)])
def test_sizes(purpose: texts.Purpose, kib: int) -> None:
    size = sum(len(content.encode()) for content in texts.load(purpose).values())
    assert 0.95 * kib <= size / 1024 <= 1.05 * kib


def test_calibration_and_evaluation_share_nothing() -> None:
    calibration, evaluation = windows("calibration"), windows("evaluation")
    assert len(calibration) > 100_000 and len(evaluation) > 20_000
    assert not calibration & evaluation


@pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
def test_every_kind_is_there(purpose: texts.Purpose) -> None:
    files = texts.load(purpose)
    kinds = {name.removeprefix(f"{purpose}_").partition(".")[0] for name in files}
    assert kinds == {"prose", "technical", "languages", "code", "chat"}
    languages = files[f"{purpose}_languages.txt"]
    for words in (" und ", " les ", " los ", "的", " на "):
        assert words in languages
    for content in files.values():
        assert content.endswith("\n") and "\r" not in content and "\ufffd" not in content


@pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
def test_conversations_alternate(purpose: texts.Purpose) -> None:
    for line in texts.load(purpose)[f"{purpose}_chat.jsonl"].splitlines():
        roles = [message["role"] for message in json.loads(line)["messages"]]
        if roles[0] == "system":
            del roles[0]
        assert len(roles) >= 2
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_the_readme_tells_the_origin_of_every_file() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \| (.+) \|$", README.read_text(), re.MULTILINE)
    listed = [name for name, _, _ in rows]
    assert sorted(listed) == sorted([*texts.load("calibration"), *texts.load("evaluation")])
    for _, _, origin in rows:
        assert re.search(r"ours|public domain|as above", origin)


def test_no_text_comes_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(texts.load("calibration")) == len(texts.load("evaluation")) == 5
