from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tests.runtime.structured.forms import TINY_VOCAB, Driver, compiled, tiny_tokenizer

from slipstream.errors import EngineMismatchError, ExecutionError, InvalidRequestError
from slipstream.runtime.structured import compiler as module
from slipstream.runtime.structured import guard
from slipstream.runtime.structured.compiler import MAX_TEXT, GrammarCompiler
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.runtime.text.tokenizer_settings import TokenizerSettings


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, TINY_VOCAB)


@pytest.fixture(scope="module")
def driver(tokenizer: Tokenizer) -> Driver:
    return Driver(tokenizer, TINY_VOCAB)


@pytest.mark.parametrize(
    ("form", "held", "broken"),
    [
        ({"json_object": True}, ['{"a": [1, {}]}', "{}"], ["[]", "1", '{"a"}', "{} "]),
        ({"json": True}, ["1", '"é"', "[null]"], ["nul", "", "'a'"]),
        ({"json": '{"type": "integer"}'}, ["-12"], ["1.5", "a"]),
        ({"json": {"const": 'a"b'}}, ['"a\\"b"'], ['"ab"']),
        ({"regex": r"\d{3}-[a-c]+"}, ["123-abc", "000-a"], ["123-", "12-a", "123-d"]),
        (
            {"choice": ["yes", 'no "no"', "a\\b\n/c/", "é<|x|>"]},
            ["yes", 'no "no"', "a\\b\n/c/", "é<|x|>"],
            ["ye", "no", "maybe"],
        ),
        ({"grammar": 'start: "a" b*\nb: "b" | "c"'}, ["a", "abcb"], ["b", "ad"]),
    ],
)
def test_every_kind_holds_its_texts(
    form: dict[str, Any],
    held: list[str],
    broken: list[str],
    compiler: GrammarCompiler,
    driver: Driver,
) -> None:
    grammar = compiled(compiler, **form)
    assert all(driver.holds(grammar, text) for text in held)
    assert not any(driver.holds(grammar, text) for text in broken)


def test_a_grammar_may_name_special_tokens(compiler: GrammarCompiler, driver: Driver) -> None:
    grammar = compiled(compiler, grammar='start: <|im_start|> "a"')
    constraint = grammar.start()
    assert constraint.forced()[:1] == [driver.tokenizer.token_to_id("<|im_start|>")]


def test_whitespace_is_bounded(compiler: GrammarCompiler, driver: Driver) -> None:
    grammar = compiled(compiler, json_object=True)
    assert driver.holds(grammar, "{" + "\n" + 60 * " " + "}")
    assert not driver.holds(grammar, "{" + 65 * " " + "}")


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ({"json": {"not": {}}}, '"not"'),
        ({"json": {"properties": {"a": {"uniqueItems": True, "type": "array"}}}}, '"uniqueItems"'),
        ({"json": {"oneOf": [{"minimum": 1}, {"maximum": 2}]}}, "oneOf"),
        ({"json": {"type": "string", "format": "colour"}}, "colour"),
        ({"json": {"$ref": "http://a/b"}}, "http://a/b"),
        ({"json": {"type": "strin"}}, "strin"),
        ({"json": {"type": "string", "pattern": "(?=a)"}}, "look-ahead"),
        ({"json": {"not": {}, "x-guidance": {"lenient": True}}}, '"not"'),
        ({"json": False}, "no JSON object"),
        ({"json": "[1"}, "no JSON object"),
        ({"regex": "("}, "unclosed group"),
        ({"grammar": "start: b"}, '"b"'),
        ({"grammar": "start: <|nope|>"}, "nope"),
        ({"grammar": 'start: %json {"not": {}}'}, '"not"'),
        ({"json": {"$ref": "#"}}, "no text is of this form"),
        ({"grammar": "start: start"}, "no text is of this form"),
        # They fail at the first token of an answer.
        ({"regex": "a{100000}"}, "too many expressions"),
        ({"json": {"type": "string", "pattern": "^a{100000}$"}}, "too many expressions"),
    ],
)
def test_what_cannot_be_held_is_named(
    form: dict[str, Any], names: str, compiler: GrammarCompiler
) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be held") as caught:
        compiled(compiler, **form)
    assert names in str(caught.value) and caught.value.param == "structured"
    assert len(str(caught.value)) < 1000


def test_thousands_of_choices_are_held(compiler: GrammarCompiler, driver: Driver) -> None:
    grammar = compiled(compiler, choice=["", *(f"c{i}" for i in range(2500))])
    assert all(driver.holds(grammar, text) for text in ("", "c1", "c2499"))
    assert not any(driver.holds(grammar, text) for text in ("c", "c2500"))


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "\ud800"},
        {"grammar": 'start: "\ud800"'},
        {"choice": ["\ud800"]},
        {"json": {"const": "\ud800"}},
        {"json": '{"const": "\ud800"}'},
    ],
    ids=lambda form: ascii(form),
)
def test_lone_surrogates_are_refused(form: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="remove lone surrogates") as caught:
        StructuredOutput(**form)
    assert caught.value.param == "structured"


def chain(link: Callable[[str], object], last: object, count: int = 20_000) -> str:
    definitions = {f"a{i}": link(f"#/$defs/a{i + 1}") for i in range(count)}
    return json.dumps({"$defs": {**definitions, f"a{count}": last}, "$ref": "#/$defs/a0"})


HOSTILE: dict[str, dict[str, Any]] = {
    "a chain of references": {"json": chain(lambda to: {"$ref": to}, {"type": "null"}, 6000)},
    "nested through references": {
        "json": chain(lambda to: {"type": "array", "items": {"$ref": to}}, {"type": "null"}, 6000)
    },
    "a cycle": {"json": {"$ref": "#"}},
    "a cycle of two": {
        "json": {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {}]}}, "$ref": "#/$defs/a"}
    },
    "nested": {"json": '{"items":' * 3000 + "{}" + "}" * 3000},
    "a product of choices": {
        "json": {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}_{j}": {"type": "null"}}} for j in range(4)]}
                for i in range(14)
            ]
        }
    },
    "multiples of a prime": {"json": {"type": "integer", "multipleOf": 99_999_989}},
    "ten thousand properties": {
        "json": {"properties": {f"property_{i}": {"type": "string"} for i in range(10_000)}}
    },
    "many patterns at once": {
        "json": {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(1, 40)]}
    },
    "a regex in parentheses": {"regex": "(" * 50_000 + "a" + ")" * 50_000},
    "a chain of rules": {
        "grammar": "start: r0\n"
        + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(20_000))
        + 'r20000: "a"'
    },
    "a grammar in parentheses": {"grammar": "start: " + "(" * 50_000 + '"a"' + ")" * 50_000},
    "twenty thousand choices": {"choice": [f"choice number {i}" for i in range(20_000)]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_forms_are_refused_in_bounded_time(
    name: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SECONDS", 0.5)
    compiler = GrammarCompiler(tokenizer, TINY_VOCAB)
    with pytest.raises(InvalidRequestError, match="cannot be held"):
        compiled(compiler, **HOSTILE[name])


def test_others_go_on_while_a_form_takes_too_long(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SECONDS", 120)
    compiler = GrammarCompiler(tokenizer, TINY_VOCAB)
    compiled(compiler, regex="a")

    def hang() -> None:
        with pytest.raises(InvalidRequestError):
            compiled(compiler, **HOSTILE["multiples of a prime"])

    hanging = threading.Thread(target=hang)
    hanging.start()
    try:
        compiled(compiler, regex="b")
        assert hanging.is_alive()
        # What hangs is a process of its own, which can be ended.
        deadline = time.monotonic() + 60
        while not compiler._guard._busy and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        for process in list(compiler._guard._busy):
            process.kill()
        hanging.join()
    compiled(compiler, regex="c")


def test_what_all_grammars_need_is_prepared_without_a_process(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, TINY_VOCAB)
    compiler.prepare()
    assert "_tokens" in vars(compiler) and "_guard" not in vars(compiler)


@pytest.mark.parametrize("executable", ["", "/no/such/python3", "stub", "python-that-ends"])
def test_a_process_is_found_where_python_is_embedded(
    executable: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Triton's stub, whose own program must not be started once more."""
    if executable and not Path(executable).is_absolute():
        program, started = tmp_path / executable, tmp_path / "started"
        program.write_text(f"#!/bin/sh\ntouch {started}\n")
        program.chmod(0o755)
        executable = str(program)
    monkeypatch.setattr(sys, "executable", executable)
    compiled(GrammarCompiler(tokenizer, TINY_VOCAB), regex="a")
    assert (tmp_path / "started").exists() == executable.endswith("ends")


def test_another_python_is_told_where_the_library_is(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "python3"  # which has no packages of its own
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(guard, "interpreters", lambda: iter([str(bare)]))
    compiled(GrammarCompiler(tokenizer, TINY_VOCAB), regex="a")


def test_where_no_process_can_be_started_forms_are_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "interpreters", lambda: iter(["/no/such/python"]))
    with pytest.raises(ExecutionError, match=r"/no/such/python: .*leave the structured output out"):
        compiled(GrammarCompiler(tokenizer, TINY_VOCAB), regex="a")
    monkeypatch.setattr(guard, "interpreters", lambda: iter([]))
    with pytest.raises(ExecutionError, match="no python3 on PATH"):
        compiled(GrammarCompiler(tokenizer, TINY_VOCAB), regex="a")


def test_a_text_that_is_too_long_is_refused_unread(compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequestError, match=f"at most {MAX_TEXT}"):
        compiled(compiler, regex="a" * (MAX_TEXT + 1))


def test_a_form_is_compiled_once(compiler: GrammarCompiler) -> None:
    first = compiled(compiler, regex="once")
    assert compiled(compiler, regex="once") is first
    assert compiled(compiler, choice=["once"]) is not first


def test_what_was_used_last_is_kept(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_GRAMMARS", 2)
    compiler = GrammarCompiler(tokenizer, TINY_VOCAB)
    a, b = compiled(compiler, regex="a"), compiled(compiler, regex="b")
    assert compiled(compiler, regex="a") is a
    compiled(compiler, regex="c")
    assert compiled(compiler, regex="a") is a
    assert compiled(compiler, regex="b") is not b
    monkeypatch.setattr(module, "_MOST_CHARACTERS", 8)
    compiled(compiler, regex="d" * 8)
    assert compiled(compiler, regex="a") is not a


def test_continuations_advance_alone(compiler: GrammarCompiler, driver: Driver) -> None:
    grammar = compiled(compiler, regex="[ab]c")
    first, second = grammar.start(), grammar.start()
    (a,), (c,) = driver.tokenizer.encode("a"), driver.tokenizer.encode("c")
    first.take(a)
    first.take(c)
    assert first.complete and not second.complete
    with pytest.raises(InvalidRequestError, match="cannot be followed") as caught:
        second.take(c)
    assert caught.value.param == "structured"


def test_a_tokenizer_without_bytes_has_no_grammars() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    compiler = GrammarCompiler(Tokenizer(backend, TokenizerSettings({})), 2)
    compiler.prepare()  # nobody has asked for one
    with pytest.raises(EngineMismatchError, match="leave the structured output out") as caught:
        compiler.compile(StructuredOutput(regex="a"))
    assert caught.value.param == "structured"


def test_a_tokenizer_that_falls_back_to_bytes() -> None:
    words = ["<unk>", "</s>", "▁", "a", "▁a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = tokenizers.models.BPE(
        {word: i for i, word in enumerate(words)},
        [("▁", "a")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    backend = tokenizers.Tokenizer(model)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(backend, TokenizerSettings({"eos_token": "</s>"}))
    constraint = (
        GrammarCompiler(tokenizer, len(words)).compile(StructuredOutput(regex="b aé")).start()
    )
    assert tokenizer.decode([words.index("b"), *constraint.forced()]).endswith("b aé")
