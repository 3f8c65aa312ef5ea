"""Text files to documents: plain texts and conversations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.quantize import texts

Message = Mapping[str, Any]
Document = str | Sequence[Message]

_KEYS = ("text", "messages", "prompt")


def read(source: str | Path | None, purpose: texts.Purpose) -> list[list[Document]]:
    """The documents of a ``.txt`` or ``.jsonl`` file, or, for None, of the texts of this package:
    in groups of one kind.

    Raises InvalidRequestError for a file that cannot be read, is malformed or empty.
    """
    if source is None:
        shipped = texts.load(purpose).items()
        return [_parse(name, content) for name, content in shipped]
    documents = _parse(str(source), _content(Path(source)))
    if not any(documents):
        raise InvalidRequestError(f"{source} is empty; give a file with text in it")
    return [documents]


def _content(source: Path) -> str:
    try:
        return source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{source} is not UTF-8 ({error}); convert it, for example with "
            f"iconv -f latin1 -t utf-8 {source}"
        ) from error
    except OSError as error:
        raise InvalidRequestError(
            f"{source} cannot be read ({error.strerror}); give a .txt or .jsonl file"
        ) from error


def _parse(name: str, content: str) -> list[Document]:
    if name.endswith(".txt"):
        return [content] if content.strip() else []
    if name.endswith(".jsonl"):
        lines = enumerate(content.split("\n"), 1)
        return [_document(name, number, line) for number, line in lines if line.strip()]
    raise InvalidRequestError(
        f"{name} is neither .txt nor .jsonl; rename it, or write one JSON object a line with the "
        'text under "text"'
    )


def _document(name: str, number: int, line: str) -> Document:
    where = f"line {number} of {name}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"{where} is not JSON ({error}); write one object a line"
        ) from error
    key = next((key for key in _KEYS if isinstance(row, dict) and key in row), None)
    if key is None:
        raise InvalidRequestError(
            f"{where} is {line:.60}, without any of {', '.join(_KEYS)}; write for example "
            '{"text": "..."}'
        )
    value: Document = row[key]
    if not (_is_conversation(value) if key == "messages" else isinstance(value, str)):
        raise InvalidRequestError(
            f"{key} in {where} is {json.dumps(value):.60}; expected "
            + ('[{"role": "user", "content": "..."}, ...]' if key == "messages" else "a string")
        )
    return value


def _is_conversation(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )
