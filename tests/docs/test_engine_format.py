"""docs/engine_format.md has the manifest's fields and the sentences that loading answers with."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.docs.test_docs import ROOT, blocks, prose

from slipstream.builder.contract import (
    CacheArray,
    CacheSpec,
    GraphSpec,
    Output,
    Port,
    Source,
    bytes_per_token,
)
from slipstream.builder.engine import MANIFEST, Manifest, open_engine
from slipstream.errors import EngineMismatchError, InvalidRequestError
from slipstream.runtime.loading import load

PAGE = ROOT / "docs" / "engine_format.md"
EXAMPLE: dict[str, Any] = next(
    json.loads(text) for language, text in blocks(PAGE) if language == "json"
)
FIELDS = [field.name for field in dataclasses.fields(Manifest)]


def sentences() -> list[str]:
    """The table's sentences as patterns; a word in capitals is any text."""
    rows = re.findall(r"^\| .+ \| (.+) \|$", prose(PAGE).split("## What loading checks")[1], re.M)
    return [re.sub(r"\b[A-Z]{4,}\b", ".+", re.escape(row)) for row in rows[2:]]


def write_manifest(directory: Path, **changes: object) -> None:
    text = json.dumps({**EXAMPLE, "files": {}, **changes})
    (directory / MANIFEST).write_text(text)


def test_the_example_is_a_manifest(tmp_path: Path) -> None:
    assert list(EXAMPLE) == FIELDS
    write_manifest(tmp_path)
    assert bytes_per_token(open_engine(tmp_path).manifest.caches) == 2 * 30 * 3 * 64 * 2


def test_every_field_is_explained() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", prose(PAGE), re.M)
    assert set(FIELDS) <= set(re.findall(r"\w+", " ".join(rows)))


def test_every_word_of_a_contract_is_explained() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", prose(PAGE), re.M)
    told = set(re.findall(r"\w+", " ".join(rows)))
    fields = {field.name for part in (GraphSpec, CacheSpec) for field in dataclasses.fields(part)}
    assert {*fields - {"name"}, *Source} <= told
    words = set(re.findall(r"`(\w+)`", prose(PAGE)))
    parts = (Port, Output, CacheArray)
    assert {field.name for part in parts for field in dataclasses.fields(part)} <= words


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"format_version": 99}', '{"format_version": 1}']
)
def test_sentences_of_a_bad_manifest(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(EngineMismatchError) as raised:
        open_engine(tmp_path)
    assert any(re.fullmatch(pattern, str(raised.value)) for pattern in sentences()), raised.value


@pytest.mark.parametrize("files", [{"a": "0"}, {MANIFEST: "0"}], ids=["missing", "changed"])
def test_sentences_of_bad_files(files: dict[str, str], tmp_path: Path) -> None:
    write_manifest(tmp_path, files=files)
    with pytest.raises(EngineMismatchError) as raised:
        open_engine(tmp_path).verify_files()
    assert any(re.fullmatch(pattern, str(raised.value)) for pattern in sentences()), raised.value


def test_the_sentence_of_a_limit(tmp_path: Path) -> None:
    write_manifest(tmp_path)
    with pytest.raises(InvalidRequestError) as raised:
        load(tmp_path, {"max_seq_len": 9000})
    assert any(re.fullmatch(pattern, str(raised.value)) for pattern in sentences()), raised.value
