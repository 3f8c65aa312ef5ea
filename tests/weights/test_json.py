"""Foreign JSON: what is read, and that whatever is wrong is one error with file and remedy."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from slipstream.errors import CheckpointError, EngineMismatchError
from slipstream.weights.json import (
    Fields,
    Origin,
    is_file_name,
    parse,
    parse_fields,
    read_fields,
    read_text,
)

ORIGIN = Origin("a.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (b'{"a": ', "cannot be read"),
        (b'{"a": 1} {', "Extra data"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nested too deep"),
        (b"[" * 101 + b"]" * 101, "nested deeper than 100 levels"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        (b'{"a": "\xff"}', "utf-8"),
        (rb'{"a": ["\ud800"]}', "surrogates not allowed"),
        (rb'{"\udfff": 1}', "surrogates not allowed"),
        (b'{"a": 1, "a": 2}', "'a' stands there twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b"[" + b"{}," * 500_001 + b"{}]", "more than 1000000 values"),
    ],
)
def test_what_is_no_json_of_ours_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"a\.json .*{message}.*download it again"):
        parse(data, ORIGIN)


def test_what_is_odd_and_harmless_is_read() -> None:
    assert parse(b'{"a": 1, "a": 1}', ORIGIN) == {"a": 1}
    assert parse('{"a": "größe \U0001f600"}'.encode(), ORIGIN) == {"a": "größe \U0001f600"}
    assert parse(rb'{"a": "\ud83d\ude00"}', ORIGIN) == {"a": "\U0001f600"}
    assert parse(b"[" * 100 + b"]" * 100, ORIGIN) is not None
    assert parse(b"[1e400]", ORIGIN) == [math.inf]


@pytest.mark.parametrize("data", [b"[]", b"null", b"3", b'"text"'])
def test_only_an_object_has_fields(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"a\.json is not a JSON object"):
        parse_fields(data, ORIGIN)


def test_a_file_is_read_and_a_missing_or_huge_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    with pytest.raises(CheckpointError, match=r"a\.json cannot be read"):
        read_fields(file)
    file.write_text('{"n": 1}')
    assert read_fields(file).integer("n") == 1
    monkeypatch.setattr("slipstream.weights.json.MAX_BYTES", 7)
    with pytest.raises(CheckpointError, match="has 8 bytes"):
        read_fields(file)


def test_a_text_is_read_and_a_huge_one_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jinja"
    file.write_text("größe", encoding="utf-8")
    assert read_text(file) == "größe"
    file.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"a\.jinja cannot be read"):
        read_text(file)
    with file.open("wb") as sparse:
        sparse.truncate(6 << 30)
    with pytest.raises(CheckpointError, match=r"a\.jinja has 6442450944 bytes"):
        read_text(file)


@pytest.mark.parametrize("text", ["", ".", "..", "/a", "a/b", "../a", "a\0", "a" * 256, "ö" * 128])
def test_what_is_no_file_of_a_directory(text: str) -> None:
    assert not is_file_name(text)


@pytest.mark.parametrize("text", ["a", "...", ".a", "a b", "größe", "a" * 255, "m-1.safetensors"])
def test_what_is_a_file_of_a_directory(text: str) -> None:
    assert is_file_name(text)


FIELDS = Fields(
    {
        "text": "t",
        "integer": 3,
        "number": 1.5,
        "flag": True,
        "object": {"inner": {"n": -1}},
        "list": ["a", "b"],
        "numbers": [1, 2],
        "objects": [{"n": 1}],
        "null": None,
        "infinite": math.inf,
        "huge": 10**400,
    },
    ORIGIN,
)


def test_fields_have_their_types() -> None:
    assert FIELDS.text("text") == "t" and FIELDS.choice("text", ("s", "t")) == "t"
    assert FIELDS.integer("integer", minimum=3, maximum=3) == 3
    assert (FIELDS.number("number"), FIELDS.number("integer")) == (1.5, 3.0)
    assert FIELDS.flag("flag") is True
    assert FIELDS.fields("object").fields("inner").integer("n", minimum=-1) == -1
    assert FIELDS.fields_by_name("object")["inner"].path == "object.inner."
    assert FIELDS.texts("list") == ("a", "b") and FIELDS.integers("numbers") == (1, 2)
    assert FIELDS.numbers("numbers") == (1.0, 2.0)
    assert [item.integer("n") for item in FIELDS.list_of_fields("objects")] == [1]


def test_null_is_missing_and_missing_is_the_default() -> None:
    for key in ("null", "absent"):
        assert not FIELDS.has(key)
        assert FIELDS.text(key, "d") == "d" and FIELDS.optional_text(key) is None
        assert FIELDS.integer(key, 4) == 4 and FIELDS.optional_integer(key) is None
        assert FIELDS.number(key, 0.5) == 0.5 and FIELDS.optional_number(key) is None
        assert FIELDS.flag(key, False) is False
        assert FIELDS.optional_fields(key) is None and FIELDS.fields_by_name(key) == {}
        assert FIELDS.sequence(key, ()) == FIELDS.texts(key, ()) == ()
        assert FIELDS.integers(key, ()) == ()


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda f: f.text("integer"), "integer is 3; expected text"),
        (lambda f: f.text("absent"), "absent is None; expected text"),
        (lambda f: f.choice("text", ("a", "b")), "text is 't'; expected one of a, b"),
        (lambda f: f.choice("list", ("a", "b")), "list is .*; expected one of a, b"),
        (lambda f: f.integer("flag"), "flag is True; expected an integer of at least 0"),
        (lambda f: f.integer("number"), "number is 1.5; expected an integer"),
        (lambda f: f.integer("integer", minimum=4), "integer is 3; .* at least 4"),
        (lambda f: f.integer("integer", maximum=2), "integer is 3; .* at most 2"),
        (lambda f: f.integer("huge"), "huge is an integer of 1329 bits; expected"),
        (lambda f: f.number("huge"), "huge is an integer of 1329 bits; expected a finite"),
        (lambda f: f.number("infinite"), "infinite is inf; expected a finite number"),
        (lambda f: f.number("flag"), "flag is True; expected a finite number"),
        (lambda f: f.number("text"), "text is 't'; expected a finite number"),
        (lambda f: f.fields("object").fields("inner").number("n", positive=True), r"object\.inn"),
        (lambda f: f.flag("integer"), "integer is 3; expected true or false"),
        (lambda f: f.fields("text"), "text is 't'; expected an object"),
        (lambda f: f.fields_by_name("list"), "list is .*; expected an object"),
        (lambda f: f.texts_by_name("object"), r"object\.inner is .*; expected text"),
        (lambda f: f.sequence("text"), "text is 't'; expected a list"),
        (lambda f: f.texts("numbers"), "numbers is .*; expected a list of texts"),
        (lambda f: f.integers("list"), "list is .*; expected a list of integers"),
        (lambda f: f.integers("numbers", minimum=2), "expected a list of integers of at least 2"),
        (lambda f: f.numbers("list"), "list is .*; expected a list of finite numbers"),
        (lambda f: f.list_of_fields("list"), r"list\[0\] is 'a'; expected an object"),
    ],
)
def test_another_type_is_an_error_that_says_what_to_do(
    read: Callable[[Fields], object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"a\.json: .*{message}.*: download it again"):
        read(FIELDS)


def test_the_error_is_that_of_its_origin() -> None:
    origin = Origin("engine.json", "build it again", EngineMismatchError)
    with pytest.raises(EngineMismatchError, match=r"engine\.json: n is None; .*: build it again"):
        Fields({}, origin).integer("n")
    with pytest.raises(EngineMismatchError, match=r"engine\.json cannot be read .*; build it"):
        parse(b"{", origin)


def test_what_an_error_shows_is_short() -> None:
    deep: object = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 10_000, [1] * 10_000, deep, {str(i): i for i in range(10_000)}):
        with pytest.raises(CheckpointError) as caught:
            Fields({"key": value}, ORIGIN).integer("key")
        assert len(str(caught.value)) < 300
