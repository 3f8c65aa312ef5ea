from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream.errors import InvalidRequestError
from slipstream.quantize.calibration_data import calibration_windows, evaluation_windows

BOS = 1


def encode(text: str) -> list[int]:
    """A token a character."""
    return [ord(character) for character in text]


def encode_with_bos(text: str) -> list[int]:
    return [BOS, *encode(text)]


def template(messages: Sequence[Mapping[str, Any]]) -> str:
    return chr(BOS) + "".join(f"<{m['role']}>{m['content']}\n" for m in messages)


def text_of(window: np.ndarray[Any, Any]) -> str:
    return "".join(map(chr, window))


def kinds(window: np.ndarray[Any, Any]) -> str:
    """A guess at what a window of the shipped text holds."""
    text = text_of(window)
    if "<user>" in text or "<assistant>" in text:
        return "chat"
    if sum(map(text.count, ("def ", "return", " = ", "{"))) > 4:
        return "code"
    return "foreign" if sum(ord(c) > 191 for c in text) > 8 else "english"


def rows(path: Path, *objects: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in objects))
    return path


def test_the_shipped_text_mixes_all_kinds() -> None:
    windows = calibration_windows(encode, template, None, 64, 512, seed=3)
    assert len(windows) == 64
    assert all(window.dtype == np.int32 and len(window) == 512 for window in windows)
    assert set(map(kinds, windows)) == {"chat", "code", "foreign", "english"}
    few = Counter(kinds(window) for window in windows[:8])
    assert few["english"] >= 3 and few["code"] >= 1 and few["foreign"] >= 1


def test_the_seed_decides() -> None:
    first, again, other = (
        calibration_windows(encode, template, None, 6, 200, seed=seed) for seed in (7, 7, 8)
    )
    assert all(map(np.array_equal, first, again))
    assert not any(map(np.array_equal, first, other))


def test_more_windows_begin_with_fewer() -> None:
    few, many = (calibration_windows(encode, template, None, size, 100) for size in (5, 20))
    assert all(map(np.array_equal, few, many))


def test_a_text_file_is_cut_and_shuffled_without_repeats(tmp_path: Path) -> None:
    file = tmp_path / "numbers.txt"
    file.write_text("".join(f"{number:07d}\n" for number in range(2000)))
    windows = calibration_windows(encode, None, file, 100, 160)
    lines = "".join(map(text_of, windows)).split("\n")
    assert len(windows) == 100
    whole = [line for line in lines if len(line) == 7]
    assert len(set(whole)) == len(whole) > 1800
    assert whole != sorted(whole)


def test_every_window_starts_as_a_prompt_does(tmp_path: Path) -> None:
    conversation = {"messages": [{"role": "user", "content": "x" * 90}]}
    file = rows(tmp_path / "chat.jsonl", *[conversation] * 10)
    windows = calibration_windows(encode_with_bos, template, file, 8, 64)
    for window in [*windows, *evaluation_windows(encode_with_bos, file, 64, template)]:
        assert window[0] == BOS
        assert list(window).count(BOS) == 1


def test_lines_of_json(tmp_path: Path) -> None:
    file = rows(
        tmp_path / "mixed.jsonl",
        {"text": "a plain text, "},
        {"prompt": "a prompt, "},
        {"messages": [{"role": "user", "content": "Hi"}], "text": "which comes first, "},
        {"messages": [{"role": "user", "content": "Hello"}], "id": 4},
    )
    (window,) = evaluation_windows(encode, file, 400, template)
    assert text_of(window) == (
        "a plain text, a prompt, which comes first, " + chr(BOS) + "<user>Hello\n"
    )
    (window,) = evaluation_windows(encode, file, 400, None)
    assert text_of(window).endswith("which comes first, user: Hello\n\n")


def test_evaluation_keeps_order_and_every_token(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abcdefghijklmnopqrstuvwxyz" * 4)
    windows = evaluation_windows(encode, file, 10)
    assert "".join(map(text_of, windows)) == file.read_text()
    assert [len(window) for window in windows] == [10] * 10 + [4]
    assert len(evaluation_windows(encode, None, 2048, template)) > 10


def test_one_long_line_is_cut_too(tmp_path: Path) -> None:
    file = tmp_path / "line.txt"
    file.write_text("".join(f"{number:07d}-" for number in range(3000)))
    windows = calibration_windows(encode, None, file, 40, 100)
    assert len({text_of(window) for window in windows}) == 40


def test_a_short_file_gives_fewer_windows_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "short.txt"
    file.write_text("word " * 100)
    with caplog.at_level(logging.WARNING, "slipstream"):
        windows = calibration_windows(encode, None, file, 50, 100)
    assert len(windows) == 5
    assert "5 windows of 100 tokens, not the 50 asked for" in caplog.text


def test_the_model_writes_its_own_text() -> None:
    asked: list[tuple[int, int, int]] = []

    def sample(prompt: Sequence[int], count: int, seed: int) -> list[int]:
        asked.append((len(prompt), count, seed))
        return [seed % 100] * count

    first = calibration_windows(encode_with_bos, template, "self", 12, 64, 5, sample)
    assert len(first) == 12 and all(len(window) == 64 for window in first)
    assert {(prompt, count) for prompt, count, _ in asked} == {(9, 55)}
    assert len({seed for _, _, seed in asked}) == 12
    assert len({text_of(window[:9]) for window in first}) > 8
    again = calibration_windows(encode_with_bos, template, "self", 12, 64, 5, sample)
    assert all(map(np.array_equal, first, again))
    with pytest.raises(InvalidRequestError, match="can generate"):
        calibration_windows(encode, None, "self", 4, 64)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n\n", "empty"),
        ("empty.jsonl", b"\n", "empty"),
        ("short.txt", b"too short", "holds 9 tokens, less than one window of 64"),
        ("latin.txt", "größer".encode("latin-1"), "is not UTF-8"),
        ("table.csv", b"text\nhello", "neither .txt nor .jsonl"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 of .* is not JSON"),
        ("deep.jsonl", b"[" * 200_000, "line 1 of .* is not JSON"),
        ("list.jsonl", b'["a"]\n', "line 1 of .* without any of text, messages, prompt"),
        ("keys.jsonl", b'{"content": "a"}\n', "without any of text, messages, prompt"),
        ("number.jsonl", b'{"text": 3}\n', "text in line 1 of .* is 3; expected a string"),
        ("roles.jsonl", b'{"messages": [{"role": "user"}]}\n', 'expected \\[{"role"'),
        ("none.jsonl", b'{"messages": []}\n', 'expected \\[{"role"'),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequestError, match=message):
        calibration_windows(encode, template, tmp_path / name, 4, 64)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(InvalidRequestError, match="cannot be read"):
            calibration_windows(encode, template, path, 4, 64)
        with pytest.raises(InvalidRequestError, match="cannot be read"):
            evaluation_windows(encode, path)


def test_too_little_to_evaluate(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("a")
    with pytest.raises(InvalidRequestError, match="holds 1 tokens"):
        evaluation_windows(encode, file)


@pytest.mark.parametrize(("size", "length"), [(0, 64), (4, 1)])
def test_sizes_without_sense(size: int, length: int) -> None:
    with pytest.raises(InvalidRequestError, match="--calib-size"):
        calibration_windows(encode, None, None, size, length)
